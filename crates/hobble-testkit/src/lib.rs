//! Throw-away namespaces, filesystems and target programs for Hobble's tests
