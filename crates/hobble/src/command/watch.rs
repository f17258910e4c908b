//! Noticing the death of a server, and waiting for what its holder makes of it.
//!
//! The holder shares the server's descriptor table, so a connection to a server that was killed does not end: it falls
//! silent. What ends is the process, and a pidfd tells that without mistaking a re-used pid for it (pidfd_open(2)).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use hobble_attach::Session;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

/// How often is looked whether the holder is done.
const LOOK: Duration = Duration::from_millis(50);

/// Server and holder of one attachment.
#[derive(Debug)]
pub(crate) struct Watch {
    server: OwnedFd,
    holder: Option<OwnedFd>,
}

/// What became of an attachment whose server died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Afterwards {
    /// The holder has put everything back.
    PutBack,
    /// It is still there, and nobody seems to be able to put it back by himself.
    StillThere,
}

impl Watch {
    /// Watches the processes of a session; `None` when they cannot be told, so that they cannot be watched either.
    pub(crate) fn of(session: &Session) -> Option<Self> {
        let status = session
            .client()
            .and_then(|mut client| client.status())
            .ok()?;
        Some(Self {
            server: open(status.server_pid?)?,
            holder: status.holder_pid.and_then(open),
        })
    }

    /// Whether the server has ended.
    pub(crate) fn server_is_dead(&self) -> bool {
        has_ended(&self.server)
    }

    /// Waits until the attachment is gone, or its holder is, or so much time; `each` is called all the while.
    pub(crate) fn afterwards(
        watch: Option<&Self>,
        state_dir: &Path,
        id: &str,
        limit: Duration,
        mut each: impl FnMut(),
    ) -> Afterwards {
        let until = Instant::now() + limit;
        loop {
            // Looked at first: a holder leaves after the attachment's directory is gone.
            let holder_is_dead = watch
                .and_then(|watch| watch.holder.as_ref())
                .is_some_and(has_ended);
            match hobble_attach::ids(state_dir) {
                Ok(ids) if !ids.iter().any(|known| known == id) => return Afterwards::PutBack,
                _ if holder_is_dead || Instant::now() >= until => return Afterwards::StillThere,
                _ => {}
            }
            each();
            std::thread::sleep(LOOK);
        }
    }
}

fn open(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// A pidfd is readable once its process has ended, reaped or not.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
    rustix::event::poll(
        &mut watched,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    )
    .is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_seen_and_what_lives_is_not() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let watch = Watch {
            server: open(std::process::id()).unwrap(),
            holder: open(child.id()),
        };
        assert!(!watch.server_is_dead());
        assert!(!watch.holder.as_ref().is_some_and(has_ended));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(watch.holder.as_ref().is_some_and(has_ended));
    }

    #[test]
    fn what_becomes_of_it_is_told_by_its_directory() {
        let state = tempfile::tempdir().unwrap();
        let gone = Watch::afterwards(
            None,
            &state.path().join("none"),
            "abcd2345",
            Duration::from_secs(60),
            || {},
        );
        assert_eq!(gone, Afterwards::PutBack);
        std::fs::create_dir(state.path().join("abcd2345")).unwrap();
        let mut looks = 0;
        let limit = Duration::from_millis(120);
        let there = Watch::afterwards(None, state.path(), "abcd2345", limit, || looks += 1);
        assert_eq!(there, Afterwards::StillThere);
        assert!(looks > 0);
    }
}
