//! What a rule may ask about the process that made a request.
//!
//! Owns the trait behind which the facts are looked up, only when a rule needs them. Invariant: a fact that cannot be known matches no rule.

/// A process or thread name as the kernel keeps it: at most 15 bytes (TASK_COMM_LEN, proc_pid_comm(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Comm {
    bytes: [u8; 16],
    len: u8,
}

impl Comm {
    /// A name; what exceeds 16 bytes is cut off.
    #[must_use]
    pub fn new(name: &[u8]) -> Self {
        let mut bytes = [0; 16];
        let mut len = 0;
        for (slot, byte) in bytes.iter_mut().zip(name) {
            *slot = *byte;
            len += 1;
        }
        Self { bytes, len }
    }

    /// The name.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

/// Facts about a caller, looked up when asked for.
pub trait CallerFacts {
    /// Its user id, as the request carries it.
    fn uid(&self) -> u32;

    /// Its process id (thread group id), as seen from here; `None` when the caller is gone or outside this pid namespace.
    fn pid(&self) -> Option<u32>;

    /// The name of its process (of the thread group's leader).
    fn comm(&self) -> Option<Comm>;

    /// The name of the very thread, where it may differ from the process's.
    fn thread_comm(&self) -> Option<Comm> {
        None
    }
}

/// A caller of whom everything is known beforehand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownCaller {
    /// Its user id.
    pub uid: u32,
    /// Its process id.
    pub pid: Option<u32>,
    /// The name of its process.
    pub comm: Option<Comm>,
}

impl CallerFacts for KnownCaller {
    fn uid(&self) -> u32 {
        self.uid
    }

    fn pid(&self) -> Option<u32> {
        self.pid
    }

    fn comm(&self) -> Option<Comm> {
        self.comm
    }
}
