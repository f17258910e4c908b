//! Fault kind `attr`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // A test may.

mod support;

use hobble_rules::{Attributes, FileKind, Op, OpSet, Timestamp};
use support::{Ask, errors, flags, lines, plan, warnings};

const TRUTH: Attributes = Attributes {
    ino: 11,
    size: 4096,
    blocks: 8,
    atime: Timestamp { sec: 100, nsec: 1 },
    mtime: Timestamp { sec: 200, nsec: 2 },
    ctime: Timestamp { sec: 300, nsec: 3 },
    kind: FileKind::Regular,
    perm: 0o644,
    nlink: 1,
    uid: 1000,
    gid: 1000,
    rdev: 0,
};

fn seen(attr: &str) -> Attributes {
    Ask::new(Op::Getattr)
        .of(&plan(&format!("- fault: {{attr: {{{attr}}}}}")))
        .attributes(TRUTH)
}

#[test]
fn every_attribute_of_iochaos_can_be_set() {
    let all = "ino: 1, size: 2, blocks: 3, atime: {sec: 4, nsec: 5}, mtime: {sec: -6, nsec: 7}, ctime: {sec: 8, nsec: 9}, kind: namedPipe, \
               perm: 72, nlink: 10, uid: 11, gid: 12, rdev: 13";
    let expected = Attributes {
        ino: 1,
        size: 2,
        blocks: 3,
        atime: Timestamp { sec: 4, nsec: 5 },
        mtime: Timestamp { sec: -6, nsec: 7 },
        ctime: Timestamp { sec: 8, nsec: 9 },
        kind: FileKind::Fifo,
        perm: 0o110,
        nlink: 10,
        uid: 11,
        gid: 12,
        rdev: 13,
    };
    assert_eq!(seen(all), expected);
}

#[test]
fn a_forged_type_alone_is_refused_and_next_to_others_warned_about() {
    let found = errors("- fault: {attr: {kind: directory}}");
    assert!(
        lines(&found).contains("fault.attr.kind: is not reported"),
        "{}",
        lines(&found)
    );
    let found = warnings("- fault: {attr: {kind: directory, uid: 0}}");
    assert!(
        found
            .iter()
            .any(|line| line.contains("fault.attr.kind: is not reported")),
        "{found:?}"
    );
}

#[test]
fn what_is_not_named_stays_true() {
    assert_eq!(seen("perm: \"0000\""), Attributes { perm: 0, ..TRUTH });
    assert_eq!(seen("uid: 0"), Attributes { uid: 0, ..TRUTH });
}

#[test]
fn text_and_leading_zeros_are_octal_and_other_numbers_are_not() {
    for (written, perm) in [
        ("\"0644\"", 0o644),
        ("0600", 0o600),
        ("\"755\"", 0o755),
        ("\"0o711\"", 0o711),
        ("420", 0o644),
        ("0", 0),
    ] {
        assert_eq!(seen(&format!("perm: {written}")).perm, perm, "{written}");
    }
    let found = warnings("- fault: {attr: {perm: 644}}").concat();
    assert!(
        found.contains("644 is decimal, that is octal 1204 (write \"0644\" if octal was meant)"),
        "{found}"
    );
}

#[test]
fn relative_changes_follow_the_truth_and_saturate() {
    assert_eq!(
        seen("size: +1KiB, blocks: \"-2\", nlink: +1"),
        Attributes {
            size: 5120,
            blocks: 6,
            nlink: 2,
            ..TRUTH
        }
    );
    assert_eq!(
        seen("size: -1MiB, blocks: +18446744073709551615, nlink: +4294967295"),
        Attributes {
            size: 0,
            blocks: u64::MAX,
            nlink: u32::MAX,
            ..TRUTH
        }
    );
    assert_eq!(
        seen("atime: +1h, mtime: -201s, ctime: -3ns"),
        Attributes {
            atime: Timestamp { sec: 3700, nsec: 1 },
            mtime: Timestamp { sec: -1, nsec: 2 },
            ctime: Timestamp { sec: 300, nsec: 0 },
            ..TRUTH
        }
    );
    assert_eq!(
        seen("ctime: -4ns").ctime,
        Timestamp {
            sec: 299,
            nsec: 999_999_999
        }
    );
}

/// A larger size makes the kernel refuse the whole reply.
#[test]
fn a_size_never_exceeds_what_a_file_can_have() {
    assert_eq!(
        seen("size: +18446744073709551615").size,
        i64::MAX.unsigned_abs()
    );
    let found = support::lines(&support::errors(
        "- fault: {attr: {size: 9223372036854775808}}",
    ));
    assert!(found.contains("larger than any file"), "{found}");
}

#[test]
fn devices_are_encoded_as_the_kernel_does() {
    assert_eq!(seen("rdev: \"8:1\"").rdev, 0x801);
    assert_eq!(seen("rdev: \"259:300\"").rdev, 0x0011_032c);
}

#[test]
fn later_rules_see_what_earlier_ones_made() {
    let plan = flags(&["attr.size=100 attr.uid=1", "attr.size=+11 attr.gid=2"]);
    let attributes = Ask::new(Op::Lookup).of(&plan).attributes(TRUTH);
    assert_eq!(
        attributes,
        Attributes {
            size: 111,
            uid: 1,
            gid: 2,
            ..TRUTH
        }
    );
}

#[test]
fn only_operations_that_return_attributes_are_hit() {
    let plan = plan("- fault: {attr: {uid: 0}}");
    assert_eq!(plan.ops(), OpSet::WITH_ATTRIBUTES);
    assert!(!plan.ops().contains(Op::Read));
}
