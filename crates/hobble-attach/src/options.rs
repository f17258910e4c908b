//! What a caller asks for: already checked, nothing here touches the system.

use std::path::PathBuf;
use std::time::Duration;

use hobble_api::status::Scope;
use hobble_rules::spec::Document;

/// When the attachment recovers by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// After this long, counted from the moment rules are on.
    For(Duration),
    /// Never; has to be said.
    Forever,
}

impl Default for Lifetime {
    /// Ten minutes.
    fn default() -> Self {
        Self::For(Duration::from_secs(600))
    }
}

/// What is done when the server is killed and another has taken over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failover {
    /// The experiment goes on.
    #[default]
    Continue,
    /// The target is recovered.
    Recover,
}

/// The default bound on how long the target may stand still in one go.
pub const DEFAULT_MAX_PAUSE: Duration = Duration::from_millis(250);

/// One attachment to be made.
#[derive(Debug, Clone)]
pub struct InjectOptions {
    /// The process to hit, as this process sees it.
    pub pid: i32,
    /// Whom to move and fault.
    pub scope: Scope,
    /// The directory or file to hook, as the target sees it.
    pub path: PathBuf,
    /// The rules as written (flags merged in); `None` attaches without any. The server checks them again.
    pub document: Option<Document>,
    /// When to recover by itself.
    pub lifetime: Lifetime,
    /// Seed of all decisions; `None` draws one.
    pub seed: Option<u64>,
    /// Bound on one stop of the target.
    pub max_pause: Duration,
    /// Where attachments keep their sockets and journals.
    pub state_dir: PathBuf,
    /// Keep the attachment when the session that made it goes away.
    pub detach: bool,
    /// What to do when the server is killed.
    pub failover: Failover,
    /// Recover when this time has passed without a renewal.
    pub lease: Option<Duration>,
    /// The program that is started as holder and server with `__serve` as its first argument; `None` is this very program.
    pub server_program: Option<PathBuf>,
}

impl InjectOptions {
    /// Options with every default for `path` as `pid` sees it.
    #[must_use]
    pub fn new(pid: i32, path: impl Into<PathBuf>) -> Self {
        Self {
            pid,
            scope: Scope::Tree,
            path: path.into(),
            document: None,
            lifetime: Lifetime::default(),
            seed: None,
            max_pause: DEFAULT_MAX_PAUSE,
            state_dir: PathBuf::from(crate::DEFAULT_STATE_DIR),
            detach: false,
            failover: Failover::default(),
            lease: None,
            server_program: None,
        }
    }
}

/// A command to be run under a hook of its own.
#[derive(Debug, Clone)]
pub struct ExecOptions {
    /// The directory to hook.
    pub path: PathBuf,
    /// The rules as written (flags merged in); `None` runs the command with none.
    pub document: Option<Document>,
    /// Seed of all decisions; `None` draws one.
    pub seed: Option<u64>,
    /// Where attachments keep their sockets and journals.
    pub state_dir: PathBuf,
    /// The command and its arguments.
    pub command: Vec<std::ffi::OsString>,
    /// As in [`InjectOptions::server_program`].
    pub server_program: Option<PathBuf>,
}
