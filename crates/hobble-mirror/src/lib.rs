//! A FUSE filesystem that mirrors a backing tree and asks the rules at every operation
