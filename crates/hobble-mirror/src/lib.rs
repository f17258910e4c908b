//! A FUSE filesystem that mirrors a backing tree and asks the rules at every operation.
//!
//! It answers what Linux sends for one mount by doing the same on a real directory tree, as the caller would have done it; before it does, it asks the
//! rules, and delays, fails or alters the operation as they say. It knows nothing of processes beyond the thread number in a request, and nothing of
//! ptrace; the layer above moves descriptors and tells the mirror what was moved.
//!
//! | part | job |
//! |---|---|
//! | [`Mirror`] | the [`hobble_fuse::Service`]; rules in, rules out |
//! | `store` | which backing inode a node is; names for matching |
//! | `ops` | the operations, one module per kind |
//! | `faults` | asking the rules, and doing what they say |
//! | [`locks`] | byte-range locks and flock, also while descriptors move |
//! | [`adopt`] | descriptors that were moved: stand-ins, and giving the originals back |
//! | `sys` | system calls without a safe wrapper elsewhere |

pub mod adopt;
mod attr;
mod config;
mod data;
mod door;
mod error;
mod faults;
mod fd;
mod handle;
mod lock;
pub mod locks;
mod mirror;
mod ops;
mod store;
mod sys;

pub use config::{Caching, CallerFacts, Callers, Config, Everybody};
pub use error::MirrorError;
pub use faults::PlanChange;
pub use mirror::Mirror;
