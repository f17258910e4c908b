//! The kernel's process-event connector (drivers/connector/cn_proc.c): who forks and who exits, on the whole host, in order.
//!
//! Invariant: an event that is handed over was really sent by the kernel; that events were lost is always said.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `CN_IDX_PROC` of linux/connector.h; also the multicast group.
const CN_IDX_PROC: u32 = 1;
/// `CN_VAL_PROC`.
const CN_VAL_PROC: u32 = 1;
/// `PROC_CN_MCAST_LISTEN` of linux/cn_proc.h.
const PROC_CN_MCAST_LISTEN: u32 = 1;
/// `NLMSG_DONE`, the message type that the connector uses.
const NLMSG_DONE: u16 = 3;
const NLMSG_HEADER: usize = 16;
const CN_HEADER: usize = 20;
const EVENT_FORK: u32 = 0x0000_0001;
const EVENT_EXIT: u32 = 0x8000_0000;

/// A process event that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProcessEvent {
    /// A process or thread was made; it has not run yet.
    Fork {
        /// The process of whoever is the parent now.
        parent: i32,
        /// The new thread.
        child_thread: i32,
        /// Its process.
        child: i32,
    },
    /// A thread is about to end.
    Exit {
        /// Which.
        thread: i32,
        /// Its process.
        process: i32,
    },
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..offset + 4)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

fn pid_at(bytes: &[u8], offset: usize) -> Option<i32> {
    u32_at(bytes, offset).and_then(|value| i32::try_from(value).ok())
}

/// Parses one netlink datagram of the connector.
fn parse_event(datagram: &[u8]) -> Option<ProcessEvent> {
    let event = datagram.get(NLMSG_HEADER + CN_HEADER..)?;
    // struct proc_event: what u32, cpu u32, timestamp_ns u64, then the union.
    let data = event.get(16..)?;
    match u32_at(event, 0)? {
        // parent_pid, parent_tgid, child_pid, child_tgid
        EVENT_FORK => Some(ProcessEvent::Fork {
            parent: pid_at(data, 4)?,
            child_thread: pid_at(data, 8)?,
            child: pid_at(data, 12)?,
        }),
        // process_pid, process_tgid, exit_code, exit_signal, …
        EVENT_EXIT => Some(ProcessEvent::Exit {
            thread: pid_at(data, 0)?,
            process: pid_at(data, 4)?,
        }),
        _ => None,
    }
}

/// A subscription to the connector.
#[derive(Debug)]
pub(crate) struct Connector {
    socket: OwnedFd,
}

impl Connector {
    pub(crate) fn subscribe() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::CONNECTOR),
        )?;
        // A burst of forks must not overflow the queue; root may go past rmem_max.
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20);
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, CN_IDX_PROC))?;
        let mut message = Vec::with_capacity(NLMSG_HEADER + CN_HEADER + 4);
        let total = (NLMSG_HEADER + CN_HEADER + 4) as u32;
        message.extend(total.to_ne_bytes());
        message.extend(NLMSG_DONE.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(CN_IDX_PROC.to_ne_bytes());
        message.extend(CN_VAL_PROC.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(4_u16.to_ne_bytes());
        message.extend([0; 2]);
        message.extend(PROC_CN_MCAST_LISTEN.to_ne_bytes());
        rustix::net::send(&socket, &message, SendFlags::empty())?;
        Ok(Self { socket })
    }

    /// Hands over what has come; says whether events were lost (ENOBUFS).
    pub(crate) fn drain(&self, mut each: impl FnMut(ProcessEvent)) -> bool {
        let mut buffer = [0_u8; 1024];
        let mut lost = false;
        loop {
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    if let Some(event) = buffer.get(..length).and_then(parse_event) {
                        each(event);
                    }
                }
                Err(rustix::io::Errno::NOBUFS) => lost = true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return lost,
            }
        }
    }

    /// Waits until something has come, at most a second.
    pub(crate) fn wait(&self) {
        let mut polled = [rustix::event::PollFd::new(
            &self.socket,
            rustix::event::PollFlags::IN,
        )];
        let second = rustix::event::Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let _ = rustix::event::poll(&mut polled, Some(&second));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_parsed_and_nonsense_is_not() {
        let mut datagram = vec![0_u8; NLMSG_HEADER + CN_HEADER];
        datagram.extend(EVENT_FORK.to_ne_bytes());
        datagram.extend([0; 12]);
        for pid in [10_u32, 10, 12, 11] {
            datagram.extend(pid.to_ne_bytes());
        }
        assert_eq!(
            parse_event(&datagram),
            Some(ProcessEvent::Fork {
                parent: 10,
                child_thread: 12,
                child: 11
            })
        );
        for length in 0..datagram.len() {
            assert_eq!(parse_event(&datagram[..length]), None);
        }
    }
}
