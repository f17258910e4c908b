//! The lot without a kernel: requests made by hand, replies written to `/dev/null`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hobble_fuse::park::{Lot, Wait, Wake};
use hobble_fuse::{Device, Features, Interrupt, Opcode, Protocol, Reply, Request, Unique};
use rustix::fs::{Mode, OFlags};

/// A device that swallows everything.
fn null() -> Device {
    Device::new(rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).unwrap())
}

fn request(unique: u64, opcode: Opcode, tid: u32, body: &[u8]) -> Request {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&(40 + body.len() as u32).to_ne_bytes());
    bytes.extend_from_slice(&(opcode as u32).to_ne_bytes());
    bytes.extend_from_slice(&unique.to_ne_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(&tid.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(body);
    Request::from_bytes(
        &bytes,
        Protocol {
            minor: 45,
            features: Features::MIRROR,
        },
    )
    .unwrap()
}

fn me() -> u32 {
    rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .cast_unsigned()
}

fn parked(
    lot: &Lot,
    device: &Device,
    unique: u64,
    wait: Wait,
    then: impl FnOnce(Wake) + Send + 'static,
) {
    let request = request(unique, Opcode::Statfs, me(), &[]);
    let reply = Reply::new(device.clone(), Unique(unique), Some(Opcode::Statfs));
    lot.park(request, reply, wait, move |_, reply, wake| {
        reply.ok();
        then(wake);
    });
}

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// What ten thousand waits cost.
struct Waits {
    memory: usize,
    threads: usize,
    /// How late each ended, sorted.
    late: Vec<Duration>,
}

/// Parks ten thousand 4 KiB writes whose deadlines are spread over a second, from `lead` on.
fn ten_thousand_waits(lead: Duration) -> Waits {
    const NUMBER: u64 = 10_000;
    let (lot, device) = (Lot::new().unwrap(), null());
    let before = resident();
    let late = Arc::new(Mutex::new(Vec::new()));
    let mut body = vec![0; 40 + 4096];
    body[16..20].copy_from_slice(&4096u32.to_ne_bytes());
    let start = Instant::now() + lead;
    for unique in 0..NUMBER {
        // In an order that is not that of parking.
        let deadline = start + Duration::from_micros((unique * 7919 % NUMBER) * 100);
        let request = request(unique, Opcode::Write, me(), &body);
        let reply = Reply::new(device.clone(), Unique(unique), Some(Opcode::Write));
        let late = Arc::clone(&late);
        lot.park(
            request,
            reply,
            Wait::until(deadline),
            move |_, reply, wake| {
                let now = Instant::now();
                reply.written(4096);
                assert_eq!(wake, Wake::Deadline);
                late.lock().unwrap().push(
                    now.checked_duration_since(deadline)
                        .expect("woken before its time"),
                );
            },
        );
    }
    assert_eq!(lot.parked(), NUMBER as usize);
    let memory = resident().saturating_sub(before);
    let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
    while lot.parked() > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(lot.settle(Duration::from_secs(10)));
    let mut late = std::mem::take(&mut *late.lock().unwrap());
    assert_eq!(late.len(), NUMBER as usize);
    late.sort();
    Waits {
        memory,
        threads,
        late,
    }
}

/// The promise is about this crate, not about the scheduler of two cores that others share: the tail is printed, the median has
/// to hold, and the best of three counts.
#[test]
fn ten_thousand_waits_end_on_time_on_one_timer_thread_in_less_than_100_mib() {
    let kept = [2, 4, 8].into_iter().any(|lead| {
        let waits = ten_thousand_waits(Duration::from_secs(lead));
        let at = |share: usize| waits.late[(waits.late.len() - 1) * share / 1000];
        println!(
            "{} MiB, {} threads; late: median {:?}, 99 % {:?}, worst {:?}",
            waits.memory >> 20,
            waits.threads,
            at(500),
            at(990),
            at(1000)
        );
        waits.memory < 100 << 20 && waits.threads < 80 && at(500) < Duration::from_millis(2)
    });
    assert!(kept);
}

#[test]
fn a_lone_wait_ends_within_two_milliseconds_of_its_time() {
    let (lot, device) = (Lot::new().unwrap(), null());
    let median = || {
        let mut late: Vec<_> = (0..21)
            .map(|unique| {
                let (send, receive) = mpsc::channel();
                let deadline = Instant::now() + Duration::from_millis(5);
                parked(&lot, &device, unique, Wait::until(deadline), move |_| {
                    send.send(Instant::now()).unwrap()
                });
                receive
                    .recv()
                    .unwrap()
                    .checked_duration_since(deadline)
                    .expect("woken before its time")
            })
            .collect();
        late.sort();
        println!("late: median {:?}, worst {:?}", late[10], late[20]);
        late[10]
    };
    // The best of three: others may use the processors.
    assert!((0..3).any(|_| median() < Duration::from_millis(2)));
}

#[test]
fn an_interrupt_of_a_living_caller_does_not_end_the_wait() {
    let (lot, device) = (Lot::new().unwrap(), null());
    let (send, receive) = mpsc::channel();
    let deadline = Instant::now() + Duration::from_millis(150);
    parked(&lot, &device, 8, Wait::until(deadline), move |wake| {
        send.send((wake, Instant::now())).unwrap()
    });
    lot.interrupted(Interrupt::new(device.clone(), Unique(9), Unique(8)));
    let (wake, at) = receive.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(wake, Wake::Deadline);
    assert!(at >= deadline);
}

#[test]
fn the_request_of_a_caller_that_has_gone_is_carried_on_with() {
    let (lot, device) = (Lot::new().unwrap(), null());
    let (tid, release) = {
        let (send, receive) = mpsc::channel();
        let (hold, held) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            send.send(me()).unwrap();
            let _ = held.recv();
        });
        (receive.recv().unwrap(), (hold, thread))
    };
    let (send, receive) = mpsc::channel();
    let reply = Reply::new(device.clone(), Unique(2), Some(Opcode::Statfs));
    lot.park(
        request(2, Opcode::Statfs, tid, &[]),
        reply,
        Wait::forever(),
        move |_, reply, wake| {
            reply.ok();
            send.send(wake).unwrap();
        },
    );
    assert!(
        receive.recv_timeout(Duration::from_millis(200)).is_err(),
        "its caller lives"
    );
    drop(release.0);
    release.1.join().unwrap();
    assert_eq!(
        receive.recv_timeout(Duration::from_secs(2)),
        Ok(Wake::Released)
    );
    // And one that has gone before is not parked at all.
    let (send, receive) = mpsc::channel();
    let reply = Reply::new(device, Unique(4), Some(Opcode::Statfs));
    lot.park(
        request(4, Opcode::Statfs, tid, &[]),
        reply,
        Wait::forever(),
        move |_, reply, wake| {
            reply.ok();
            send.send(wake).unwrap();
        },
    );
    assert_eq!(receive.try_recv(), Ok(Wake::Released));
}

#[test]
fn hooks_are_called_once_by_any_signal_and_also_for_an_early_one() {
    let (lot, device) = (Lot::new().unwrap(), null());
    let called = Arc::new(AtomicUsize::new(0));
    let count = || {
        let called = Arc::clone(&called);
        move || {
            called.fetch_add(1, Ordering::SeqCst);
        }
    };
    let interrupt = |target| {
        lot.interrupted(Interrupt::new(
            device.clone(),
            Unique(target + 1),
            Unique(target),
        ))
    };
    let guard = lot.on_interrupt(Unique(2), count());
    interrupt(2);
    interrupt(2);
    assert_eq!(called.load(Ordering::SeqCst), 1);
    drop(guard);
    interrupt(4);
    let guard = lot.on_interrupt(Unique(4), count());
    assert_eq!(called.load(Ordering::SeqCst), 2);
    drop(guard);
    drop(lot.on_interrupt(Unique(6), count()));
    interrupt(6);
    assert_eq!(called.load(Ordering::SeqCst), 2);
}

#[test]
fn dropping_the_lot_releases_everything() {
    let (lot, device) = (Lot::new().unwrap(), null());
    let (send, receive) = mpsc::channel();
    for unique in 0..10 {
        let send = send.clone();
        parked(&lot, &device, unique, Wait::forever(), move |wake| {
            send.send(wake).unwrap()
        });
    }
    drop(send);
    drop(lot);
    let woken: Vec<_> = receive.iter().collect();
    assert_eq!(woken, [Wake::Released; 10]);
}

#[test]
fn blocked_work_does_not_hold_up_other_waits() {
    let (lot, device) = (Lot::new().unwrap(), null());
    let soon = Wait::until(Instant::now() + Duration::from_millis(20));
    for unique in 0..20 {
        parked(&lot, &device, unique, soon, |_| {
            std::thread::sleep(Duration::from_millis(500))
        });
    }
    let (send, receive) = mpsc::channel();
    let start = Instant::now();
    let later = Wait::until(start + Duration::from_millis(60));
    parked(&lot, &device, 100, later, move |_| {
        send.send(start.elapsed()).unwrap()
    });
    let taken = receive.recv().unwrap();
    assert!(
        taken < Duration::from_millis(300),
        "it waited {taken:?} behind blocked work"
    );
    assert!(!lot.settle(Duration::ZERO));
    assert!(lot.settle(Duration::from_secs(5)));
}

#[test]
fn a_panic_while_resuming_costs_one_request_only() {
    let (lot, device) = (Lot::new().unwrap(), null());
    parked(&lot, &device, 1, Wait::until(Instant::now()), |_| {
        panic!("part of the test")
    });
    let (send, receive) = mpsc::channel();
    parked(&lot, &device, 2, Wait::until(Instant::now()), move |wake| {
        send.send(wake).unwrap()
    });
    assert_eq!(
        receive.recv_timeout(Duration::from_secs(5)),
        Ok(Wake::Deadline)
    );
    assert!(lot.settle(Duration::from_secs(5)));
}
