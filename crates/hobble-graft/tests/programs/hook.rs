//! A FUSE mount of a directory, attached nowhere, whose server counts what closing a descriptor asks of it.

#![allow(dead_code, unreachable_pub)]

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hobble_fuse::mount::{self, Connection, MountOptions};
use hobble_fuse::{Config, Interrupt, Kernel, Negotiated, Opcode, Reply, Request, Server, Service};
use hobble_mirror::{Caching, Everybody, Mirror};
use rustix::fs::{Mode, OFlags};

struct Counting {
    mirror: Mirror,
    flushes: AtomicU64,
}

impl Service for Counting {
    fn started(&self, kernel: &Kernel, negotiated: &Negotiated) {
        self.mirror.started(kernel, negotiated);
    }

    fn call(&self, request: Request, reply: Reply) {
        if request.opcode() == Some(Opcode::Flush) {
            self.flushes.fetch_add(1, Ordering::Relaxed);
        }
        self.mirror.call(request, reply);
    }

    fn interrupted(&self, interrupt: Interrupt) {
        self.mirror.interrupted(interrupt);
    }

    fn destroyed(&self) {
        self.mirror.destroyed();
    }
}

/// The mount and its server.
pub struct Hook {
    service: Arc<Counting>,
    server: Server,
    mount: OwnedFd,
    connection: Connection,
}

impl Hook {
    /// Mirrors a directory.
    pub fn of(directory: &Path) -> Self {
        let open =
            || rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let config = hobble_mirror::Config {
            root: open(),
            native: Some(open()),
            volume: b"/volume".to_vec(),
            caching: Caching::default(),
            passthrough: true,
            legacy: None,
        };
        let mirror = Mirror::new(config, Arc::new(Everybody)).unwrap();
        let new = mount::create(&MountOptions::default())
            .expect("a FUSE mount needs CAP_SYS_ADMIN: run the tests as root");
        let serving = Config {
            features: Mirror::features(),
            max_stack_depth: 2,
            ..Config::default()
        };
        let service = Arc::new(Counting {
            mirror,
            flushes: AtomicU64::new(0),
        });
        let server = Server::start(
            new.device,
            Arc::clone(&service) as Arc<dyn Service>,
            &serving,
        )
        .unwrap();
        Self {
            service,
            server,
            mount: new.mount,
            connection: new.connection,
        }
    }

    /// Its root.
    pub fn mount(&self) -> OwnedFd {
        self.mount.try_clone().unwrap()
    }

    /// How often the server was asked to flush.
    pub fn flushes(&self) -> u64 {
        self.service.flushes.load(Ordering::Relaxed)
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        if let Err(error) = self.connection.abort() {
            eprintln!("warning: cannot abort the connection: {error}");
        }
        if !self.server.wait(Duration::from_secs(10)) && !std::thread::panicking() {
            panic!("the server did not end");
        }
    }
}
