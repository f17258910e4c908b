//! The caller's end of the control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hobble_api::Timestamp;
use hobble_api::control::{Answer, LineBuffer, Problem, Request, Response};
use hobble_api::event::Event;
use hobble_api::exit::ExitCode;
use hobble_api::status::{NotCovered, Status};
use hobble_graft::proc::ProcError;

use crate::error::{AttachError, Step};
use crate::state_dir::StateDir;

/// Longer than the server's own bound on one request.
const READ_WITHIN: Duration = Duration::from_secs(40);

/// A connection to the server of one attachment.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    id: String,
    stream: UnixStream,
    lines: LineBuffer,
}

/// The id to use when the user gave none: the only attachment there is.
///
/// # Errors
/// When the state directory cannot be read, or there is none, or more than one attachment (their ids are named).
pub fn only_id(state_dir: &Path) -> Result<String, AttachError> {
    let mut ids = crate::ids(state_dir)?;
    match (ids.pop(), ids.len()) {
        (Some(id), 0) => Ok(id),
        (None, _) => {
            Err(AttachError::new(Step::Options, "nothing is attached").exiting(ExitCode::Failed))
        }
        (Some(last), _) => {
            ids.push(last);
            Err(AttachError::new(
                Step::Options,
                format!("{} attachments exist: {}", ids.len(), ids.join(", ")),
            )
            .hinting("say which one")
            .exiting(ExitCode::Usage))
        }
    }
}

impl Client {
    /// Connects to the server of attachment `id`.
    ///
    /// # Errors
    /// When there is no such attachment, or its server does not answer: then `hobble recover` undoes what is left of it.
    pub fn open(state_dir: &Path, id: &str) -> Result<Self, AttachError> {
        let state = StateDir::open(state_dir, false).map_err(|error| {
            AttachError::new(Step::Control, format!("no attachment `{id}`")).because(error)
        })?;
        let dir = state.attachment(id).map_err(|error| {
            let known = state.ids().unwrap_or_default();
            let hint = if known.is_empty() {
                "nothing is attached".to_owned()
            } else {
                format!("there are: {}", known.join(", "))
            };
            AttachError::new(Step::Control, format!("no attachment `{id}`"))
                .because(error)
                .hinting(hint)
        })?;
        Self::connect(id, &dir.socket())
    }

    pub(crate) fn connect(id: &str, socket: &PathBuf) -> Result<Self, AttachError> {
        let stream = UnixStream::connect(socket)
            .and_then(|stream| {
                if is_answered(&stream) {
                    Ok(stream)
                } else {
                    Err(io::ErrorKind::ConnectionRefused.into())
                }
            })
            .map_err(|error| {
                AttachError::io(
                    Step::Control,
                    format!("the server of `{id}` does not answer"),
                    error,
                )
                .hinting(format!(
                    "undo what is left of it with `hobble recover {id}`"
                ))
                .exiting(ExitCode::NeedsRecovery)
            })?;
        let bounded = stream
            .set_read_timeout(Some(READ_WITHIN))
            .and_then(|()| stream.set_write_timeout(Some(READ_WITHIN)));
        bounded.map_err(|error| {
            AttachError::io(
                Step::Control,
                "bound the waits on the control socket",
                error,
            )
        })?;
        Ok(Self {
            socket: socket.clone(),
            id: id.to_owned(),
            stream,
            lines: LineBuffer::new(),
        })
    }

    /// The attachment's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    fn lost(&self, error: io::Error) -> AttachError {
        AttachError::io(
            Step::Control,
            format!("the connection to the server of `{}` broke", self.id),
            error,
        )
        .hinting(format!(
            "`hobble show {}` tells whether it is still there",
            self.id
        ))
    }

    fn send(&mut self, request: &Request) -> Result<(), AttachError> {
        let line = request.to_line().map_err(|error| {
            AttachError::new(Step::Control, "the request cannot be sent").because(error)
        })?;
        self.stream
            .write_all(line.as_bytes())
            .map_err(|error| self.lost(error))
    }

    /// One response; `None` when nothing came within the read timeout of the stream.
    fn receive(&mut self) -> Result<Option<Response>, AttachError> {
        let mut chunk = [0_u8; 16384];
        loop {
            let line = self.lines.next_line().map_err(|error| {
                AttachError::new(Step::Control, "a malformed answer").because(error)
            })?;
            if let Some(line) = line {
                return Response::from_line(&line).map(Some).map_err(|error| {
                    AttachError::new(Step::Control, "a malformed answer").because(error)
                });
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(length) => self.lines.push(chunk.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(self.lost(error)),
            }
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, AttachError> {
        self.send(request)?;
        match self.receive()? {
            Some(Response::Ok(answer)) => Ok(answer),
            Some(Response::Err(problem)) => Err(refused(problem)),
            Some(Response::Event(_)) => Err(AttachError::new(
                Step::Control,
                "an event in answer to a question",
            )),
            None => Err(AttachError::new(
                Step::Control,
                format!("the server of `{}` did not answer in time", self.id),
            )),
        }
    }

    /// The attachment as it is now.
    ///
    /// # Errors
    /// When the server is gone or refuses.
    pub fn status(&mut self) -> Result<Status, AttachError> {
        match self.ask(&Request::Status {})? {
            Answer::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// Exchanges the whole rule set; gives back the seed and the names of the rules.
    ///
    /// # Errors
    /// When the document is refused (nothing has changed then) or the server is gone.
    pub fn update(
        &mut self,
        document: serde_json::Value,
        seed: Option<u64>,
    ) -> Result<(u64, Vec<String>), AttachError> {
        match self.ask(&Request::Update { document, seed })? {
            Answer::Updated { seed, rules } => Ok((seed, rules)),
            other => Err(unexpected(&other)),
        }
    }

    /// Rules off, hook stays.
    ///
    /// # Errors
    /// When the server is gone or refuses.
    pub fn pause(&mut self) -> Result<(), AttachError> {
        self.ask(&Request::Pause {}).map(drop)
    }

    /// Rules on again.
    ///
    /// # Errors
    /// When the server is gone or refuses.
    pub fn resume(&mut self) -> Result<(), AttachError> {
        self.ask(&Request::Resume {}).map(drop)
    }

    /// Renews the lease; gives when it ends next.
    ///
    /// # Errors
    /// When there is no lease, it is being recovered, or the server is gone.
    pub fn renew(&mut self) -> Result<Timestamp, AttachError> {
        match self.ask(&Request::Renew {})? {
            Answer::Renewed { until } => Ok(until),
            other => Err(unexpected(&other)),
        }
    }

    /// Recovers; returns when the target is native again, with what could not be put back.
    ///
    /// # Errors
    /// When recovery failed or was refused (`force` overrides what may be overridden).
    pub fn recover(&mut self, force: bool) -> Result<Vec<NotCovered>, AttachError> {
        self.ask_to_recover(force, false)
    }

    /// As [`Client::recover`] without force, because of a signal to the command that the attachment belongs to.
    ///
    /// # Errors
    /// When recovery failed.
    pub fn interrupt(&mut self) -> Result<Vec<NotCovered>, AttachError> {
        self.ask_to_recover(false, true)
    }

    fn ask_to_recover(
        &mut self,
        force: bool,
        interrupted: bool,
    ) -> Result<Vec<NotCovered>, AttachError> {
        match self.ask(&Request::Recover { force, interrupted })? {
            Answer::Recovered { left } => Ok(left),
            other => Err(unexpected(&other)),
        }
    }

    /// Subscribes to the events from number `since` on; read them with [`Events::next`].
    ///
    /// # Errors
    /// When the server is gone.
    pub fn events(mut self, follow: bool, since: Option<u64>) -> Result<Events, AttachError> {
        self.send(&Request::Events { follow, since })?;
        Ok(Events {
            client: self,
            ended: false,
            follow,
            next: since,
        })
    }
}

/// Whether the process that listens lives: the holder keeps the socket of a dead server open, and the kernel goes on taking connections for it. A process that cannot
/// be looked at is taken for alive, and its answer is waited for no longer than any other.
fn is_answered(stream: &UnixStream) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(stream)
        .ok()
        .and_then(|peer| hobble_graft::ids::Pid::new(peer.pid.as_raw_nonzero().get()));
    match peer.map(hobble_graft::ids::ProcessId::of) {
        Some(Ok(process)) => crate::story::lives(process),
        Some(Err(ProcError::Gone { .. })) | None => false,
        Some(Err(_)) => true,
    }
}

fn refused(problem: Problem) -> AttachError {
    let error = AttachError::new(Step::Control, problem.cause);
    let error = match problem.exit {
        Some(ExitCode::NeedsRecovery) => error.needing_recovery(),
        Some(exit) => error.exiting(exit),
        None => error,
    };
    match problem.hint {
        Some(hint) => error.hinting(hint),
        None => error,
    }
}

fn unexpected(answer: &Answer) -> AttachError {
    AttachError::new(
        Step::Control,
        format!("an answer to another question: {answer:?}"),
    )
}

/// A stream of events.
#[derive(Debug)]
pub struct Events {
    client: Client,
    ended: bool,
    follow: bool,
    /// The number of the next event, once one has come.
    next: Option<u64>,
}

/// How long a server gets to take over from one that has died, before its followers give up.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(5);

impl Events {
    /// The next event; `Ok(None)` when none came within `timeout` or, see [`Events::ended`], none will come. A follower whose server dies goes on with the one that takes
    /// over.
    ///
    /// # Errors
    /// When the connection breaks before the stream's end, and nobody takes over.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Event>, AttachError> {
        if self.ended {
            return Ok(None);
        }
        let timeout = timeout.max(Duration::from_millis(1));
        self.client
            .stream
            .set_read_timeout(Some(timeout))
            .map_err(|error| self.client.lost(error))?;
        let received = match self.client.receive() {
            Err(lost) if self.follow && self.take_up() => {
                tracing::debug!(error = %lost, "following another server");
                return Ok(None);
            }
            received => received?,
        };
        match received {
            Some(Response::Event(event)) => {
                self.next = event.seq.map(|seq| seq + 1).or(self.next);
                Ok(Some(*event))
            }
            Some(Response::Ok(_)) => {
                self.ended = true;
                Ok(None)
            }
            Some(Response::Err(problem)) => Err(refused(problem)),
            None => Ok(None),
        }
    }

    /// Connects to the server that has taken over from a dead one, if there is one.
    fn take_up(&mut self) -> bool {
        let until = std::time::Instant::now() + TAKEN_OVER_WITHIN;
        // The attachment's directory goes when it is over.
        while self.client.socket.parent().is_some_and(Path::exists)
            && std::time::Instant::now() < until
        {
            let again = Client::connect(&self.client.id, &self.client.socket)
                .and_then(|client| client.events(true, self.next));
            if let Ok(events) = again {
                *self = events;
                return true;
            }
            // Nothing announces a socket.
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Whether the stream has come to its end.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.ended
    }
}
