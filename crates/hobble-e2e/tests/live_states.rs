//! The catalogue of live states: whatever state a program is in, it sees the same while it is attached, after its rules were changed and after it was recovered as it sees
//! where nothing is done to it at all. `docs/live-targets.md` is made from this list.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use hobble_e2e::{assert_unmounted, scene};
use hobble_testkit::hobble::STEP;
use hobble_testkit::program::Program;
use hobble_testkit::target::{Target, text};
use hobble_testkit::volume::Kind;
use serde_json::Value;

/// What a state is, in the words of the document.
struct Row {
    name: &'static str,
    what: &'static str,
}

macro_rules! states {
    ($($name:ident: $what:literal;)*) => {
        const ROWS: &[Row] = &[$(Row { name: stringify!($name), what: $what }),*];
        $(
            #[test]
            fn $name() -> Result<()> {
                is_not_noticed(stringify!($name))
            }
        )*
    };
}

states! {
    tmpfile_linked_meanwhile: "an `O_TMPFILE` file that is given a name while attached";
    tmpfile_linked_afterwards: "an `O_TMPFILE` file that is given a name after recovery";
    renamed: "an open file that is renamed before, while attached and after";
    name_used_again: "an unlinked open file whose name is another file's";
    privileges_dropped: "a program that opened files as root and is nobody now; its files lie below a directory that it cannot search";
    table_full: "a descriptor table that is full up to the soft limit";
    flags_of_open_files: "`O_APPEND`, `O_SYNC`, `O_DSYNC`, `O_NOATIME`, `O_DIRECT`, `O_PATH`, `O_NONBLOCK`, `O_CLOEXEC`, `O_ASYNC` with an owner";
    directory_being_read: "a directory that is being read: no name is missed or seen twice";
    working_directory: "a working directory in the volume";
    working_directory_removed: "a working directory that was removed";
    changed_root: "a root directory in the volume (`chroot`)";
    locks_upgraded: "POSIX, OFD and `flock` locks that are held, made exclusive while attached, and given up after recovery";
    posix_lock_waited_for: "a process that waits for a POSIX lock all the while";
    flock_waited_for: "a process that waits for a `flock` all the while";
    file_that_grows_and_shrinks: "files that grow and shrink";
    directory_watched: "an inotify watch from before";
    descriptor_in_a_socket: "a descriptor in flight in a unix socket";
    sockets_and_pipes_by_name: "unix sockets and FIFOs of the volume, to which new connections are made";
    sent_without_copying: "`sendfile`";
    many_mappings: "256 mappings, shared and private, some of them dirty";
    library_of_the_volume: "libraries of the volume, loaded before and while attached";
    program_of_the_volume: "a program file of the volume that is running, and run again";
    threads_all_the_time: "threads that come and go all the time";
    children_all_the_time: "children that come and go all the time";
    stopped_child_and_zombie: "a stopped child, which stays stopped, and a zombie";
    no_new_privileges: "`no_new_privs`";
    namespace_of_its_own: "a child in a mount namespace of its own: no target, and unharmed";
    blocked_calls: "threads in `nanosleep`, `clock_nanosleep`, `poll`, `epoll_wait`, `select`, a futex and a timed `recv`: no EINTR, none ends early";
    futex_in_a_mapping: "processes that wait for a futex in a shared mapping of a file";
    mappings_with_attributes: "mappings that are `PROT_NONE` in part, locked, not to be inherited or dumped, moved by `mremap`, cut by `munmap`";
    thread_with_a_table_of_its_own: "a thread with a descriptor table of its own";
    thread_with_a_directory_of_its_own: "a thread with a working directory of its own";
    seccomp_filter: "a seccomp filter that kills";
    user_namespace: "a child in a user namespace of its own";
    pid_namespace: "a child in a pid namespace of its own";
    real_time_signals: "blocked real-time signals, each of which is there afterwards";
}

/// Reads and writes come to the server, and nothing is done to them.
const BEFORE: &str = "errno=EIO op=read,write percent=0";
const AFTER: &str = "errno=EIO op=rename,unlink,fsync percent=0";

fn saw(answer: &Value) -> Result<Value> {
    answer
        .pointer("/saw")
        .cloned()
        .with_context(|| format!("it saw nothing: {answer}"))
}

fn is_not_noticed(state: &str) -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        // Other users than root come here too.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(volume.path(), open)?;
        let directory = |name: &str| -> Result<_> {
            let path = volume.path().join(name);
            std::fs::create_dir(&path)?;
            Ok(path)
        };
        let (native, hooked) = (directory("native")?, directory("hooked")?);
        let mut expected = Target::start(Program::States, [text(&native)?, state])?;
        let mut target = Target::start(Program::States, [text(&hooked)?, state])?;
        let compare = |when: &str, expected: Value, seen: Value| -> Result<()> {
            ensure!(seen == expected, "{when}: {seen} instead of {expected}");
            Ok(())
        };
        compare("before", saw(expected.ready())?, saw(target.ready())?)?;
        // Only what the target is in is hooked: what the other does is native.
        let injection = hobble.attach(target.pid(), &hooked, &["--fault", BEFORE])?;
        compare(
            "attached",
            saw(&expected.expect("step")?)?,
            saw(&target.expect("step")?)?,
        )?;
        hobble.run(["update", "--fault", AFTER])?;
        compare(
            "updated",
            saw(&expected.expect("step")?)?,
            saw(&target.expect("step")?)?,
        )?;
        let recovered = injection.recover()?;
        compare(
            "recovered",
            saw(&expected.expect("step")?)?,
            saw(&target.expect("step")?)?,
        )?;
        let left = recovered.pointer("/left").and_then(Value::as_array);
        ensure!(left.is_some_and(Vec::is_empty), "{recovered}");
        assert_unmounted(&target.pid().to_string(), &hooked)?;
        expected.finish()?;
        target.finish().map(drop)
    })
}

/// What would kill the target should Hobble die in the middle is not done: it is refused, and the target goes on as if nothing had been.
#[test]
fn seccomp_filter_without_recvmsg() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let mut target = Target::start(
            Program::States,
            [text(volume.path())?, "seccomp_filter_without_recvmsg"],
        )?;
        let mut injection = hobble.inject([
            "--pid",
            &target.pid().to_string(),
            "--path",
            text(volume.path())?,
            "--no-rules",
        ])?;
        while injection.next_event(STEP)?.is_some() {}
        let failed = injection.event("failed").context("it was attached")?;
        ensure!(
            failed.pointer("/rolled_back") == Some(&true.into()),
            "{failed}"
        );
        let cause = failed.pointer("/cause").and_then(Value::as_str);
        ensure!(
            cause.is_some_and(|cause| cause.contains("seccomp")),
            "{failed}"
        );
        for step in 2..=4 {
            let seen = saw(&target.expect("step")?)?;
            ensure!(
                seen.pointer("/1") == Some(&"x".repeat(step).into()),
                "{seen}"
            );
        }
        assert_unmounted(&target.pid().to_string(), volume.path())?;
        target.finish().map(drop)
    })
}

/// With `UPDATE_DOCS=1` in the environment the document is written.
#[test]
fn the_document_is_made_from_this_list() -> Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/live-targets.md");
    let mut document = String::from(
        "# Live targets\n\n\
        States in which a program is attached, has its rules changed and is recovered, and sees the same all the while as one to which nothing is done. This list is made from\n\
        the tests (`cargo nextest run -p hobble-e2e --test live_states`; `UPDATE_DOCS=1` writes it); what is true of names, data, locks and times beyond them stands in\n\
        [specification.md](specification.md), what no hook can hide in the README.\n\n\
        | state | test |\n|---|---|\n",
    );
    for Row { name, what } in ROWS {
        writeln!(document, "| {what} | `{name}` |")?;
    }
    document.push_str(
        "\nRefused, with the reason, and the target as it was: a seccomp filter that would kill the target for finishing what is begun in it, should Hobble die in the middle\n\
        (`seccomp_filter_without_recvmsg`). Refused by pre-flight: a traced and a 32-bit target (`bad_input`).\n",
    );
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &document)?;
    }
    ensure!(
        std::fs::read_to_string(path).is_ok_and(|written| written == document),
        "docs/live-targets.md is not what the tests say: run this test with UPDATE_DOCS=1"
    );
    Ok(())
}
