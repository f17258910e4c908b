//! Hobble's own FUSE kernel protocol layer
