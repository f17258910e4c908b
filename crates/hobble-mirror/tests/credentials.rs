//! Operations are the caller's: ownership, set-id bits, ACLs, what is reserved for root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Output};

use hobble_mirror::Caching;
use hobble_testkit::namespace::Namespace;
use hobble_testkit::volume::{Kind, Volume};
use support::{Hook, Options, with};

/// Runs a shell script as somebody: uid, gid and supplementary groups.
fn run_as(uid: u32, gid: u32, groups: &str, directory: &Path, script: &str) -> Output {
    let groups = if groups.is_empty() {
        "--clear-groups".to_owned()
    } else {
        format!("--groups={groups}")
    };
    Command::new("setpriv")
        .args([
            &format!("--reuid={uid}"),
            &format!("--regid={gid}"),
            &groups,
            "--",
            "sh",
            "-c",
            script,
        ])
        .current_dir(directory)
        .output()
        .unwrap()
}

fn ok(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn both(body: impl Fn(&Hook)) {
    // Directories are prepared behind the hook: nothing may be cached.
    let fresh = |options: Options| Options {
        caching: Caching::NONE,
        ..options
    };
    with(Kind::Ext4, fresh(Options::default()), &body);
    with(Kind::Ext4, fresh(Options::without_passthrough()), &body);
    with(Kind::Xfs, fresh(Options::default()), |hook| {
        // Every operation through the server.
        hook.inject(&["errno=EIO op=read,write percent=0"]);
        body(hook);
    });
}

/// The same script natively and on the hook, in directories prepared alike, must show the same.
fn compare(
    hook: &Hook,
    prepare: impl Fn(&Path),
    uid: u32,
    gid: u32,
    groups: &str,
    script: &str,
) -> String {
    let native = hook.behind("native");
    let hooked = hook.behind("hooked");
    for directory in [&native, &hooked] {
        let _ = fs::remove_dir_all(directory);
        fs::create_dir(directory).unwrap();
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
        prepare(directory);
    }
    let shown = hook.at("hooked");
    let expected = run_as(uid, gid, groups, &native, script);
    let found = run_as(uid, gid, groups, &shown, script);
    let said = |output: &Output| {
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    assert_eq!(said(&found), said(&expected), "{script}");
    said(&found).1
}

const LIST: &str = "stat -c '%n %f %u %g %s' * .";

#[test]
fn what_is_made_belongs_to_the_caller_and_has_its_umask() {
    both(|hook| {
        let script = format!("umask 027; echo x > f; mkdir d; ln -s f s; mkfifo p; ln f l; {LIST}");
        let shown = compare(hook, |_| {}, 1234, 2345, "", &script);
        assert!(shown.contains("f 81a0 1234 2345 2"), "{shown}");
    });
}

#[test]
fn a_setgid_directory_hands_down_its_group() {
    both(|hook| {
        let prepare = |directory: &Path| {
            chown(directory, Some(0), Some(5000)).unwrap();
            fs::set_permissions(directory, fs::Permissions::from_mode(0o2777)).unwrap();
        };
        // In the group, by a supplementary one, the new file keeps set-group-id; outside it does not (mode_strip_sgid, fs/inode.c).
        for groups in ["", "5000", "6000"] {
            let make = "import os\\nfd = os.open('x', os.O_CREAT | os.O_WRONLY, 0o2775)";
            compare(
                hook,
                prepare,
                1234,
                2345,
                groups,
                &format!("umask 0; mkdir d; echo x > f; printf \"{make}\" | python3; {LIST}"),
            );
        }
    });
}

#[test]
fn chmod_and_chown_by_group_members_are_as_natively() {
    both(|hook| {
        let prepare = |directory: &Path| {
            for name in ["a", "b"] {
                fs::write(directory.join(name), "x").unwrap();
                chown(directory.join(name), Some(1234), Some(5000)).unwrap();
            }
        };
        for groups in ["", "5000", "5000,6000"] {
            compare(
                hook,
                prepare,
                1234,
                2345,
                groups,
                &format!("chmod 2755 a; chgrp 6000 b; {LIST}"),
            );
        }
    });
}

#[test]
fn set_id_bits_go_when_somebody_else_writes_truncates_or_changes_the_owner() {
    both(|hook| {
        let prepare = |directory: &Path| {
            for name in ["write", "append", "truncate", "open", "allocate", "group"] {
                fs::write(directory.join(name), "content").unwrap();
                chown(directory.join(name), Some(1234), Some(2345)).unwrap();
                fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o6777))
                    .unwrap();
            }
        };
        let script = format!(
            "printf X | dd of=write conv=notrunc 2>/dev/null; echo y >> append; truncate -s 3 truncate; : > open; fallocate -l 100 allocate; chgrp 2345 group; {LIST}"
        );
        let shown = compare(hook, prepare, 1234, 2345, "", &script);
        assert!(
            !shown.lines().any(|line| line.contains(" 8dff ")),
            "{shown}"
        );
        compare(hook, prepare, 4321, 4321, "", &script);
    });
    // Through the server root keeps them, as natively. (In passthrough the kernel writes with credentials that clear them: see the crate's documentation.)
    with(
        Kind::Ext4,
        Options {
            caching: Caching::NONE,
            ..Options::without_passthrough()
        },
        |hook| {
            let prepare = |directory: &Path| {
                fs::write(directory.join("f"), "content").unwrap();
                fs::set_permissions(directory.join("f"), fs::Permissions::from_mode(0o6777))
                    .unwrap();
            };
            let shown = compare(
                hook,
                prepare,
                0,
                0,
                "",
                &format!("printf X | dd of=f conv=notrunc 2>/dev/null; truncate -s 3 f; {LIST}"),
            );
            assert!(shown.contains("f 8dff"), "{shown}");
        },
    );
}

#[test]
fn default_acls_are_inherited_and_enforced() {
    both(|hook| {
        let prepare = |directory: &Path| {
            ok(&Command::new("setfacl")
                .args(["-m", "u:7777:rwx,d:u:7777:rwx,d:g::r-x,d:o::---"])
                .arg(directory)
                .output()
                .unwrap());
        };
        let acl = "getfacl -n --omit-header * 2>/dev/null";
        compare(
            hook,
            prepare,
            1234,
            2345,
            "",
            &format!("umask 077; echo x > f; mkdir d; mkfifo p; {LIST}; {acl}"),
        );
        let allowed = run_as(7777, 7777, "", &hook.at("hooked"), "cat f; echo more >> f");
        ok(&allowed);
        let refused = run_as(8888, 8888, "", &hook.at("hooked"), "cat f");
        assert!(!refused.status.success());
    });
}

#[test]
fn trusted_attributes_are_for_root() {
    both(|hook| {
        let prepare = |directory: &Path| {
            fs::write(directory.join("f"), "x").unwrap();
            chown(directory.join("f"), Some(1234), Some(1234)).unwrap();
            ok(&Command::new("setfattr")
                .args(["-n", "trusted.t", "-v", "1"])
                .arg(directory.join("f"))
                .output()
                .unwrap());
            ok(&Command::new("setfattr")
                .args(["-n", "user.u", "-v", "1"])
                .arg(directory.join("f"))
                .output()
                .unwrap());
        };
        let script = "getfattr -m - f; getfattr -n trusted.t f; setfattr -n trusted.n -v 2 f; setfattr -n user.n -v 2 f; getfattr -d -m - f";
        for uid in [0, 1234, 4321] {
            compare(hook, prepare, uid, uid, "", script);
        }
    });
}

/// Bytes that a user can write to a filesystem of which a fifth is reserved for root.
fn fill(directory: &Path, uid: u32) -> u64 {
    let script = "dd if=/dev/zero of=full bs=64k 2>/dev/null; stat -c %s full; rm full; sync";
    ok(&run_as(uid, uid, "", directory, script))
        .parse()
        .unwrap()
}

#[test]
fn what_is_reserved_for_root_stays_so() {
    let namespace = Namespace::enter().unwrap();
    let volume = Volume::sized(&namespace, Kind::Ext4, 64 << 20).unwrap();
    let source = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let device = source
        .lines()
        .find(|line| line.split(' ').nth(1) == volume.path().to_str())
        .unwrap();
    let device = device.split(' ').next().unwrap();
    ok(&Command::new("tune2fs")
        .args(["-m", "20", device])
        .output()
        .unwrap());
    let back = volume.directory("back").unwrap();
    fs::set_permissions(&back, fs::Permissions::from_mode(0o777)).unwrap();
    let native = fill(&back, 1234);
    for (options, faults) in [
        (Options::default(), None),
        (
            Options::default(),
            Some("errno=EIO op=read,write percent=0"),
        ),
        (Options::without_passthrough(), None),
    ] {
        let hook = Hook::new(&back, options);
        if let Some(fault) = faults {
            hook.inject(&[fault]);
        }
        let hooked = fill(&hook.front, 1234);
        let spread = native.abs_diff(hooked);
        assert!(spread < 1 << 20, "natively {native}, on the hook {hooked}");
    }
}

#[test]
fn a_sticky_directory_protects_other_peoples_files() {
    both(|hook| {
        let prepare = |directory: &Path| {
            fs::write(directory.join("theirs"), "x").unwrap();
            fs::set_permissions(directory.join("theirs"), fs::Permissions::from_mode(0o666))
                .unwrap();
            chown(directory.join("theirs"), Some(4321), Some(4321)).unwrap();
            fs::set_permissions(directory, fs::Permissions::from_mode(0o1777)).unwrap();
        };
        // The last one is refused by protected_regular (Documentation/admin-guide/sysctl/fs.rst) where that is on.
        compare(
            hook,
            prepare,
            1234,
            1234,
            "",
            &format!("rm -f theirs; mv theirs mine; echo y > theirs; {LIST}"),
        );
    });
}
