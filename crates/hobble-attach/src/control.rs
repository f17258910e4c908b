//! The server's end of the control socket.
//!
//! Invariant: nobody but root is listened to (SO_PEERCRED of every connection), and no request can hold up the engine: status and events
//! are read from the board, everything else is handed to the engine as a [`Command`] whose answer is waited for with a bound.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use hobble_api::control::{Answer, LineBuffer, Problem, Request, Response};
use hobble_api::event::Why;
use hobble_api::status::Status;

use crate::board::Board;

/// Connections served at once; each costs a thread.
const MAX_CONNECTIONS: usize = 64;
/// How long a request may take in the engine before its sender is told so; the request itself goes on.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// What the engine is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Exchange the whole rule set.
    Update { document: serde_json::Value, seed: Option<u64>, answer: mpsc::Sender<Response> },
    /// Rules off, hook stays.
    Pause { answer: mpsc::Sender<Response> },
    /// Rules on again.
    Resume { answer: mpsc::Sender<Response> },
    /// Recover; the answer comes when it is done.
    Recover { why: Why, force: bool, answer: Option<mpsc::Sender<Response>> },
}

/// What connections need of the attachment.
pub(crate) struct Front {
    /// Status and events.
    pub(crate) board: Arc<Board>,
    /// Adds what changes all the time (counters, processes) to a status.
    pub(crate) refresh: Box<dyn Fn(&mut Status) + Send + Sync>,
    /// To the engine.
    pub(crate) engine: mpsc::Sender<Command>,
}

/// Binds the socket, readable and writable by root only.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    // The directory is 0700 and root's (state_dir), so nobody else reaches the socket between bind and chmod.
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// Serves connections on a thread of its own until the process ends.
pub(crate) fn serve(listener: UnixListener, front: Arc<Front>) -> io::Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("hobble-control".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            if let Err(refusal) = admit(&stream, &open) {
                let _ = write_response(&stream, &refusal);
                continue;
            }
            let (front, counted) = (Arc::clone(&front), Arc::clone(&open));
            let spawned = std::thread::Builder::new().name("hobble-client".into()).spawn(move || {
                if let Err(error) = converse(&stream, &front) {
                    tracing::debug!(%error, "control connection ended");
                }
                counted.fetch_sub(1, Ordering::Relaxed);
            });
            if spawned.is_err() {
                open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })?;
    Ok(())
}

fn problem(cause: impl Into<String>, hint: Option<&str>) -> Response {
    Response::Err(Problem { cause: cause.into(), hint: hint.map(str::to_owned) })
}

fn admit(stream: &UnixStream, open: &AtomicUsize) -> Result<(), Response> {
    let peer = rustix::net::sockopt::socket_peercred(stream)
        .map_err(|error| problem(format!("the caller's identity cannot be read: {error}"), None))?;
    if !peer.uid.is_root() {
        tracing::warn!(uid = peer.uid.as_raw(), "refused a control connection");
        return Err(problem(
            format!("uid {} may not control this attachment, only root may", peer.uid.as_raw()),
            Some("run the command as root"),
        ));
    }
    if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
        open.fetch_sub(1, Ordering::Relaxed);
        return Err(problem(format!("{MAX_CONNECTIONS} control connections are open already"), None));
    }
    Ok(())
}

fn write_response(mut stream: &UnixStream, response: &Response) -> io::Result<()> {
    let line = response.to_line().or_else(|error| problem(error.to_string(), None).to_line()).map_err(io::Error::other)?;
    stream.write_all(line.as_bytes())
}

fn converse(mut stream: &UnixStream, front: &Front) -> io::Result<()> {
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut lines = LineBuffer::new();
    let mut chunk = [0_u8; 4096];
    loop {
        loop {
            let line = match lines.next_line() {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => return write_response(stream, &problem(error.to_string(), None)),
            };
            let response = match Request::from_line(&line) {
                Ok(request) => answer(stream, front, request)?,
                Err(error) => {
                    let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
                    problem(format!("{error}{cause}"), None)
                }
            };
            write_response(stream, &response)?;
        }
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(length) => lines.push(chunk.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn answer(stream: &UnixStream, front: &Front, request: Request) -> io::Result<Response> {
    let (sender, answers) = mpsc::channel();
    let command = match request {
        Request::Ping {} => {
            return Ok(Response::Ok(Answer::Pong {
                id: front.board.status().id,
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            }));
        }
        Request::Status {} => {
            let mut status = front.board.status();
            (front.refresh)(&mut status);
            return Ok(Response::Ok(Answer::Status(Box::new(status))));
        }
        Request::Events { follow, since } => return events(stream, front, follow, since.unwrap_or(0)),
        Request::Update { document, seed } => Command::Update { document, seed, answer: sender },
        Request::Pause {} => Command::Pause { answer: sender },
        Request::Resume {} => Command::Resume { answer: sender },
        Request::Recover { force } => Command::Recover { why: Why::User, force, answer: Some(sender) },
    };
    if front.engine.send(command).is_err() {
        return Ok(problem("the attachment is going away", None));
    }
    Ok(match answers.recv_timeout(ANSWER_WITHIN) {
        Ok(response) => response,
        Err(mpsc::RecvTimeoutError::Timeout) => problem(
            format!("no answer within {} s; the request is still being worked on", ANSWER_WITHIN.as_secs()),
            Some("`hobble show` tells how far it has come"),
        ),
        Err(mpsc::RecvTimeoutError::Disconnected) => problem("the attachment is going away", None),
    })
}

fn events(stream: &UnixStream, front: &Front, follow: bool, mut since: u64) -> io::Result<Response> {
    loop {
        let wait = if follow { Duration::from_secs(1) } else { Duration::ZERO };
        let Some(batch) = front.board.events_since(since, wait) else { return Ok(Response::Ok(Answer::Done {})) };
        if batch.is_empty() && !follow {
            return Ok(Response::Ok(Answer::Done {}));
        }
        for event in batch {
            since = event.seq.map_or(since, |seq| seq + 1);
            write_response(stream, &Response::Event(Box::new(event)))?;
        }
    }
}
