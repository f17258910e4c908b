//! What can go wrong with an attachment, named by the step that failed.

use std::io;
use std::path::PathBuf;

use hobble_api::exit::ExitCode;

/// The steps of an attachment's life, as they appear in errors, events, the journal and fault points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Reading what the user asked for.
    Options,
    /// Looking at kernel, target and volume; nothing is touched.
    Preflight,
    /// Making the attachment's directory and journal.
    Journal,
    /// Starting the holder and the server.
    Spawn,
    /// Making the FUSE connection.
    Serve,
    /// Finding what the target holds of the volume.
    Census,
    /// Opening stand-ins while the target runs.
    Precopy,
    /// Stopping the target's threads.
    Stop,
    /// Putting the hook over the volume.
    Mount,
    /// Exchanging descriptors, directories, mappings and locks.
    Graft,
    /// Turning rules on.
    Inject,
    /// Exchanging a rule set.
    Update,
    /// Taking the hook away again.
    Recover,
    /// Talking to the server.
    Control,
    /// Starting the command of `hobble exec`.
    Exec,
}

impl Step {
    /// Every step.
    pub const ALL: [Self; 15] = [
        Self::Options,
        Self::Preflight,
        Self::Journal,
        Self::Spawn,
        Self::Serve,
        Self::Census,
        Self::Precopy,
        Self::Stop,
        Self::Mount,
        Self::Graft,
        Self::Inject,
        Self::Update,
        Self::Recover,
        Self::Control,
        Self::Exec,
    ];

    /// The step's name in events and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Options => "options",
            Self::Preflight => "preflight",
            Self::Journal => "journal",
            Self::Spawn => "spawn",
            Self::Serve => "serve",
            Self::Census => "census",
            Self::Precopy => "precopy",
            Self::Stop => "stop",
            Self::Mount => "mount",
            Self::Graft => "graft",
            Self::Inject => "inject",
            Self::Update => "update",
            Self::Recover => "recover",
            Self::Control => "control",
            Self::Exec => "exec",
        }
    }
}

/// A failed step: which, why, what the user can do, and in what state the target is.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct AttachError {
    step: Step,
    message: String,
    hint: Option<String>,
    code: ExitCode,
    rolled_back: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl AttachError {
    /// A failure of `step` with a message that names the operand.
    #[must_use]
    pub fn new(step: Step, message: impl Into<String>) -> Self {
        Self {
            step,
            message: message.into(),
            hint: None,
            code: ExitCode::Failed,
            rolled_back: true,
            source: None,
        }
    }

    /// A failed system call or file operation.
    #[must_use]
    pub fn io(step: Step, message: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::new(step, message).because(source.into())
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn hinting(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the process exit code that this failure maps to.
    #[must_use]
    pub fn exiting(mut self, code: ExitCode) -> Self {
        self.code = code;
        self
    }

    /// Says that the target could not be put back: `hobble recover` is needed.
    #[must_use]
    pub fn needing_recovery(mut self) -> Self {
        self.rolled_back = false;
        self.code = ExitCode::NeedsRecovery;
        self
    }

    /// The step that failed.
    #[must_use]
    pub fn step(&self) -> Step {
        self.step
    }

    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The exit code of a command that fails with this.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        self.code
    }

    /// Whether the target is as it was before (also true when nothing had been touched).
    #[must_use]
    pub fn rolled_back(&self) -> bool {
        self.rolled_back
    }

    /// The message and what caused it, on one line.
    pub(crate) fn whole(&self) -> String {
        let chain = self.cause_chain();
        if chain.is_empty() {
            self.message.clone()
        } else {
            format!("{}: {chain}", self.message)
        }
    }

    /// The chain of causes below the message, outermost first, joined by `": "`.
    #[must_use]
    pub fn cause_chain(&self) -> String {
        let mut text = String::new();
        let mut next: Option<&dyn std::error::Error> = std::error::Error::source(self);
        while let Some(error) = next {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&error.to_string());
            next = error.source();
        }
        text
    }
}

/// The state directory, or a file in it, is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A system call on the path failed.
    #[error("{op} {path}", path = path.display())]
    Io {
        /// What was attempted.
        op: &'static str,
        /// On which path.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The path belongs to somebody else, is writable by others or is a link.
    #[error("{path} {problem}", path = path.display())]
    Unsafe {
        /// Which path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl StateError {
    /// Whether the path does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
