//! Every operation decodes to what was encoded, no prefix of it passes for the whole, and no bytes make the decoder panic.

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

const PLAIN: Protocol = Protocol {
    minor: 45,
    features: Features::empty(),
};
const FULL: Protocol = Protocol {
    minor: 45,
    features: Features::MIRROR,
};

/// A request as the kernel lays it out.
fn request(opcode: u32, body: &[&[u8]], extensions: &[u8]) -> Vec<u8> {
    assert_eq!(extensions.len() % 8, 0);
    let body = body.concat();
    let header = abi::InHeader {
        len: (40 + body.len() + extensions.len()) as u32,
        opcode,
        unique: 42,
        nodeid: 7,
        uid: 1000,
        gid: 100,
        pid: 4242,
        total_extlen: (extensions.len() / 8) as u16,
        padding: 0,
    };
    [header.as_bytes(), &body, extensions].concat()
}

fn op(opcode: Opcode, body: &[&[u8]]) -> Vec<u8> {
    request(opcode as u32, body, &[])
}

/// One well-formed request of every opcode, with what it means.
fn samples() -> Vec<(Vec<u8>, Op<'static>)> {
    let fh = 0xdead_beef_0000_0001;
    let lk = abi::LkIn {
        fh,
        owner: 99,
        lk: abi::RawFileLock {
            start: 10,
            end: 20,
            kind: libc::F_WRLCK as u32,
            pid: 77,
        },
        lk_flags: abi::LK_FLOCK,
        padding: 0,
    };
    let lock_op = LockOp {
        fh: Fh(fh),
        owner: LockOwner(99),
        lock: FileLock {
            start: 10,
            end: 20,
            kind: LockKind::Write,
            pid: 77,
        },
        flock: true,
    };
    let read = abi::ReadIn {
        fh,
        offset: 1 << 40,
        size: 4096,
        read_flags: 2,
        lock_owner: 5,
        flags: 0o2,
        padding: 0,
    };
    let open = abi::OpenIn {
        flags: (OFlags::RDWR | OFlags::TRUNC).bits(),
        open_flags: 1,
    };
    let create = abi::CreateIn {
        flags: OFlags::WRONLY.bits(),
        mode: 0o100_640,
        umask: 0o27,
        open_flags: 1,
    };
    let release = abi::ReleaseIn {
        fh,
        flags: 1,
        release_flags: 2,
        lock_owner: 8,
    };
    let fsync = abi::FsyncIn {
        fh,
        fsync_flags: 1,
        padding: 0,
    };
    let copy = abi::CopyFileRangeIn {
        fh_in: 1,
        off_in: 2,
        nodeid_out: 3,
        fh_out: 4,
        off_out: 5,
        len: 1 << 35,
        flags: 0,
    };
    let copied = Op::CopyFileRange(CopyRange {
        source: Fh(1),
        source_offset: 2,
        target_node: NodeId(3),
        target: Fh(4),
        target_offset: 5,
        len: 1 << 35,
        flags: 0,
    });
    let xattr = abi::GetxattrIn {
        size: 64,
        padding: 0,
    };
    let umask = |umask| Creation {
        umask,
        ..Creation::default()
    };
    vec![
        (
            op(Opcode::Lookup, &[b"name\0"]),
            Op::Lookup { name: c"name" },
        ),
        (
            op(Opcode::Forget, &[&3u64.to_ne_bytes()]),
            Op::Forget { references: 3 },
        ),
        (
            op(Opcode::BatchForget, &[&[1, 0, 0, 0, 0, 0, 0, 0], &[9; 16]]),
            Op::BatchForget(Forgets(&[9; 16])),
        ),
        (
            op(
                Opcode::Getattr,
                &[abi::GetattrIn {
                    getattr_flags: 1,
                    dummy: 0,
                    fh,
                }
                .as_bytes()],
            ),
            Op::Getattr { fh: Some(Fh(fh)) },
        ),
        (
            op(
                Opcode::Statx,
                &[abi::StatxIn {
                    getattr_flags: 0,
                    reserved: 0,
                    fh,
                    sx_flags: 3,
                    sx_mask: 0x7ff,
                }
                .as_bytes()],
            ),
            Op::Statx {
                fh: None,
                flags: 3,
                mask: 0x7ff,
            },
        ),
        (
            op(
                Opcode::Setattr,
                &[abi::SetattrIn {
                    valid: fattr::SIZE | fattr::MTIME_NOW,
                    size: 5,
                    ..Default::default()
                }
                .as_bytes()],
            ),
            Op::Setattr(SetAttr {
                size: Some(5),
                mtime: Some(SetTime::Now),
                ..SetAttr::default()
            }),
        ),
        (op(Opcode::Readlink, &[]), Op::Readlink),
        (
            op(Opcode::Symlink, &[b"new\0", b"../to/there\0"]),
            Op::Symlink {
                name: c"new",
                target: c"../to/there",
                creation: umask(0),
            },
        ),
        (
            op(
                Opcode::Mknod,
                &[
                    abi::MknodIn {
                        mode: libc::S_IFBLK | 0o600,
                        rdev: 0x801,
                        umask: 0o22,
                        padding: 0,
                    }
                    .as_bytes(),
                    b"sda1\0",
                ],
            ),
            Op::Mknod {
                name: c"sda1",
                mode: libc::S_IFBLK | 0o600,
                rdev: 0x801,
                creation: umask(0o22),
            },
        ),
        (
            op(
                Opcode::Mkdir,
                &[
                    abi::MkdirIn {
                        mode: 0o755,
                        umask: 0o77,
                    }
                    .as_bytes(),
                    b"d\0",
                ],
            ),
            Op::Mkdir {
                name: c"d",
                mode: 0o755,
                creation: umask(0o77),
            },
        ),
        (
            op(Opcode::Unlink, &[b"gone\0"]),
            Op::Unlink { name: c"gone" },
        ),
        (op(Opcode::Rmdir, &[b"gone\0"]), Op::Rmdir { name: c"gone" }),
        (
            op(Opcode::Rename, &[&9u64.to_ne_bytes(), b"a\0b\0"]),
            Op::Rename {
                name: c"a",
                new_parent: NodeId(9),
                new_name: c"b",
                flags: RenameFlags::empty(),
            },
        ),
        (
            op(
                Opcode::Rename2,
                &[
                    abi::Rename2In {
                        newdir: 9,
                        flags: 1,
                        padding: 0,
                    }
                    .as_bytes(),
                    b"a\0b\0",
                ],
            ),
            Op::Rename {
                name: c"a",
                new_parent: NodeId(9),
                new_name: c"b",
                flags: RenameFlags::NOREPLACE,
            },
        ),
        (
            op(Opcode::Link, &[&11u64.to_ne_bytes(), b"b\0"]),
            Op::Link {
                source: NodeId(11),
                new_name: c"b",
            },
        ),
        (
            op(Opcode::Open, &[open.as_bytes()]),
            Op::Open {
                flags: OFlags::RDWR | OFlags::TRUNC,
                kill_suidgid: true,
            },
        ),
        (
            op(Opcode::Opendir, &[open.as_bytes()]),
            Op::Opendir {
                flags: OFlags::RDWR | OFlags::TRUNC,
            },
        ),
        (
            op(Opcode::Create, &[create.as_bytes(), b"f\0"]),
            Op::Create {
                name: c"f",
                flags: OFlags::WRONLY,
                mode: 0o100_640,
                kill_suidgid: true,
                creation: umask(0o27),
            },
        ),
        (
            op(Opcode::Tmpfile, &[create.as_bytes(), b"/\0"]),
            Op::Tmpfile {
                flags: OFlags::WRONLY,
                mode: 0o100_640,
                creation: umask(0o27),
            },
        ),
        (
            op(Opcode::Read, &[read.as_bytes()]),
            Op::Read {
                fh: Fh(fh),
                offset: 1 << 40,
                size: 4096,
                flags: OFlags::RDWR,
                lock_owner: Some(LockOwner(5)),
            },
        ),
        (
            op(Opcode::Readdir, &[read.as_bytes()]),
            Op::Readdir {
                fh: Fh(fh),
                offset: 1 << 40,
                size: 4096,
            },
        ),
        (
            op(Opcode::Readdirplus, &[read.as_bytes()]),
            Op::Readdirplus {
                fh: Fh(fh),
                offset: 1 << 40,
                size: 4096,
            },
        ),
        (
            op(
                Opcode::Write,
                &[
                    abi::WriteIn {
                        fh,
                        offset: 3,
                        size: 5,
                        write_flags: 4,
                        lock_owner: 0,
                        flags: 1,
                        padding: 0,
                    }
                    .as_bytes(),
                    b"hello",
                ],
            ),
            Op::Write {
                fh: Fh(fh),
                offset: 3,
                data: b"hello",
                flags: OFlags::WRONLY,
                lock_owner: None,
                from_cache: false,
                kill_suidgid: true,
            },
        ),
        (op(Opcode::Statfs, &[]), Op::Statfs),
        (
            op(Opcode::Release, &[release.as_bytes()]),
            Op::Release {
                fh: Fh(fh),
                flags: OFlags::WRONLY,
                lock_owner: LockOwner(8),
                flush: false,
                flock_unlock: true,
            },
        ),
        (
            op(Opcode::Releasedir, &[release.as_bytes()]),
            Op::Releasedir {
                fh: Fh(fh),
                flags: OFlags::WRONLY,
            },
        ),
        (
            op(Opcode::Fsync, &[fsync.as_bytes()]),
            Op::Fsync {
                fh: Fh(fh),
                datasync: true,
            },
        ),
        (
            op(Opcode::Fsyncdir, &[fsync.as_bytes()]),
            Op::Fsyncdir {
                fh: Fh(fh),
                datasync: true,
            },
        ),
        (
            op(
                Opcode::Setxattr,
                &[
                    abi::SetxattrIn { size: 3, flags: 1 }.as_bytes(),
                    b"user.a/b\0",
                    b"val",
                ],
            ),
            Op::Setxattr {
                name: c"user.a/b",
                value: b"val",
                flags: XattrFlags::CREATE,
                acl_kill_sgid: false,
            },
        ),
        (
            op(Opcode::Getxattr, &[xattr.as_bytes(), b"user.x\0"]),
            Op::Getxattr {
                name: c"user.x",
                size: 64,
            },
        ),
        (
            op(Opcode::Listxattr, &[xattr.as_bytes()]),
            Op::Listxattr { size: 64 },
        ),
        (
            op(Opcode::Removexattr, &[b"user.x\0"]),
            Op::Removexattr { name: c"user.x" },
        ),
        (
            op(
                Opcode::Flush,
                &[abi::FlushIn {
                    fh,
                    unused: 0,
                    padding: 0,
                    lock_owner: 4,
                }
                .as_bytes()],
            ),
            Op::Flush {
                fh: Fh(fh),
                lock_owner: LockOwner(4),
            },
        ),
        (
            op(
                Opcode::Init,
                &[abi::InitIn {
                    major: 7,
                    minor: 12,
                    max_readahead: 1,
                    flags: 1,
                }
                .as_bytes()],
            ),
            Op::Init {
                major: 7,
                minor: 12,
                max_readahead: 1,
                offered: Features::ASYNC_READ,
            },
        ),
        (op(Opcode::Getlk, &[lk.as_bytes()]), Op::Getlk(lock_op)),
        (op(Opcode::Setlk, &[lk.as_bytes()]), Op::Setlk(lock_op)),
        (op(Opcode::Setlkw, &[lk.as_bytes()]), Op::Setlkw(lock_op)),
        (
            op(
                Opcode::Access,
                &[abi::AccessIn {
                    mask: 4,
                    padding: 0,
                }
                .as_bytes()],
            ),
            Op::Access {
                mask: Access::READ_OK,
            },
        ),
        (
            op(Opcode::Interrupt, &[&88u64.to_ne_bytes()]),
            Op::Interrupt { target: Unique(88) },
        ),
        (
            op(
                Opcode::Bmap,
                &[abi::BmapIn {
                    block: 6,
                    blocksize: 512,
                    padding: 0,
                }
                .as_bytes()],
            ),
            Op::Bmap {
                block: 6,
                block_size: 512,
            },
        ),
        (op(Opcode::Destroy, &[]), Op::Destroy),
        (
            op(
                Opcode::Ioctl,
                &[
                    abi::IoctlIn {
                        fh,
                        flags: 16,
                        cmd: 0x8004_6601,
                        arg: 5,
                        in_size: 4,
                        out_size: 8,
                    }
                    .as_bytes(),
                    &[1, 2, 3, 4],
                ],
            ),
            Op::Ioctl {
                fh: Fh(fh),
                command: 0x8004_6601,
                argument: 5,
                data: &[1, 2, 3, 4],
                out_size: 8,
                directory: true,
                compat: false,
            },
        ),
        (
            op(
                Opcode::Poll,
                &[abi::PollIn {
                    fh,
                    kh: 2,
                    flags: 1,
                    events: 3,
                }
                .as_bytes()],
            ),
            Op::Poll {
                fh: Fh(fh),
                wakeup: 2,
                schedule_notify: true,
                events: 3,
            },
        ),
        (
            op(
                Opcode::NotifyReply,
                &[
                    abi::NotifyRetrieveIn {
                        offset: 9,
                        size: 2,
                        ..Default::default()
                    }
                    .as_bytes(),
                    b"xy",
                ],
            ),
            Op::NotifyReply {
                offset: 9,
                data: b"xy",
            },
        ),
        (
            op(
                Opcode::Fallocate,
                &[abi::FallocateIn {
                    fh,
                    offset: 1,
                    length: 2,
                    mode: 1,
                    padding: 0,
                }
                .as_bytes()],
            ),
            Op::Fallocate {
                fh: Fh(fh),
                offset: 1,
                length: 2,
                mode: FallocateFlags::KEEP_SIZE,
            },
        ),
        (
            op(
                Opcode::Lseek,
                &[abi::LseekIn {
                    fh,
                    offset: 1,
                    whence: 4,
                    padding: 0,
                }
                .as_bytes()],
            ),
            Op::Lseek {
                fh: Fh(fh),
                offset: 1,
                whence: Whence::Hole,
            },
        ),
        (op(Opcode::CopyFileRange, &[copy.as_bytes()]), copied),
        (op(Opcode::CopyFileRange64, &[copy.as_bytes()]), copied),
        (
            op(
                Opcode::Setupmapping,
                &[abi::SetupmappingIn {
                    fh,
                    foffset: 1,
                    len: 2,
                    flags: 1,
                    moffset: 3,
                }
                .as_bytes()],
            ),
            Op::Setupmapping {
                fh: Fh(fh),
                file_offset: 1,
                len: 2,
                write: true,
                read: false,
                window_offset: 3,
            },
        ),
        (
            op(Opcode::Removemapping, &[&1u32.to_ne_bytes(), &[5; 16]]),
            Op::Removemapping(Mappings(&[5; 16])),
        ),
        (op(Opcode::Syncfs, &[&[0; 8]]), Op::Syncfs),
        (
            request(54, &[b"newer"], &[]),
            Op::Unknown {
                opcode: 54,
                body: b"newer",
            },
        ),
    ]
}

#[test]
fn every_opcode_decodes_to_what_was_encoded() {
    let samples = samples();
    for (bytes, expected) in &samples {
        assert_eq!(decode(bytes, PLAIN).as_ref(), Ok(expected));
    }
    let covered: std::collections::HashSet<_> = samples
        .iter()
        .filter_map(|(bytes, _)| header(bytes).unwrap().opcode())
        .collect();
    for &opcode in Opcode::ALL {
        assert!(covered.contains(&opcode), "{opcode} has no sample");
    }
}

#[test]
fn the_header_is_read_whole() {
    let header = header(&op(Opcode::Statfs, &[])).unwrap();
    assert_eq!(header.opcode(), Some(Opcode::Statfs));
    assert_eq!((header.unique, header.node), (Unique(42), NodeId(7)));
    assert_eq!(
        header.caller,
        Caller {
            uid: 1000,
            gid: 100,
            tid: Tid(4242)
        }
    );
}

#[test]
fn no_prefix_of_a_request_passes_for_the_whole() {
    for (bytes, expected) in samples() {
        for len in 0..bytes.len() {
            let mut cut = bytes[..len].to_vec();
            assert!(
                decode(&cut, PLAIN).is_err(),
                "a header that claims more than there is was accepted"
            );
            if len >= 40 {
                cut[..4].copy_from_slice(&(len as u32).to_ne_bytes());
                if let Ok(found) = decode(&cut, PLAIN) {
                    let unknown = matches!(expected, Op::Unknown { .. });
                    assert!(unknown, "{expected:?} cut to {len} became {found:?}");
                }
            }
        }
    }
}

#[test]
fn errors_say_what_is_wrong_and_where() {
    let error = |bytes: &[u8]| decode(bytes, PLAIN).unwrap_err().to_string();
    assert_eq!(
        error(&[0; 39]),
        "a request of 39 bytes has no complete header (40 bytes)"
    );
    let mut long = op(Opcode::Statfs, &[]);
    long.push(0);
    assert_eq!(error(&long), "the header claims 40 bytes but 41 were read");
    assert_eq!(
        error(&op(Opcode::Rename2, &[&[0; 16], b"a\0b"])),
        "rename2: new name at offset 18 has no terminating NUL"
    );
    assert_eq!(
        error(&op(Opcode::Unlink, &[b"a/b\0"])),
        "unlink: name at offset 0 is empty or contains a slash"
    );
    assert_eq!(
        error(&op(Opcode::Unlink, &[b"\0"])),
        "unlink: name at offset 0 is empty or contains a slash"
    );
    assert_eq!(
        error(&op(
            Opcode::Write,
            &[
                abi::WriteIn {
                    size: 6,
                    ..Default::default()
                }
                .as_bytes(),
                b"hello"
            ]
        )),
        "write: data needs 6 bytes at offset 40 but 5 are left"
    );
    assert_eq!(
        error(&op(
            Opcode::Lseek,
            &[abi::LseekIn {
                whence: 5,
                ..Default::default()
            }
            .as_bytes()]
        )),
        "lseek: whence has the impossible value 0x5"
    );
    assert_eq!(
        error(&op(Opcode::Setlk, &[&[0xff; 48]])),
        "setlk: lock type has the impossible value 0xffffffff"
    );
    assert_eq!(
        error(&op(Opcode::BatchForget, &[&[0xff; 8]])),
        format!(
            "batch_forget: fuse_forget_one needs {} bytes at offset 8 but 0 are left",
            u64::from(u32::MAX) * 16
        )
    );
    let extension = |bytes: &[u8]| error(&request(Opcode::Mkdir as u32, &[&[0; 8], b"d\0"], bytes));
    assert_eq!(
        extension(&[4, 0, 0, 0, 32, 0, 0, 0]),
        "mkdir: extension at offset 0 of the extension area: it claims to be shorter than its header"
    );
    assert_eq!(
        extension(&[16, 0, 0, 0, 32, 0, 0, 0]),
        "mkdir: extension at offset 0 of the extension area: it reaches beyond the end of the area"
    );
    assert_eq!(
        extension(&[16, 0, 0, 0, 32, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]),
        "mkdir: extension at offset 0 of the extension area: fewer supplementary groups than it claims"
    );
}

#[test]
fn setxattr_has_two_forms() {
    let short = abi::SetxattrIn { size: 3, flags: 2 };
    let long = abi::SetxattrInExt {
        setxattr_flags: 1,
        padding: 0,
    };
    let name: &[u8] = b"system.posix_acl_access\0";
    let expected = |acl_kill_sgid| Op::Setxattr {
        name: c"system.posix_acl_access",
        value: b"acl",
        flags: XattrFlags::REPLACE,
        acl_kill_sgid,
    };
    let bytes = op(Opcode::Setxattr, &[short.as_bytes(), name, b"acl"]);
    assert_eq!(decode(&bytes, PLAIN), Ok(expected(false)));
    let bytes = op(
        Opcode::Setxattr,
        &[short.as_bytes(), long.as_bytes(), name, b"acl"],
    );
    assert_eq!(decode(&bytes, FULL), Ok(expected(true)));
}

#[test]
fn init_has_a_second_word_of_flags() {
    let short = abi::InitIn {
        major: 7,
        minor: 45,
        max_readahead: 131_072,
        flags: (Features::INIT_EXT.bits()) as u32,
    };
    let long = abi::InitInExt {
        flags2: (Features::PASSTHROUGH.bits() >> 32) as u32,
        unused: [0; 11],
    };
    let bytes = op(Opcode::Init, &[short.as_bytes(), long.as_bytes()]);
    let offered = Features::INIT_EXT | Features::PASSTHROUGH;
    assert_eq!(
        decode(&bytes, PLAIN),
        Ok(Op::Init {
            major: 7,
            minor: 45,
            max_readahead: 131_072,
            offered
        })
    );
}

fn groups_extension(groups: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let size = 12 + 4 * groups.len();
    bytes.extend_from_slice(
        abi::ExtHeader {
            size: size as u32,
            kind: abi::EXT_GROUPS,
        }
        .as_bytes(),
    );
    bytes.extend_from_slice(&(groups.len() as u32).to_ne_bytes());
    groups
        .iter()
        .for_each(|group| bytes.extend_from_slice(&group.to_ne_bytes()));
    bytes.resize(abi::rec_align(bytes.len()), 0);
    bytes
}

fn security_extension(contexts: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in contexts {
        body.extend_from_slice(
            abi::Secctx {
                size: value.len() as u32,
                padding: 0,
            }
            .as_bytes(),
        );
        body.extend_from_slice(name.as_bytes());
        body.push(0);
        body.extend_from_slice(value);
        body.resize(abi::rec_align(body.len()), 0);
    }
    let header = abi::ExtHeader {
        size: (8 + body.len()) as u32,
        kind: contexts.len() as u32,
    };
    [header.as_bytes(), &body].concat()
}

proptest! {
    #[test]
    fn extensions_are_read_in_any_order_and_unknown_ones_skipped(
        groups in proptest::collection::vec(any::<u32>(), 0..5),
        contexts in proptest::collection::vec(("[a-z.]{1,20}", proptest::collection::vec(any::<u8>(), 0..40)), 1..4),
        groups_first: bool,
        unknown: bool,
    ) {
        let groups_bytes = groups_extension(&groups);
        let security = security_extension(&contexts);
        let strange: &[u8] = if unknown { &[16, 0, 0, 0, 200, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8] } else { &[] };
        let parts = if groups_first { [&groups_bytes, strange, &security] } else { [&security, strange, &groups_bytes] };
        let bytes = request(Opcode::Mkdir as u32, &[&[0; 8], b"d\0"], &parts.concat());
        let Op::Mkdir { creation, .. } = decode(&bytes, FULL).unwrap() else { panic!("not mkdir") };
        prop_assert_eq!(creation.groups.iter().collect::<Vec<_>>(), groups);
        let found: Vec<_> =
            creation.security.iter().map(|(n, v)| (n.to_str().unwrap().to_owned(), v.to_vec())).collect();
        prop_assert_eq!(found, contexts);
    }

    #[test]
    fn setattr_takes_exactly_what_its_mask_names(valid in 0u32..1 << 12, fill: u8) {
        let mut raw = abi::SetattrIn::default();
        raw.as_mut_bytes().fill(fill);
        raw.valid = valid;
        let bytes = op(Opcode::Setattr, &[raw.as_bytes()]);
        let Op::Setattr(set) = decode(&bytes, FULL).unwrap() else { panic!("not setattr") };
        let has = |bit| valid & bit != 0;
        let at = |secs: u64, nanos| SetTime::At(Timestamp { secs: secs as i64, nanos });
        prop_assert_eq!(set.fh, has(fattr::FH).then_some(Fh(raw.fh)));
        prop_assert_eq!(set.mode, has(fattr::MODE).then_some(raw.mode));
        prop_assert_eq!(set.uid, has(fattr::UID).then_some(raw.uid));
        prop_assert_eq!(set.gid, has(fattr::GID).then_some(raw.gid));
        prop_assert_eq!(set.size, has(fattr::SIZE).then_some(raw.size));
        prop_assert_eq!(set.lock_owner, has(fattr::LOCKOWNER).then_some(LockOwner(raw.lock_owner)));
        prop_assert_eq!(set.kill_suidgid, has(fattr::KILL_SUIDGID));
        prop_assert_eq!(set.ctime.is_some(), has(fattr::CTIME));
        let expected = if has(fattr::ATIME_NOW) { Some(SetTime::Now) } else { has(fattr::ATIME).then_some(at(raw.atime, raw.atimensec)) };
        prop_assert_eq!(set.atime, expected);
        let expected = if has(fattr::MTIME_NOW) { Some(SetTime::Now) } else { has(fattr::MTIME).then_some(at(raw.mtime, raw.mtimensec)) };
        prop_assert_eq!(set.mtime, expected);
    }

    #[test]
    fn writes_carry_their_data_and_flags(
        data in proptest::collection::vec(any::<u8>(), 0..5000),
        offset: u64,
        write_flags in 0u32..8,
        lock_owner: u64,
    ) {
        let raw = abi::WriteIn { fh: 1, offset, size: data.len() as u32, write_flags, lock_owner, flags: 0, padding: 0 };
        let bytes = op(Opcode::Write, &[raw.as_bytes(), &data]);
        let expected = Op::Write {
            fh: Fh(1),
            offset,
            data: &data,
            flags: OFlags::empty(),
            from_cache: write_flags & 1 != 0,
            lock_owner: (write_flags & 2 != 0).then_some(LockOwner(lock_owner)),
            kill_suidgid: write_flags & 4 != 0,
        };
        prop_assert_eq!(decode(&bytes, FULL), Ok(expected));
    }

    #[test]
    fn forgets_are_all_seen(forgets in proptest::collection::vec(any::<(u64, u64)>(), 0..100)) {
        let mut body = abi::BatchForgetIn { count: forgets.len() as u32, dummy: 0 }.as_bytes().to_vec();
        for &(nodeid, nlookup) in &forgets {
            body.extend_from_slice(abi::ForgetOne { nodeid, nlookup }.as_bytes());
        }
        let bytes = op(Opcode::BatchForget, &[&body]);
        let Op::BatchForget(found) = decode(&bytes, FULL).unwrap() else { panic!("not batch_forget") };
        prop_assert_eq!(found.iter().map(|(node, n)| (node.0, n)).collect::<Vec<_>>(), forgets);
    }

    #[test]
    fn no_bytes_make_it_panic(
        opcode in prop_oneof![0u32..60, any::<u32>()],
        extlen: u16,
        body in proptest::collection::vec(any::<u8>(), 0..300),
        full: bool,
    ) {
        let mut bytes = request(opcode, &[&body], &[]);
        if extlen & 1 != 0 {
            bytes[36..38].copy_from_slice(&(extlen % 64).to_ne_bytes());
        }
        walk(decode(&bytes, if full { FULL } else { PLAIN }));
        walk(decode(&body, FULL));
    }
}

/// Visits everything lazy.
fn walk(decoded: Result<Op<'_>, DecodeError>) {
    match decoded {
        Ok(Op::BatchForget(forgets)) => {
            forgets.iter().count();
        }
        Ok(Op::Removemapping(mappings)) => {
            mappings.iter().count();
        }
        Ok(
            Op::Mkdir { creation, .. }
            | Op::Mknod { creation, .. }
            | Op::Create { creation, .. }
            | Op::Symlink { creation, .. }
            | Op::Tmpfile { creation, .. },
        ) => {
            creation.groups.iter().count();
            creation.security.iter().count();
        }
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
