//! Stops processes and exchanges their open files, directories and mappings
