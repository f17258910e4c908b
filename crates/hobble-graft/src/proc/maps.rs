//! `/proc/<pid>/maps` and the parts of `/proc/<pid>/smaps` that a mapping must be rebuilt from.
//!
//! A name in these files has its newlines written as `\012` and nothing else escaped (fs/proc/task_mmu.c, `show_map_vma`), so it
//! cannot be told from a name that holds these four characters. Names here are raw; the exact path of a file mapping is the
//! link `/proc/<pid>/map_files/<start>-<end>`.

use std::path::PathBuf;

use super::text::Cursor;
use super::{ParseError, ProcError};
use crate::ids::{Device, Pid};

/// What a program may do with a piece of memory (`PROT_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Protection {
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub execute: bool,
}

impl Protection {
    /// The word that `mmap` and `mprotect` take.
    pub fn bits(self) -> i32 {
        let mut bits = libc::PROT_NONE;
        for (is_set, bit) in [
            (self.read, libc::PROT_READ),
            (self.write, libc::PROT_WRITE),
            (self.execute, libc::PROT_EXEC),
        ] {
            if is_set {
                bits |= bit;
            }
        }
        bits
    }
}

/// A line of `maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
    /// What the program may do with it.
    pub protection: Protection,
    /// `MAP_SHARED`.
    pub is_shared: bool,
    /// Offset into the file, in bytes.
    pub offset: u64,
    /// Device of the file's superblock; 0:0 without a file.
    pub device: Device,
    /// Inode of the file; 0 without a file.
    pub inode: u64,
    /// Path of a file, name in brackets, or nothing; raw, see the module.
    pub name: Vec<u8>,
}

impl MapEntry {
    /// Whether a file (of whatever kind, a memfd too) is mapped.
    pub fn has_file(&self) -> bool {
        self.inode != 0
    }
}

macro_rules! vm_flags {
    ($($(#[$doc:meta])* $name:ident = $code:literal;)*) => {
        /// The `VmFlags:` of a mapping that matter to whoever makes the same mapping again.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct VmFlags {
            $($(#[$doc])* pub $name: bool,)*
        }

        impl VmFlags {
            fn set(&mut self, code: &[u8]) {
                match code {
                    $($code => self.$name = true,)*
                    // Permissions are in the line of `maps`; the rest follows from the file and the architecture.
                    _ => {}
                }
            }
        }
    };
}

vm_flags! {
    /// `mw`: `mprotect` may make it writable. On a shared mapping: the file was open for writing.
    may_write = b"mw";
    /// `mr`: `mprotect` may make it readable.
    may_read = b"mr";
    /// `me`: `mprotect` may make it executable.
    may_execute = b"me";
    /// `lo`: locked into memory (`mlock`, `MAP_LOCKED`).
    locked = b"lo";
    /// `lf`: locked as it is touched (`MLOCK_ONFAULT`).
    locked_on_fault = b"lf";
    /// `dc`: not inherited by children (`MADV_DONTFORK`).
    dont_fork = b"dc";
    /// `wf`: empty in children (`MADV_WIPEONFORK`).
    wipe_on_fork = b"wf";
    /// `dd`: left out of core dumps (`MADV_DONTDUMP`).
    dont_dump = b"dd";
    /// `hg`: huge pages wanted (`MADV_HUGEPAGE`).
    huge_page = b"hg";
    /// `nh`: huge pages not wanted (`MADV_NOHUGEPAGE`).
    no_huge_page = b"nh";
    /// `sr`: read in order (`MADV_SEQUENTIAL`).
    sequential = b"sr";
    /// `rr`: read in no order (`MADV_RANDOM`).
    random = b"rr";
    /// `mg`: may be merged with equal pages (`MADV_MERGEABLE`).
    mergeable = b"mg";
    /// `nr`: swap space not reserved (`MAP_NORESERVE`).
    no_reserve = b"nr";
    /// `sf`: `MAP_SYNC` of a DAX file.
    sync = b"sf";
    /// `sl`: sealed (`mseal`): can be neither replaced nor unmapped.
    sealed = b"sl";
    /// `um`: userfaultfd waits for missing pages.
    uffd_missing = b"um";
    /// `uw`: userfaultfd waits for writes.
    uffd_write = b"uw";
    /// `ui`: userfaultfd waits for minor faults.
    uffd_minor = b"ui";
    /// `ht`: huge pages of hugetlbfs.
    hugetlb = b"ht";
    /// `io`: memory of a device.
    io = b"io";
    /// `pf`: pages without a struct page.
    pfn_map = b"pf";
    /// `de`: `mremap` may not make it longer.
    dont_expand = b"de";
    /// `gd`: grows downwards, as stacks do.
    grows_down = b"gd";
    /// `sd`: soft-dirty tracking has seen a write.
    soft_dirty = b"sd";
}

impl VmFlags {
    /// Whether a userfaultfd is registered for it.
    pub fn has_userfaultfd(&self) -> bool {
        self.uffd_missing || self.uffd_write || self.uffd_minor
    }
}

/// A mapping as `smaps` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmapsEntry {
    /// The line as in `maps`.
    pub map: MapEntry,
    /// Its flags.
    pub flags: VmFlags,
    /// `ProtectionKey:`, 0 where there is none.
    pub protection_key: u32,
}

/// Parses the text of `maps`.
///
/// # Errors
/// The first byte that is not as `show_map_vma` writes it.
pub fn parse(text: &[u8]) -> Result<Vec<MapEntry>, ParseError> {
    let mut at = Cursor::new(text);
    let mut entries = Vec::new();
    while !at.is_empty() {
        entries.push(entry(&mut at.line_cursor())?);
    }
    Ok(entries)
}

/// Parses the text of `smaps`.
///
/// # Errors
/// The first byte that is not as `show_smap` writes it.
pub fn parse_smaps(text: &[u8]) -> Result<Vec<SmapsEntry>, ParseError> {
    let mut at = Cursor::new(text);
    let mut entries: Vec<SmapsEntry> = Vec::new();
    while !at.is_empty() {
        let mut line = at.line_cursor();
        // Addresses are lower-case hexadecimal; every key starts with a capital letter.
        if line
            .peek()
            .is_some_and(|b| b.is_ascii_digit() || b.is_ascii_lowercase())
        {
            entries.push(SmapsEntry {
                map: entry(&mut line)?,
                flags: VmFlags::default(),
                protection_key: 0,
            });
            continue;
        }
        let place = line.error("a mapping before its properties");
        let current = entries.last_mut().ok_or(place)?;
        if line.try_literal(b"VmFlags:") {
            line.blanks();
            while !line.is_empty() {
                current.flags.set(line.word("a flag of two letters")?);
                line.blanks();
            }
        } else if line.try_literal(b"ProtectionKey:") {
            line.blanks();
            current.protection_key = line.decimal_u32("a protection key")?;
        } else {
            line.until(b':', "a property")?;
        }
    }
    Ok(entries)
}

fn entry(line: &mut Cursor<'_>) -> Result<MapEntry, ParseError> {
    let place = line.error("a range of addresses");
    let start = line.hex("the start of a mapping")?;
    line.literal(b"-", "a hyphen")?;
    let end = line.hex("the end of a mapping")?;
    if end <= start {
        return Err(place);
    }
    line.literal(b" ", "a space")?;
    let place = line.error("four letters of permissions");
    let (protection, is_shared) = match line.word("four letters of permissions")? {
        [
            r @ (b'r' | b'-'),
            w @ (b'w' | b'-'),
            x @ (b'x' | b'-'),
            s @ (b's' | b'p'),
        ] => (
            Protection {
                read: *r == b'r',
                write: *w == b'w',
                execute: *x == b'x',
            },
            *s == b's',
        ),
        _ => return Err(place),
    };
    line.literal(b" ", "a space")?;
    let offset = line.hex("an offset")?;
    line.literal(b" ", "a space")?;
    let major = hex_u32(line)?;
    line.literal(b":", "a colon")?;
    let minor = hex_u32(line)?;
    line.literal(b" ", "a space")?;
    let inode = line.decimal("an inode number")?;
    line.blanks();
    let name = line.rest().to_owned();
    Ok(MapEntry {
        start,
        end,
        protection,
        is_shared,
        offset,
        device: Device { major, minor },
        inode,
        name,
    })
}

fn hex_u32(line: &mut Cursor<'_>) -> Result<u32, ParseError> {
    let place = line.error("a device number");
    u32::try_from(line.hex("a device number")?).map_err(|_| place)
}

/// `/proc/<pid>/maps`. Exact only while the process is stopped: the kernel hands it out a page at a time.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process.
pub fn of_process(pid: Pid) -> Result<Vec<MapEntry>, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    parse(&super::read(&path)?).map_err(|e| ProcError::parse(&path, e))
}

/// `/proc/<pid>/smaps`. Takes time in proportion to the resident memory, because the kernel counts pages for it.
///
/// # Errors
/// [`ProcError::Gone`] when there is no such process.
pub fn smaps_of_process(pid: Pid) -> Result<Vec<SmapsEntry>, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/smaps"));
    parse_smaps(&super::read(&path)?).map_err(|e| ProcError::parse(&path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bytes_to_the_end_of_the_line() {
        let text = b"7fc43c24a000-7fc43c24b000 rw-s 00001000 fe:1f 30792                      /a b\xff\\012c (deleted)\n\
            7ffe96c00000-7ffe96c21000 rw-p 00000000 00:00 0                          [stack]\n\
            7ffe96c30000-7ffe96c31000 ---p 00000000 00:00 0 \n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let maps = parse(text).unwrap();
        assert_eq!(maps[0].name, b"/a b\xff\\012c (deleted)");
        assert_eq!(
            maps[0].device,
            Device {
                major: 0xfe,
                minor: 0x1f
            }
        );
        assert!(maps[0].is_shared && maps[0].has_file() && maps[0].offset == 4096);
        assert_eq!(maps[1].name, b"[stack]");
        assert_eq!(maps[2].name, b"");
        assert_eq!(maps[2].protection.bits(), libc::PROT_NONE);
        assert_eq!(maps[3].end, 0xffff_ffff_ff60_1000);
        assert_eq!(maps[3].protection.bits(), libc::PROT_EXEC);
    }

    #[test]
    fn smaps_flags_belong_to_the_mapping_above() {
        let text = b"1000-2000 rw-p 00000000 00:00 0 \nSize:                  4 kB\nTHPeligible:           0\nProtectionKey:         3\n\
            VmFlags: rd wr mr mw me ac lo lf wf dd sl zz \n\
            2000-3000 r--s 00000000 fe:00 7 /x\nVmFlags: rd sh ms \n";
        let smaps = parse_smaps(text).unwrap();
        assert_eq!(smaps[0].protection_key, 3);
        let flags = smaps[0].flags;
        assert!(
            flags.locked
                && flags.locked_on_fault
                && flags.wipe_on_fork
                && flags.dont_dump
                && flags.sealed
                && flags.may_write
        );
        assert!(!flags.dont_fork && !flags.has_userfaultfd());
        assert!(!smaps[1].flags.may_write && smaps[1].protection_key == 0);
    }

    #[test]
    fn errors_have_places() {
        assert_eq!(
            parse(b"1000-1000 rw-p 0 0:0 0\n"),
            Err(ParseError::new(0, "a range of addresses"))
        );
        assert_eq!(
            parse(b"1000-2000 rwxz 0 0:0 0"),
            Err(ParseError::new(10, "four letters of permissions"))
        );
        assert_eq!(
            parse_smaps(b"Size: 4 kB\n"),
            Err(ParseError::new(0, "a mapping before its properties"))
        );
        assert_eq!(
            parse_smaps(b"1000-2000 rw-p 0 0:0 0\n\n"),
            Err(ParseError::new(23, "a property"))
        );
    }

    #[test]
    fn our_own_maps_and_smaps_agree() {
        let own = Pid::own();
        let program = std::env::current_exe().unwrap();
        let name = std::os::unix::ffi::OsStrExt::as_bytes(program.as_os_str());
        assert!(
            of_process(own)
                .unwrap()
                .iter()
                .any(|m| m.name == name && m.protection.execute)
        );
        assert!(
            smaps_of_process(own)
                .unwrap()
                .iter()
                .any(|m| m.map.name == name && m.flags.may_read)
        );
    }
}
