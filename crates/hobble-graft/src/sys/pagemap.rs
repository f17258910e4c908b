//! The PAGEMAP_SCAN ioctl of `/proc/<pid>/pagemap` (Linux 6.7, include/uapi/linux/fs.h).

use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_GUARD: u64 = 1 << 8;

/// `struct page_region`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    categories: u64,
}

impl Region {
    pub(crate) fn is_guard(&self) -> bool {
        self.categories & PAGE_IS_GUARD != 0
    }
}

/// `struct pm_scan_arg`.
#[derive(Default)]
#[repr(C)]
struct Argument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)` in the encoding that x86 and arm64 share.
const PAGEMAP_SCAN: libc::Ioctl =
    (3 << 30) | ((size_of::<Argument>() as libc::Ioctl) << 16) | ((b'f' as libc::Ioctl) << 8) | 16;

/// Regions between `start` and `end` that are in memory or swap and not the file's, as many as fit, and the address up to which the
/// walk has come. `ENOTTY` on kernels that do not know the ioctl.
pub(crate) fn scan_own_pages<'a>(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    regions: &'a mut [Region],
) -> Result<(&'a [Region], u64), Errno> {
    // Guard regions carry a category of their own from 6.15 on; kernels before it refuse to be asked for it.
    for guard in [PAGE_IS_GUARD, 0] {
        let mut argument = Argument {
            size: size_of::<Argument>() as u64,
            start,
            end,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: regions.len() as u64,
            category_inverted: PAGE_IS_FILE,
            category_mask: PAGE_IS_FILE,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED | guard,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED | guard,
            ..Argument::default()
        };
        // SAFETY: `argument` is a pm_scan_arg of the size it states, and `vec` points to `vec_len` page_regions; both are ours and
        // outlive the call.
        let result = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        if let Ok(count) = usize::try_from(result) {
            return Ok((regions.get(..count).unwrap_or_default(), argument.walk_end));
        }
        match Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO) {
            Errno::INVAL if guard != 0 => {}
            errno => return Err(errno),
        }
    }
    Err(Errno::INVAL)
}
