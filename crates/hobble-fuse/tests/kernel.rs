//! The protocol layer against the running kernel, with a filesystem in memory behind it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hobble_fuse::mount::{self, MountOptions};
use hobble_fuse::{Config, Features, NodeId, Opcode, Server, StartError};
use rustix::io::Errno;
use rustix::process::Signal;
use support::victim::{Deed, FREED, Victim};
use support::{Delay, MemFs, Mode, Mounted, wait_for};

/// Not a test: what the tests below start as a process of its own.
#[test]
fn victim() {
    support::victim::main();
}

fn errno(result: std::io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn init_is_answered_before_start_returns_and_files_work() {
    let mounted = Mounted::new();
    let negotiated = mounted.server.negotiated();
    assert!(negotiated.kernel_minor >= 31);
    assert_eq!(
        negotiated.features.bits() & !(negotiated.offered & Features::MIRROR).bits(),
        0
    );
    let node = mounted.fs.add("greeting", Mode::Cached, b"hello");
    assert_eq!(std::fs::read(mounted.path("greeting")).unwrap(), b"hello");
    let mut file = File::create_new(mounted.path("new")).unwrap();
    file.write_all(&[7; 100_000]).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 100_000);
    drop(file);
    std::fs::write(mounted.path("greeting"), "bye").unwrap();
    assert_eq!(mounted.fs.contents(node), b"bye");
    std::fs::remove_file(mounted.path("new")).unwrap();
    let names: Vec<_> = std::fs::read_dir(mounted.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["greeting"]);
    let metrics = mounted.server.metrics();
    assert_eq!(
        (
            metrics.replies_dropped,
            metrics.replies_refused,
            metrics.malformed
        ),
        (0, 0, 0)
    );
}

#[test]
fn everything_offered_and_wanted_is_agreed_unless_masked() {
    let all = Mounted::new();
    let offered = all.server.negotiated().offered;
    assert_eq!(all.server.negotiated().features, offered & Features::MIRROR);
    let mask = Features::all() - Features::PASSTHROUGH - Features::HAS_RESEND;
    let masked = Mounted::with(&Config {
        mask,
        max_minor: 36,
        ..Config::default()
    });
    assert_eq!(
        masked.server.negotiated().features,
        offered & Features::MIRROR & mask
    );
    assert_eq!(masked.server.negotiated().minor, 36);
    masked.fs.add("f", Mode::Direct, b"works");
    assert_eq!(std::fs::read(masked.path("f")).unwrap(), b"works");
    // Without passthrough the kernel refuses backing files.
    let backing = tempfile::tempfile().unwrap();
    assert_eq!(
        masked
            .server
            .kernel()
            .backing_open(backing.as_fd())
            .unwrap_err(),
        Errno::PERM
    );
}

#[test]
fn large_writes_arrive_whole_and_aligned() {
    let mounted = Mounted::new();
    let node = mounted.fs.add("f", Mode::Direct, b"");
    let file = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(mounted.path("f"))
        .unwrap();
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 253) as u8).collect();
    file.write_all_at(&data, 0).unwrap();
    assert_eq!(mounted.fs.contents(node), data);
    assert_eq!(mounted.fs.unaligned.load(Ordering::Relaxed), 0);
    // 3 MB in requests of 1 MiB, where the kernel grants them.
    let pages = std::fs::read_to_string("/proc/sys/fs/fuse/max_pages_limit").unwrap();
    let most = pages.trim().parse::<usize>().unwrap() * 4096;
    assert_eq!(
        mounted.fs.count(Opcode::Write),
        data.len().div_ceil(most.min(1 << 20)) as u64
    );
}

#[test]
fn what_the_service_does_not_support_is_enosys_and_the_session_lives_on() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"x");
    let file = File::options()
        .read(true)
        .write(true)
        .open(mounted.path("f"))
        .unwrap();
    let result = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 10);
    assert_eq!(result, Err(Errno::OPNOTSUPP)); // what the kernel makes of ENOSYS here
    assert_eq!(mounted.fs.count(Opcode::Fallocate), 1);
    assert_eq!(std::fs::read(mounted.path("f")).unwrap(), b"x");
}

#[test]
fn a_reply_that_was_dropped_is_eio_and_counted() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"x");
    let mut file = File::open(mounted.path("f")).unwrap();
    mounted.fs.delay(Opcode::Read, Delay::Forget);
    assert_eq!(errno(file.read(&mut [0; 1])), Some(libc::EIO));
    assert_eq!(mounted.server.metrics().replies_dropped, 1);
    mounted.fs.no_delays();
    assert_eq!(file.read(&mut [0; 1]).unwrap(), 1);
}

#[test]
fn a_parked_read_is_answered_when_its_time_is_up() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted
        .fs
        .delay(Opcode::Read, Delay::For(Duration::from_millis(50)));
    let mut taken: Vec<u64> = (0..7)
        .map(|_| {
            let mut victim = Victim::start(&mounted, Deed::TimedRead, "f");
            assert_eq!(victim.line(), "hello");
            victim.line().parse().unwrap()
        })
        .collect();
    taken.sort_unstable();
    println!("delays of 50 ms took {taken:?} µs");
    // Never early; how late is up to the scheduler where others use the processors, so the best counts.
    assert!((50_000..52_000).contains(&taken[0]), "{taken:?}");
    assert_eq!(mounted.fs.deadlines.load(Ordering::Relaxed), 7);
}

#[test]
fn small_writes_do_not_limit_the_size_of_attributes() {
    let mounted = Mounted::with(&Config {
        max_write: 4096,
        ..Config::default()
    });
    mounted.fs.add("f", Mode::Direct, b"");
    let flags = rustix::fs::XattrFlags::empty();
    let result = rustix::fs::setxattr(mounted.path("f"), "user.large", &[1; 65536], flags);
    assert_eq!(result, Err(Errno::OPNOTSUPP)); // the service's ENOSYS, not E2BIG for want of room
    assert_eq!(mounted.fs.count(Opcode::Setxattr), 1);
}

/// About the tests themselves: a test process killed while one of its own threads waits for it leaves nothing behind.
#[test]
fn a_killed_test_leaves_no_thread_that_waits_for_it() {
    let _turn = Mounted::new();
    let mut test = std::process::Command::new(std::env::current_exe().unwrap());
    test.args(["--exact", "waits_for_itself", "--nocapture"])
        .env(SELF_WAIT, "1")
        .stdout(std::process::Stdio::piped());
    let mut test = test.spawn().unwrap();
    let mut out = std::io::BufReader::new(test.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("parked") {
        line.clear();
        assert_ne!(
            std::io::BufRead::read_line(&mut out, &mut line).unwrap(),
            0,
            "it never got that far"
        );
    }
    test.kill().unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while test.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "the killed process does not die");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const SELF_WAIT: &str = "HOBBLE_FUSE_TEST_SELF_WAIT";

/// Not a test: what the one above kills.
#[test]
fn waits_for_itself() {
    if std::env::var_os(SELF_WAIT).is_none() {
        return;
    }
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted.fs.delay(Opcode::Read, Delay::Hang);
    std::thread::scope(|scope| {
        scope.spawn(|| std::fs::read(mounted.path("f")));
        mounted.fs.wait_parked(1);
        println!("parked");
        std::thread::sleep(Duration::from_secs(30));
        mounted.fs.lot.release_all();
    });
}

/// Starts a victim whose deed is parked for a minute.
fn parked_for_a_minute(mounted: &Mounted, deed: Deed, opcode: Opcode) -> Victim {
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted.fs.delay(opcode, Delay::For(Duration::from_mins(1)));
    let victim = Victim::start(mounted, deed, "f");
    mounted.fs.wait_parked(1);
    victim
}

#[test]
fn sigkill_frees_a_parked_read_within_100_ms() {
    let mounted = Mounted::new();
    let mut victim = parked_for_a_minute(&mounted, Deed::Read, Opcode::Read);
    victim.child.signal(Signal::KILL);
    let (taken, _) = victim.child.wait();
    println!("freed after {taken:?}");
    assert!(taken < FREED, "it took {taken:?}");
    assert_eq!(mounted.fs.lot.parked(), 0);
}

#[test]
fn sigkill_frees_a_parked_read_even_when_a_harmless_signal_used_up_the_interrupt() {
    let mounted = Mounted::new();
    let mut victim = parked_for_a_minute(&mounted, Deed::ReadWithAlarm, Opcode::Read);
    support::sys::tgkill(victim.pid(), victim.tid, libc::SIGALRM);
    wait_for("the INTERRUPT", || mounted.fs.interrupts() == 1);
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(
        mounted.fs.lot.parked(),
        1,
        "a harmless signal ended the wait"
    );
    victim.child.signal(Signal::KILL);
    let (taken, _) = victim.child.wait();
    println!("freed after {taken:?}");
    assert!(taken < FREED, "it took {taken:?}");
    assert_eq!(
        mounted.fs.interrupts(),
        1,
        "the kernel does send a second INTERRUPT"
    );
}

#[test]
fn an_alarm_with_sa_restart_does_not_make_a_parked_read_fail() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted
        .fs
        .delay(Opcode::Read, Delay::For(Duration::from_millis(400)));
    let mut victim = Victim::start(&mounted, Deed::ReadWithAlarm, "f");
    mounted.fs.wait_parked(1);
    support::sys::tgkill(victim.pid(), victim.tid, libc::SIGALRM);
    wait_for("the INTERRUPT", || mounted.fs.interrupts() == 1);
    assert_eq!(victim.line(), "hello");
    let micros: u64 = victim.line().parse().unwrap();
    assert!(micros >= 400_000, "the wait ended after {micros} µs");
}

#[test]
fn stopping_and_continuing_does_not_make_a_parked_read_fail() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted
        .fs
        .delay(Opcode::Read, Delay::For(Duration::from_millis(400)));
    let mut victim = Victim::start(&mounted, Deed::Read, "f");
    mounted.fs.wait_parked(1);
    victim.child.signal(Signal::STOP);
    wait_for("the INTERRUPT", || mounted.fs.interrupts() == 1);
    std::thread::sleep(Duration::from_millis(50));
    victim.child.signal(Signal::CONT);
    assert_eq!(victim.line(), "hello");
}

#[test]
fn a_parked_flush_is_carried_out_when_its_process_is_killed() {
    let mounted = Mounted::new();
    let mut victim = parked_for_a_minute(&mounted, Deed::Close, Opcode::Flush);
    victim.child.signal(Signal::KILL);
    let (taken, _) = victim.child.wait();
    assert!(taken < FREED, "it took {taken:?}");
    // Not answered EINTR and forgotten: its owner's locks have to go.
    assert_eq!(mounted.fs.released.load(Ordering::Relaxed), 1);
}

#[test]
fn the_flush_of_an_exiting_process_is_not_parked() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted
        .fs
        .delay(Opcode::Flush, Delay::For(Duration::from_mins(1)));
    let mut victim = Victim::start(&mounted, Deed::Exit, "f");
    // 51 times FLUSH: were each parked until somebody looked at its caller, it would take long.
    let (taken, status) = victim.child.wait();
    assert!(
        taken < 3 * FREED && status.success(),
        "it took {taken:?}: {status}"
    );
    assert!(mounted.fs.count(Opcode::Flush) >= 51);
    assert_eq!(mounted.fs.lot.parked(), 0);
}

#[test]
fn a_process_killed_while_its_file_is_open_dies_at_once_with_a_delay_on_flush() {
    let mounted = Mounted::new();
    mounted
        .fs
        .delay(Opcode::Flush, Delay::For(Duration::from_mins(1)));
    let mut victim = parked_for_a_minute(&mounted, Deed::Read, Opcode::Read);
    victim.child.signal(Signal::KILL);
    let (taken, _) = victim.child.wait();
    assert!(taken < FREED, "it took {taken:?}");
    assert!(mounted.fs.count(Opcode::Flush) >= 1);
}

/// Asynchronous reads get no INTERRUPT, and a process waits for them when it ends (exit_aio, fs/aio.c).
#[test]
fn parked_asynchronous_reads_hold_up_neither_a_kill_nor_an_exit() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, &[7; 4096]);
    mounted
        .fs
        .delay(Opcode::Read, Delay::For(Duration::from_mins(1)));
    let mut victim = Victim::start(&mounted, Deed::Aio, "f");
    mounted.fs.wait_parked(100);
    victim.child.signal(Signal::KILL);
    let (taken, _) = victim.child.wait();
    println!("freed after {taken:?}");
    assert!(taken < FREED, "killed, it took {taken:?}");
    let mut victim = Victim::start(&mounted, Deed::AioExit, "f");
    let (taken, status) = victim.child.wait();
    println!("ended after {taken:?}");
    assert!(
        taken < Duration::from_secs(1) && status.success(),
        "exiting, it took {taken:?}: {status}"
    );
}

/// So that the callers whose INTERRUPT has come are looked at apart from, and more often than, all others.
#[test]
fn sigkill_frees_a_parked_read_among_many_callers() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted
        .fs
        .delay(Opcode::Read, Delay::For(Duration::from_mins(1)));
    let mut crowd = Victim::start(&mounted, Deed::Crowd, "f");
    mounted.fs.wait_parked(1000);
    let mut victim = Victim::start(&mounted, Deed::ReadWithAlarm, "f");
    mounted.fs.wait_parked(1001);
    support::sys::tgkill(victim.pid(), victim.tid, libc::SIGALRM);
    wait_for("the INTERRUPT", || mounted.fs.interrupts() == 1);
    victim.child.signal(Signal::KILL);
    let (taken, _) = victim.child.wait();
    println!("freed after {taken:?}");
    assert!(taken < FREED, "it took {taken:?}");
    crowd.child.signal(Signal::KILL);
    let (taken, _) = crowd.child.wait();
    println!("a thousand threads freed after {taken:?}");
    assert!(taken < Duration::from_millis(500), "it took {taken:?}");
}

#[test]
fn releasing_and_bypassing_let_everything_go_on_normally() {
    let mounted = Mounted::new();
    let mut victim = parked_for_a_minute(&mounted, Deed::Read, Opcode::Read);
    let tid = victim.tid.cast_unsigned();
    assert_eq!(
        mounted.fs.lot.release_for(|caller| caller.tid.0 == tid + 1),
        0
    );
    mounted.fs.lot.bypass(true);
    assert_eq!(mounted.fs.lot.release_for(|caller| caller.tid.0 == tid), 1);
    assert_eq!(victim.line(), "hello");
    assert!(mounted.fs.lot.settle(Duration::from_secs(5)));
    let mut second = Victim::start(&mounted, Deed::Read, "f");
    assert_eq!(second.line(), "hello");
    assert_eq!(mounted.fs.released.load(Ordering::Relaxed), 2);
    mounted.fs.lot.bypass(false);
    let _third = Victim::start(&mounted, Deed::Read, "f");
    mounted.fs.wait_parked(1);
}

#[test]
fn killing_a_writer_behind_an_inode_lock_ends_the_wait_of_its_holder() {
    let mounted = Mounted::new();
    mounted.fs.exclusive.store(true, Ordering::Relaxed);
    // A write that extends the file holds its lock exclusively, whatever FOPEN_PARALLEL_DIRECT_WRITES says.
    let mut holder = parked_for_a_minute(&mounted, Deed::Append, Opcode::Write);
    let mut waiter = Victim::start(&mounted, Deed::Append, "f");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        mounted.fs.lot.parked(),
        1,
        "a wait ended although nobody was killed"
    );
    waiter.child.signal(Signal::KILL);
    let (taken, _) = waiter.child.wait();
    println!("freed after {taken:?}");
    assert!(taken < 5 * FREED, "it took {taken:?}");
    assert_eq!(holder.line(), "Ok(8)");
}

#[test]
fn killing_a_creator_behind_a_parked_lookup_ends_the_wait_of_the_lookup() {
    let mounted = Mounted::new();
    *mounted.fs.ttl.lock().unwrap() = Duration::from_hours(1);
    mounted.fs.add("f", Mode::Direct, b"");
    mounted.fs.add("g", Mode::Direct, b"");
    // The names that both need are cached, so that only the new ones are looked up slowly.
    assert!(
        std::fs::exists(mounted.path("f")).unwrap() && std::fs::exists(mounted.path("g")).unwrap()
    );
    mounted
        .fs
        .delay(Opcode::Lookup, Delay::For(Duration::from_mins(1)));
    let mut holder = Victim::start(&mounted, Deed::StatNext, "f");
    mounted.fs.wait_parked(1);
    let mut waiter = Victim::start(&mounted, Deed::CreateNext, "g");
    std::thread::sleep(Duration::from_millis(200));
    waiter.child.signal(Signal::KILL);
    let (taken, _) = waiter.child.wait();
    println!("freed after {taken:?}");
    assert!(taken < 5 * FREED, "it took {taken:?}");
    assert_eq!(holder.line(), "Ok(false)");
}

#[test]
fn a_probe_of_ones_own_replaces_the_search() {
    let mounted = Mounted::new();
    let holder = parked_for_a_minute(&mounted, Deed::Append, Opcode::Write);
    assert!(mounted.fs.lot.parked() == 1);
    let tid = holder.tid.cast_unsigned();
    drop(holder);
    mounted.fs.exclusive.store(true, Ordering::Relaxed);
    let start = Instant::now();
    mounted.fs.lot.set_probe(move |holders| {
        assert!(holders.iter().all(|holder| holder.caller.tid.0 != tid));
        let late = start.elapsed() > Duration::from_millis(200);
        if late {
            holders.iter().map(|holder| holder.unique).collect()
        } else {
            Vec::new()
        }
    });
    let mut holder = Victim::start(&mounted, Deed::Append, "f");
    assert_eq!(holder.line(), "Ok(8)");
    assert!(start.elapsed() > Duration::from_millis(200));
}

/// Ten thousand requests of the kernel at once: asynchronous direct reads, the kind that gets no INTERRUPT.
#[test]
fn ten_thousand_real_requests_are_parked_without_a_thread_each() {
    const NUMBER: usize = 10_000;
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, &[7; 4096]);
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(mounted.path("f"))
        .unwrap();
    mounted
        .fs
        .delay(Opcode::Read, Delay::For(Duration::from_secs(2)));
    let start = Instant::now();
    let aio = support::sys::Aio::reads(file.as_fd(), NUMBER, 4096);
    mounted.fs.wait_parked(NUMBER);
    let parked = start.elapsed();
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    assert!(threads < 150, "{threads} threads");
    let results = aio.results();
    println!(
        "parked after {parked:?}, all answered after {:?}",
        start.elapsed()
    );
    assert!(results.iter().all(|&result| result == 4096));
    assert!(start.elapsed() > Duration::from_secs(2));
    assert_eq!(mounted.fs.deadlines.load(Ordering::Relaxed), NUMBER);
}

#[test]
fn passthrough_reads_never_reach_the_server() {
    let mounted = Mounted::new();
    let node = mounted.fs.add("f", Mode::Passthrough, b"in memory");
    let mut backing = tempfile::tempfile().unwrap();
    backing.write_all(b"in the backing file").unwrap();
    mounted.fs.back(node, &backing);
    let file = File::options()
        .read(true)
        .write(true)
        .open(mounted.path("f"))
        .unwrap();
    let mut buffer = [0; 19];
    file.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"in the backing file");
    file.write_all_at(b"IN", 0).unwrap();
    backing.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer[..6], b"IN the");
    assert_eq!(
        (
            mounted.fs.count(Opcode::Read),
            mounted.fs.count(Opcode::Write)
        ),
        (0, 0)
    );
}

#[test]
fn passthrough_with_direct_io_reads_from_the_server_and_maps_the_backing_file() {
    let mounted = Mounted::new();
    let node = mounted.fs.add("f", Mode::PassthroughDirect, b"in memory!!");
    let backing = tempfile::tempfile().unwrap();
    backing.write_all_at(&[b'b'; 4096], 0).unwrap();
    mounted.fs.back(node, &backing);
    let file = File::options()
        .read(true)
        .write(true)
        .open(mounted.path("f"))
        .unwrap();
    let mut buffer = [0; 11];
    file.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"in memory!!");
    assert!(mounted.fs.count(Opcode::Read) >= 1);
    let mapping = support::sys::Mapping::shared(file.as_fd(), 4096).unwrap();
    assert_eq!(mapping.copy(), [b'b'; 4096]);
    mapping.store(1, b'X');
    backing.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer[..3], b"bXb");
}

#[test]
fn a_backing_file_stays_in_use_after_its_number_was_given_back() {
    let mounted = Mounted::new();
    let node = mounted.fs.add("f", Mode::Passthrough, b"");
    let backing = tempfile::tempfile().unwrap();
    backing.write_all_at(b"still here", 0).unwrap();
    mounted.fs.back(node, &backing);
    let file = File::open(mounted.path("f")).unwrap();
    // Registering another drops the first.
    mounted.fs.back(node, &tempfile::tempfile().unwrap());
    let mut buffer = [0; 10];
    file.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"still here");
}

#[test]
fn invalidating_an_inode_drops_its_pages() {
    let mounted = Mounted::new();
    *mounted.fs.ttl.lock().unwrap() = Duration::from_hours(1);
    let node = mounted.fs.add("f", Mode::Cached, b"old");
    let file = File::open(mounted.path("f")).unwrap();
    let read = || {
        let mut buffer = [0; 3];
        file.read_exact_at(&mut buffer, 0).unwrap();
        buffer
    };
    assert_eq!(&read(), b"old");
    mounted.fs.change(node, b"new");
    assert_eq!(
        &read(),
        b"old",
        "the kernel does not cache, so this test shows nothing"
    );
    mounted.server.kernel().inval_inode(node, 0, 0);
    assert!(mounted.server.kernel().flush(Duration::from_secs(5)));
    assert_eq!(&read(), b"new");
}

#[test]
fn invalidated_and_deleted_names_are_looked_up_again() {
    let mounted = Mounted::new();
    *mounted.fs.ttl.lock().unwrap() = Duration::from_hours(1);
    let node = mounted.fs.add("f", Mode::Cached, b"x");
    let exists = || std::fs::exists(mounted.path("f")).unwrap();
    assert!(exists() && exists());
    assert_eq!(mounted.fs.count(Opcode::Lookup), 1);
    let kernel = mounted.server.kernel();
    for (expected, expire_only) in [(2, false), (3, true)] {
        kernel.inval_entry(NodeId::ROOT, c"f".into(), expire_only);
        assert!(kernel.flush(Duration::from_secs(5)));
        assert!(exists());
        assert_eq!(mounted.fs.count(Opcode::Lookup), expected);
    }
    mounted.fs.remove("f");
    assert!(
        exists(),
        "the kernel does not cache, so this test shows nothing"
    );
    let open = File::open(mounted.path("f")).unwrap();
    kernel.delete(NodeId::ROOT, node, c"f".into());
    // A name that the kernel does not know is no error.
    kernel.inval_entry(NodeId::ROOT, c"never seen".into(), false);
    assert!(kernel.flush(Duration::from_secs(5)));
    assert!(!exists());
    let link = std::fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&open)
    ))
    .unwrap();
    assert!(
        link.to_string_lossy().ends_with(" (deleted)"),
        "{}",
        link.display()
    );
}

#[test]
fn a_new_epoch_makes_every_name_suspect() {
    let mounted = Mounted::new();
    *mounted.fs.ttl.lock().unwrap() = Duration::from_hours(1);
    mounted.fs.add("f", Mode::Cached, b"x");
    assert!(std::fs::exists(mounted.path("f")).unwrap());
    mounted.server.kernel().inc_epoch();
    assert!(mounted.server.kernel().flush(Duration::from_secs(5)));
    assert!(std::fs::exists(mounted.path("f")).unwrap());
    let expected = if mounted.server.negotiated().kernel_minor >= 44 {
        2
    } else {
        1
    };
    assert_eq!(mounted.fs.count(Opcode::Lookup), expected);
}

#[test]
fn abort_fails_what_is_parked_and_ends_the_service_once() {
    let mounted = Mounted::new();
    let mut victim = parked_for_a_minute(&mounted, Deed::Read, Opcode::Read);
    assert_eq!(mounted.connection.waiting().unwrap(), 1);
    let start = Instant::now();
    mounted.connection.abort().unwrap();
    assert!(victim.line().contains("os error"), "the read succeeded");
    assert!(mounted.server.wait(Duration::from_secs(5)));
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(mounted.fs.destroyed.load(Ordering::SeqCst), 1);
    assert!(!mounted.server.is_serving());
    // Registered files and queued notices outlive the connection without harm.
    mounted.server.kernel().inval_inode(NodeId::ROOT, 0, 0);
    assert!(mounted.server.kernel().flush(Duration::from_secs(5)));
}

#[test]
fn dropping_the_mount_ends_the_service() {
    let new = mount::create(&MountOptions::default()).unwrap();
    let fs = MemFs::new();
    let server = Server::start(new.device, fs.clone(), &Config::default()).unwrap();
    assert!(server.is_serving());
    drop(new.mount);
    assert!(server.wait(Duration::from_secs(5)));
    assert_eq!(fs.destroyed.load(Ordering::SeqCst), 1);
    assert_eq!(new.connection.abort(), Err(Errno::NOENT));
}

#[test]
fn readers_grow_while_they_are_blocked_and_shrink_afterwards() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    mounted
        .fs
        .delay(Opcode::Read, Delay::Block(Duration::from_millis(400)));
    assert_eq!(mounted.server.metrics().readers, 2);
    let start = Instant::now();
    let mut victims: Vec<_> = (0..6)
        .map(|_| Victim::start(&mounted, Deed::Read, "f"))
        .collect();
    // Served although two readers would be blocked: the open of each needs one.
    wait_for("more readers", || mounted.server.metrics().readers >= 6);
    for victim in &mut victims {
        assert_eq!(victim.line(), "hello");
    }
    assert!(
        start.elapsed() < Duration::from_millis(6 * 400),
        "they were served one after the other"
    );
    mounted.fs.no_delays();
    wait_for("fewer readers", || {
        drop(std::fs::metadata(mounted.path("f")));
        mounted.server.metrics().readers == 2
    });
}

#[test]
fn a_missing_device_or_a_refused_option_is_explained() {
    let options = MountOptions {
        device: "/dev/no-such-fuse".into(),
        ..MountOptions::default()
    };
    let error = mount::create(&options).unwrap_err().to_string();
    assert!(
        error.contains("/dev/no-such-fuse") && error.contains("modprobe fuse"),
        "{error}"
    );
    let options = MountOptions {
        device: "/dev/null".into(),
        ..MountOptions::default()
    };
    let error = mount::create(&options).unwrap_err().to_string();
    assert!(error.contains("FSCONFIG_CMD_CREATE failed"), "{error}");
    let options = MountOptions {
        subtype: Some("x".repeat(300)),
        ..MountOptions::default()
    };
    let error = mount::create(&options).unwrap_err().to_string();
    assert!(error.contains("subtype failed"), "{error}");
}

#[test]
fn a_device_without_a_filesystem_or_served_before_is_refused_in_time() {
    let config = Config {
        init_timeout: Duration::from_millis(100),
        ..Config::default()
    };
    let mounted = Mounted::new();
    let device = hobble_fuse::Device::new(
        rustix::fs::open(
            "/dev/fuse",
            rustix::fs::OFlags::RDWR,
            rustix::fs::Mode::empty(),
        )
        .unwrap(),
    );
    assert!(matches!(
        Server::start(device, mounted.fs.clone(), &config),
        Err(StartError::Read(_) | StartError::NoInit(_))
    ));
    // Served twice: INIT has gone.
    let new = mount::create(&MountOptions::default()).unwrap();
    let first = Server::start(
        new.device.clone(),
        MemFs::new(),
        &Config {
            readers: 1,
            ..config
        },
    )
    .unwrap();
    assert!(matches!(
        Server::start(new.device, MemFs::new(), &config),
        Err(StartError::NoInit(_))
    ));
    drop(new.mount);
    assert!(first.wait(Duration::from_secs(5)));
}

#[test]
fn the_mount_works_where_it_is_attached_in_a_namespace_of_its_own() {
    let mounted = Mounted::new();
    mounted.fs.add("f", Mode::Direct, b"hello");
    let place = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::mount::{MountPropagationFlags, MoveMountFlags, UnmountFlags};
            support::sys::private_mount_namespace();
            let recursive = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", recursive).unwrap();
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(&mounted.mount, "", rustix::fs::CWD, place.path(), flags)
                .unwrap();
            assert_eq!(std::fs::read(place.path().join("f")).unwrap(), b"hello");
            let mountinfo = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let device = format!(" 0:{} ", mounted.connection.number());
            let line = mountinfo
                .lines()
                .find(|line| line.contains(&device))
                .unwrap();
            assert!(line.contains("fuse.hobble"), "{line}");
            rustix::mount::unmount(place.path(), UnmountFlags::DETACH).unwrap();
        });
    });
    assert!(!std::fs::exists(place.path().join("f")).unwrap());
}

#[test]
fn attributes_of_the_mount_are_kept() {
    use rustix::mount::MountAttrFlags;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let new = mount::create(&MountOptions {
        attributes,
        ..MountOptions::default()
    })
    .unwrap();
    let fs = MemFs::new();
    let server = Server::start(new.device, fs.clone(), &Config::default()).unwrap();
    let flags = rustix::fs::fstatvfs(&new.mount).unwrap().f_flag;
    assert!(
        flags.contains(
            rustix::fs::StatVfsMountFlags::RDONLY | rustix::fs::StatVfsMountFlags::NOSUID
        )
    );
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let created = rustix::fs::openat(
        &new.mount,
        "new",
        rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
        mode,
    );
    assert_eq!(created.unwrap_err(), Errno::ROFS);
    drop(new.mount);
    assert!(server.wait(Duration::from_secs(5)));
}
