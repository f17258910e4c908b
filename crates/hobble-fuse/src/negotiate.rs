//! INIT: what kernel and server agree on.
//!
//! Invariant: agreed features = offered ∩ wanted ∩ mask, made consistent; the minor version is the smallest of the kernel's,
//! ours and the configured limit.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::abi;
use crate::buffer::Pool;
use crate::decode::{Op, Protocol};
use crate::device::Device;
use crate::features::Features;
use crate::opcode::Opcode;
use crate::reply::{Delivery, Reply};
use crate::request::Request;
use crate::server::StartError;

/// The oldest kernel interface served: 7.31 is Linux 5.2, which is also the first with `fsopen`.
pub(crate) const OLDEST_MINOR: u32 = 31;

/// How to serve a connection.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Features to ask for.
    pub features: Features,
    /// Features that may be used at all; tests clear bits to see a kernel without them.
    pub mask: Features,
    /// Highest minor version to admit to, for tests.
    pub max_minor: u32,
    /// Largest WRITE in bytes; the kernel takes at most `fs.fuse.max_pages_limit` pages.
    pub max_write: u32,
    /// Requests nobody waits for (readahead, asynchronous I/O) that may be out at a time. High, because a delayed one must not
    /// hold up others.
    pub max_background: u16,
    /// Filesystems that may be stacked: 1 plus the depth of the backing filesystem, 2 at most (`Features::PASSTHROUGH`).
    pub max_stack_depth: u32,
    /// Reader threads that always exist. Each additional one slows a lone client by 20–100 % on two cores.
    pub readers: usize,
    /// Reader threads there may be when others are blocked in the backing filesystem.
    pub max_readers: usize,
    /// How long to wait for INIT, which is queued when the filesystem is created.
    pub init_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            features: Features::MIRROR,
            mask: Features::all(),
            max_minor: abi::KERNEL_MINOR_VERSION,
            max_write: 1 << 20,
            max_background: u16::MAX,
            max_stack_depth: 1,
            readers: 2,
            max_readers: 64,
            init_timeout: Duration::from_secs(5),
        }
    }
}

/// What INIT agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The kernel's minor version.
    pub kernel_minor: u32,
    /// The minor version in use.
    pub minor: u32,
    /// What the kernel offered.
    pub offered: Features,
    /// What is in use.
    pub features: Features,
    /// Largest WRITE in bytes.
    pub max_write: u32,
    /// Largest readahead in bytes, as the kernel wished.
    pub max_readahead: u32,
    /// Filesystems that may be stacked; 0 without passthrough.
    pub max_stack_depth: u32,
}

/// Waits for INIT and answers it.
pub(crate) fn handshake(device: &Device, config: &Config) -> Result<Negotiated, StartError> {
    let request = read_init(device, config.init_timeout)?;
    let (major, kernel_minor, max_readahead, offered) =
        match request.op().map_err(StartError::Malformed)? {
            Op::Init {
                major,
                minor,
                max_readahead,
                offered,
            } => (major, minor, max_readahead, offered),
            _ => {
                return Err(StartError::NotInit(
                    request.opcode().map_or("unknown", Opcode::name),
                ));
            }
        };
    let reply = Reply::new(device.clone(), request.unique(), request.opcode());
    if major != abi::KERNEL_VERSION || kernel_minor < OLDEST_MINOR {
        reply.error(Errno::PROTO);
        return Err(StartError::Version {
            major,
            minor: kernel_minor,
        });
    }
    let negotiated = agree(config, kernel_minor, max_readahead, offered);
    match reply.init(&answer(config, &negotiated)) {
        Delivery::Delivered => Ok(negotiated),
        Delivery::Gone => Err(StartError::Refused),
    }
}

fn read_init(device: &Device, timeout: Duration) -> Result<Request, StartError> {
    let pool = Pool::new(abi::MIN_READ_BUFFER, 1);
    let end = Instant::now() + timeout;
    loop {
        // The device may be shared with other readers by mistake: never block in `read` without having polled.
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        match rustix::event::poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(StartError::NoInit(timeout)),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(StartError::Read(errno)),
        }
        let mut buffer = pool.take();
        match device.read(buffer.request_mut()) {
            Ok(len) => {
                let protocol = Protocol {
                    minor: abi::KERNEL_MINOR_VERSION,
                    features: Features::empty(),
                };
                return Request::new(buffer, len, pool, protocol).map_err(StartError::Malformed);
            }
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => {}
            Err(errno) => return Err(StartError::Read(errno)),
        }
    }
}

fn agree(config: &Config, kernel_minor: u32, max_readahead: u32, offered: Features) -> Negotiated {
    let mut features = offered & config.features & config.mask;
    // The second word of flags is only read with INIT_EXT (process_init_reply, fs/fuse/inode.c).
    if !features.contains(Features::INIT_EXT) {
        features &= Features::from_bits_truncate(u64::from(u32::MAX));
    }
    // Passthrough and the write-back cache exclude each other.
    if features.contains(Features::WRITEBACK_CACHE) || config.max_stack_depth == 0 {
        features -= Features::PASSTHROUGH;
    }
    let max_write = config.max_write.max(4096);
    Negotiated {
        kernel_minor,
        minor: kernel_minor
            .min(abi::KERNEL_MINOR_VERSION)
            .min(config.max_minor)
            .max(OLDEST_MINOR),
        offered,
        features,
        // Without MAX_PAGES the kernel splits at 32 pages (FUSE_DEFAULT_MAX_PAGES_PER_REQ).
        max_write: if features.contains(Features::MAX_PAGES) {
            max_write
        } else {
            max_write.min(32 * 4096)
        },
        max_readahead,
        max_stack_depth: if features.contains(Features::PASSTHROUGH) {
            config.max_stack_depth
        } else {
            0
        },
    }
}

fn answer(config: &Config, negotiated: &Negotiated) -> abi::InitOut {
    let flags = negotiated.features.bits();
    abi::InitOut {
        major: abi::KERNEL_VERSION,
        minor: negotiated.minor,
        max_readahead: negotiated.max_readahead,
        flags: (flags & u64::from(u32::MAX)) as u32,
        max_background: config.max_background,
        congestion_threshold: config.max_background,
        max_write: negotiated.max_write,
        time_gran: 1,
        max_pages: u16::try_from(negotiated.max_write.div_ceil(4096)).unwrap_or(u16::MAX),
        map_alignment: 0,
        flags2: (flags >> 32) as u32,
        max_stack_depth: negotiated.max_stack_depth,
        request_timeout: 0,
        unused: [0; 11],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_agreed_is_within_offer_wish_and_mask(offered: u64, wanted: u64, mask: u64, minor in 31u32..60) {
            let config = Config {
                features: Features::from_bits_retain(wanted),
                mask: Features::from_bits_retain(mask),
                ..Config::default()
            };
            let agreed = agree(&config, minor, 0, Features::from_bits_retain(offered));
            prop_assert_eq!(agreed.features.bits() & !(offered & wanted & mask), 0);
            prop_assert!(agreed.minor <= minor && agreed.minor <= abi::KERNEL_MINOR_VERSION);
            let out = answer(&config, &agreed);
            prop_assert_eq!(u64::from(out.flags) | u64::from(out.flags2) << 32, agreed.features.bits());
            if out.flags2 != 0 {
                prop_assert!(agreed.features.contains(Features::INIT_EXT));
            }
        }
    }

    #[test]
    fn masking_passthrough_leaves_the_rest() {
        let config = Config {
            mask: Features::all() - Features::PASSTHROUGH,
            ..Config::default()
        };
        let agreed = agree(&config, 45, 131_072, Features::all());
        assert_eq!(agreed.features, Features::MIRROR - Features::PASSTHROUGH);
        assert_eq!(agreed.max_stack_depth, 0);
    }
}
