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
//! | `legacy` | what whoever takes over must know when the server is killed |
//! | [`adopt`] | descriptors that were moved: stand-ins, and giving the originals back |
//! | `sys` | system calls without a safe wrapper elsewhere |

//!
//! # Where it differs from the volume itself
//!
//! Beyond what no FUSE filesystem can hide (`st_dev`, `f_type` and with it `pathconf(_PC_LINK_MAX)`, leases, RWF_NOWAIT, `FICLONE`, `FALLOC_FL_COLLAPSE_RANGE` and
//! `FALLOC_FL_INSERT_RANGE`, `bmap`):
//! * a write in passthrough is made with credentials of nobody in particular: when root writes to a set-id file the bits go, where natively root keeps them; and
//!   root cannot use what is reserved for it, except through the server;
//! * the supplementary groups of a caller count where files are made (the directory's group) and where the kernel itself looks at them, not for blocks reserved for a group;
//! * a rule cannot forge the *type* of a file: the kernel would mark the inode bad for as long as it lives;
//! * `msync` of a mapping never comes to the server in passthrough, so no rule on `fsync` sees it;
//! * a circle of OFD lock waiters gets EDEADLK, where natively it hangs;
//! * where the backing filesystem has no file handles (overlayfs as mounted by default), names of inodes beyond half the descriptor limit are dropped from the
//!   kernel's cache, and an unlinked file that was opened before cannot be linked again.

pub mod adopt;
mod attr;
mod config;
mod data;
mod door;
mod error;
mod faults;
mod fd;
mod handle;
mod legacy;
mod lock;
pub mod locks;
mod mirror;
mod ops;
mod resume;
mod store;
mod subject;
mod sys;

pub use config::{Caching, CallerFacts, Callers, Config, Everybody};
pub use error::MirrorError;
pub use faults::PlanChange;
pub use legacy::Legacy;
pub use mirror::Mirror;
pub use resume::Inherited;
