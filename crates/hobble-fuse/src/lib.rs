//! Hobble's own FUSE kernel protocol layer.
//!
//! It turns what Linux writes into `/dev/fuse` into typed requests, sees to it that each is answered exactly once, makes FUSE
//! mounts without attaching them anywhere, and lets requests wait without a thread each. It knows nothing of filesystems, of
//! rules, or of the processes that use the mount, but for what `/proc` says of the caller of a parked request.
//!
//! | part | job |
//! |---|---|
//! | [`mount`] | `fsopen` … `fsmount`; abort |
//! | [`Server`], [`Service`], [`Config`] | INIT, readers |
//! | [`Request`], [`decode`] | bytes → [`Op`] |
//! | [`Reply`], [`dir`] | answers, once |
//! | [`Kernel`] | backing files, notifications |
//! | [`park`] | delayed and hung requests |

mod abi;
pub mod buffer;
pub mod decode;
mod device;
pub mod dir;
mod errno;
mod features;
mod ids;
pub mod kernel;
pub mod mount;
mod negotiate;
mod op;
mod opcode;
pub mod park;
mod procfs;
mod reply;
mod request;
mod server;
mod sys;
pub mod types;

pub use decode::DecodeError;
pub use device::{Device, Metrics};
pub use dir::{DirBuilder, DirPlusBuilder, DirentKind};
pub use errno::{Errno, InjectedErrno};
pub use features::Features;
pub use ids::{Caller, Fh, LockOwner, NodeId, Tid, Unique};
pub use kernel::{Backing, BackingId, Kernel};
pub use negotiate::{Config, Negotiated};
pub use op::{Creation, Header, Op, Protocol};
pub use opcode::Opcode;
pub use reply::{Delivery, Reply, Witness};
pub use request::Request;
pub use server::{Interrupt, Server, Service, StartError};
pub use types::{
    Attr, Entry, FileLock, LockKind, OpenMode, Opened, SetAttr, SetTime, StatFs, StatxAttr,
    Timestamp, Whence,
};
