//! The server against a kernel played by the test: a packet socket stands in for `/dev/fuse`, so that things can be sent which
//! the running kernel never sends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hobble_fuse::park::{Lot, Wait};
use hobble_fuse::{
    Config, Features, Interrupt, Op, Opcode, Reply, Request, Server, Service, StartError, Unique,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// The kernel's side.
struct Kernel(OwnedFd);

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    unique: u64,
    error: i32,
    body: Vec<u8>,
}

impl Kernel {
    fn send(&self, opcode: u32, unique: u64, body: &[u8]) {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&(40 + body.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(&opcode.to_ne_bytes());
        bytes.extend_from_slice(&unique.to_ne_bytes());
        bytes.extend_from_slice(&[0; 24]);
        bytes.extend_from_slice(body);
        rustix::io::write(&self.0, &bytes).unwrap();
    }

    fn init(&self, major: u32, minor: u32) {
        let flags = (Features::all().bits() & u64::from(u32::MAX)) as u32;
        let flags2 = (Features::all().bits() >> 32) as u32;
        let mut body = Vec::new();
        for word in [major, minor, 131_072, flags, flags2] {
            body.extend_from_slice(&word.to_ne_bytes());
        }
        body.resize(64, 0);
        self.send(Opcode::Init as u32, 2, &body);
    }

    fn answer_within(&self, time: Duration) -> Option<Answer> {
        let mut poll = [rustix::event::PollFd::new(
            &self.0,
            rustix::event::PollFlags::IN,
        )];
        let timeout = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        if rustix::event::poll(&mut poll, Some(&timeout)).unwrap() == 0 {
            return None;
        }
        let mut bytes = vec![0; 70_000];
        let len = rustix::io::read(&self.0, &mut bytes).unwrap();
        bytes.truncate(len);
        assert_eq!(
            u32::from_ne_bytes(bytes[..4].try_into().unwrap()) as usize,
            len
        );
        Some(Answer {
            error: i32::from_ne_bytes(bytes[4..8].try_into().unwrap()),
            unique: u64::from_ne_bytes(bytes[8..16].try_into().unwrap()),
            body: bytes[16..].to_vec(),
        })
    }

    #[track_caller]
    fn answer(&self) -> Answer {
        self.answer_within(Duration::from_millis(900))
            .expect("no answer")
    }
}

/// A service that answers STATFS, panics at READLINK, and parks ACCESS.
struct Simple {
    lot: Lot,
    interrupts: AtomicUsize,
    destroyed: AtomicUsize,
    seen: Mutex<Vec<Unique>>,
}

impl Service for Simple {
    fn call(&self, request: Request, reply: Reply) {
        self.seen.lock().unwrap().push(request.unique());
        match request.op() {
            Ok(Op::Statfs) => {
                reply.ok();
            }
            Ok(Op::Readlink) => panic!("part of the test"),
            Ok(Op::Access { .. }) => {
                self.lot
                    .park(request, reply, Wait::forever(), |_, reply, _| {
                        reply.ok();
                    })
            }
            Ok(Op::Forget { .. }) => {}
            Ok(Op::CopyFileRange(copy)) => drop(reply.copied(copy.len)),
            Ok(_) => drop(reply.unsupported()),
            Err(error) => drop(reply.malformed(&error)),
        }
    }

    fn interrupted(&self, interrupt: Interrupt) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
        self.lot.interrupted(interrupt);
    }

    fn destroyed(&self) {
        self.destroyed.fetch_add(1, Ordering::SeqCst);
    }
}

fn service() -> Arc<Simple> {
    Arc::new(Simple {
        lot: Lot::new().unwrap(),
        interrupts: AtomicUsize::new(0),
        destroyed: AtomicUsize::new(0),
        seen: Mutex::default(),
    })
}

fn pair() -> (Kernel, OwnedFd) {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    (Kernel(ours), theirs)
}

fn started() -> (Kernel, Arc<Simple>, Server) {
    let (kernel, device) = pair();
    kernel.init(7, 45);
    let service = service();
    let server = Server::start(device, service.clone(), &Config::default()).unwrap();
    assert_eq!(kernel.answer().error, 0);
    (kernel, service, server)
}

const UNKNOWN: u32 = 54;

#[test]
fn an_unknown_opcode_is_enosys_and_the_session_lives_on() {
    let (kernel, service, server) = started();
    kernel.send(UNKNOWN, 4, b"whatever it may contain");
    assert_eq!(
        kernel.answer(),
        Answer {
            unique: 4,
            error: -libc::ENOSYS,
            body: vec![]
        }
    );
    kernel.send(Opcode::Statfs as u32, 6, &[]);
    assert_eq!(
        kernel.answer(),
        Answer {
            unique: 6,
            error: 0,
            body: vec![]
        }
    );
    assert_eq!(server.metrics().unknown_opcodes, 1);
    assert_eq!(*service.seen.lock().unwrap(), [Unique(6)]);
}

#[test]
fn malformed_requests_are_eio_and_counted() {
    let (kernel, _, server) = started();
    kernel.send(Opcode::Unlink as u32, 4, b"no end");
    assert_eq!(
        kernel.answer(),
        Answer {
            unique: 4,
            error: -libc::EIO,
            body: vec![]
        }
    );
    rustix::io::write(&kernel.0, &[1, 2, 3]).unwrap();
    kernel.send(Opcode::Statfs as u32, 6, &[]);
    assert_eq!(kernel.answer().unique, 6);
    assert_eq!(server.metrics().malformed, 2);
}

#[test]
fn a_panic_costs_one_request_which_gets_eio() {
    let (kernel, _, server) = started();
    for unique in [4, 6, 8] {
        kernel.send(Opcode::Readlink as u32, unique, &[]);
        assert_eq!(
            kernel.answer(),
            Answer {
                unique,
                error: -libc::EIO,
                body: vec![]
            }
        );
    }
    kernel.send(Opcode::Statfs as u32, 10, &[]);
    assert_eq!(kernel.answer().error, 0);
    // A panic is counted after its reply was sent.
    let end = Instant::now() + Duration::from_secs(5);
    while server.metrics().panics < 3 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    let metrics = server.metrics();
    assert_eq!(
        (metrics.panics, metrics.replies_dropped, metrics.readers),
        (3, 3, 2)
    );
}

#[test]
fn forget_is_never_answered() {
    let (kernel, service, server) = started();
    kernel.send(Opcode::Forget as u32, 4, &1u64.to_ne_bytes());
    assert_eq!(kernel.answer_within(Duration::from_millis(100)), None);
    assert_eq!(service.seen.lock().unwrap().len(), 1);
    assert_eq!(server.metrics().replies_dropped, 0);
}

#[test]
fn an_interrupt_before_its_request_is_repeated_but_not_in_a_busy_loop() {
    let (kernel, service, _server) = started();
    let start = Instant::now();
    kernel.send(Opcode::Interrupt as u32, 9, &8u64.to_ne_bytes());
    let again = Answer {
        unique: 9,
        error: -libc::EAGAIN,
        body: vec![],
    };
    assert_eq!(kernel.answer(), again);
    assert!(
        start.elapsed() >= Duration::from_millis(90),
        "it came after {:?}",
        start.elapsed()
    );
    // One whose request is parked meanwhile is not.
    kernel.send(Opcode::Interrupt as u32, 13, &12u64.to_ne_bytes());
    kernel.send(Opcode::Access as u32, 12, &[0; 8]);
    assert_eq!(kernel.answer_within(Duration::from_millis(300)), None);
    assert_eq!(service.interrupts.load(Ordering::SeqCst), 2);
    service.lot.release_all();
    assert_eq!(
        kernel.answer(),
        Answer {
            unique: 12,
            error: 0,
            body: vec![]
        }
    );
}

#[test]
fn resent_requests_are_answered_under_the_number_they_came_with() {
    let (kernel, device) = pair();
    let service = service();
    kernel.init(7, 45);
    let first = Server::start(device, service.clone(), &Config::default()).unwrap();
    kernel.answer();
    let negotiated = *first.negotiated();
    // A successor needs no INIT.
    let (kernel, device) = pair();
    let second = Server::resume(device, service.clone(), &Config::default(), negotiated).unwrap();
    // FUSE_NOTIFY_RESEND, before anything is read: what this server reads itself must not be handed out twice.
    let asked = kernel.answer();
    assert_eq!((asked.unique, asked.error), (0, 7));
    let resent = 1 << 63 | 20;
    kernel.send(Opcode::Statfs as u32, resent, &[]);
    assert_eq!(
        kernel.answer(),
        Answer {
            unique: resent,
            error: 0,
            body: vec![]
        }
    );
    let seen = service.seen.lock().unwrap()[0];
    assert!(seen.is_resent());
    assert_eq!(seen.original(), Unique(20));
    drop(kernel);
    assert!(second.wait(Duration::from_secs(5)));
    assert_eq!(service.destroyed.load(Ordering::SeqCst), 1);
}

#[test]
fn a_long_copy_is_told_in_the_form_that_was_asked_for() {
    let (kernel, _, _server) = started();
    let mut body = [0; 56];
    body[40..48].copy_from_slice(&(5u64 << 32).to_ne_bytes());
    kernel.send(Opcode::CopyFileRange64 as u32, 4, &body);
    assert_eq!(kernel.answer().body, (5u64 << 32).to_ne_bytes());
    kernel.send(Opcode::CopyFileRange as u32, 6, &body);
    assert_eq!(kernel.answer().body, u64::from(u32::MAX).to_ne_bytes());
}

#[test]
fn a_kernel_too_old_and_one_that_says_nothing_are_refused() {
    let config = Config {
        init_timeout: Duration::from_millis(50),
        ..Config::default()
    };
    for (major, minor) in [(7, 30), (6, 45), (8, 1)] {
        let (kernel, device) = pair();
        kernel.init(major, minor);
        let error = Server::start(device, service(), &config).unwrap_err();
        assert!(matches!(error, StartError::Version { .. }), "{error}");
        assert_eq!(kernel.answer().error, -libc::EPROTO);
    }
    let (_kernel, device) = pair();
    assert!(matches!(
        Server::start(device, service(), &config),
        Err(StartError::NoInit(_))
    ));
    let (kernel, device) = pair();
    kernel.send(Opcode::Statfs as u32, 2, &[]);
    assert!(matches!(
        Server::start(device, service(), &config),
        Err(StartError::NotInit("statfs"))
    ));
}
