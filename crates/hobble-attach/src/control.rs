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

/// Connections being served now.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Connections that have ever been made.
static MADE: AtomicUsize = AtomicUsize::new(0);

/// Whether somebody is connected, or nobody has had the time to connect at all.
pub(crate) fn is_listened_to() -> bool {
    OPEN.load(Ordering::Relaxed) > 0 || MADE.load(Ordering::Relaxed) == 0
}

/// What the engine is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Exchange the whole rule set.
    Update {
        document: serde_json::Value,
        seed: Option<u64>,
        answer: mpsc::Sender<Response>,
    },
    /// Rules off, hook stays.
    Pause { answer: mpsc::Sender<Response> },
    /// Rules on again.
    Resume { answer: mpsc::Sender<Response> },
    /// Count the time of the lease anew.
    Renew { answer: mpsc::Sender<Response> },
    /// Open anew what has come under a rule that does not see it.
    Reopen,
    /// Recover; the answer comes when it is done.
    Recover {
        why: Why,
        force: bool,
        answer: Option<mpsc::Sender<Response>>,
    },
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
    std::thread::Builder::new()
        .name("hobble-control".into())
        .spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                if let Err(refusal) = admit(&stream) {
                    let _ = write_response(&stream, &refusal);
                    continue;
                }
                let front = Arc::clone(&front);
                let spawned = std::thread::Builder::new()
                    .name("hobble-client".into())
                    .spawn(move || {
                        if let Err(error) = converse(&stream, &front) {
                            tracing::debug!(%error, "control connection ended");
                        }
                        OPEN.fetch_sub(1, Ordering::Relaxed);
                    });
                if spawned.is_err() {
                    OPEN.fetch_sub(1, Ordering::Relaxed);
                }
            }
        })?;
    Ok(())
}

fn problem(cause: impl Into<String>, hint: Option<&str>) -> Response {
    Response::Err(Problem {
        cause: cause.into(),
        hint: hint.map(str::to_owned),
        exit: None,
    })
}

fn admit(stream: &UnixStream) -> Result<(), Response> {
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|error| {
        problem(
            format!("the caller's identity cannot be read: {error}"),
            None,
        )
    })?;
    if !peer.uid.is_root() {
        tracing::warn!(uid = peer.uid.as_raw(), "refused a control connection");
        return Err(problem(
            format!(
                "uid {} may not control this attachment, only root may",
                peer.uid.as_raw()
            ),
            Some("run the command as root"),
        ));
    }
    MADE.fetch_add(1, Ordering::Relaxed);
    if OPEN.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
        OPEN.fetch_sub(1, Ordering::Relaxed);
        return Err(problem(
            format!("{MAX_CONNECTIONS} control connections are open already"),
            None,
        ));
    }
    Ok(())
}

fn write_response(mut stream: &UnixStream, response: &Response) -> io::Result<()> {
    let line = response
        .to_line()
        .or_else(|error| problem(error.to_string(), None).to_line())
        .map_err(io::Error::other)?;
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
                    let cause = std::error::Error::source(&error)
                        .map_or_else(String::new, |cause| format!(": {cause}"));
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
        Request::Events { follow, since } => {
            return events(stream, front, follow, since.unwrap_or(0));
        }
        Request::Update { document, seed } => Command::Update {
            document,
            seed,
            answer: sender,
        },
        Request::Pause {} => Command::Pause { answer: sender },
        Request::Resume {} => Command::Resume { answer: sender },
        Request::Renew {} => Command::Renew { answer: sender },
        Request::Recover { force, interrupted } => Command::Recover {
            why: if interrupted { Why::Signal } else { Why::User },
            force,
            answer: Some(sender),
        },
    };
    if front.engine.send(command).is_err() {
        return Ok(problem("the attachment is going away", None));
    }
    Ok(match answers.recv_timeout(ANSWER_WITHIN) {
        Ok(response) => response,
        Err(mpsc::RecvTimeoutError::Timeout) => problem(
            format!(
                "no answer within {} s; the request is still being worked on",
                ANSWER_WITHIN.as_secs()
            ),
            Some("`hobble show` tells how far it has come"),
        ),
        Err(mpsc::RecvTimeoutError::Disconnected) => problem("the attachment is going away", None),
    })
}

fn events(
    stream: &UnixStream,
    front: &Front,
    follow: bool,
    mut since: u64,
) -> io::Result<Response> {
    loop {
        let wait = if follow {
            Duration::from_secs(1)
        } else {
            Duration::ZERO
        };
        let Some(batch) = front.board.events_since(since, wait) else {
            return Ok(Response::Ok(Answer::Done {}));
        };
        if batch.is_empty() && !follow {
            return Ok(Response::Ok(Answer::Done {}));
        }
        for event in batch {
            since = event.seq.map_or(since, |seq| seq + 1);
            write_response(stream, &Response::Event(Box::new(event)))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;
    use hobble_api::Timestamp;
    use hobble_api::event::EventKind;
    use hobble_api::status::{Phase, Scope};

    fn status() -> Status {
        Status {
            id: "abcd".into(),
            phase: Phase::Attached,
            paused: false,
            targets: vec![],
            scope: Scope::Tree,
            path: "/data".into(),
            started: Timestamp::UNIX_EPOCH,
            deadline: None,
            lease: None,
            seed: 7,
            rules: vec![],
            server_pid: None,
            holder_pid: None,
            passthrough: true,
            degraded: vec![],
            not_covered: vec![],
        }
    }

    struct Rig {
        dir: tempfile::TempDir,
        board: Arc<Board>,
        commands: mpsc::Receiver<Command>,
    }

    impl Rig {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::set_permissions(
                dir.path(),
                std::os::unix::fs::PermissionsExt::from_mode(0o755),
            )
            .unwrap();
            let board = Arc::new(Board::new(status(), None));
            let (engine, commands) = mpsc::channel();
            let front = Front {
                board: Arc::clone(&board),
                refresh: Box::new(|status| status.paused = true),
                engine,
            };
            serve(bind(&dir.path().join("s")).unwrap(), Arc::new(front)).unwrap();
            Self {
                dir,
                board,
                commands,
            }
        }

        fn client(&self) -> Client {
            Client::connect("abcd", &self.dir.path().join("s")).unwrap()
        }
    }

    #[test]
    fn status_is_refreshed_and_commands_reach_the_engine() {
        let rig = Rig::new();
        let mut client = rig.client();
        assert!(client.status().unwrap().paused);
        let engine = std::thread::spawn(move || match rig.commands.recv().unwrap() {
            Command::Pause { answer } => answer.send(Response::Ok(Answer::Done {})).unwrap(),
            other => panic!("{other:?}"),
        });
        client.pause().unwrap();
        engine.join().unwrap();
        // The engine is gone now: said, not waited for.
        assert!(
            client
                .resume()
                .unwrap_err()
                .to_string()
                .contains("going away")
        );
    }

    #[test]
    fn followers_see_every_event_and_then_the_end() {
        let rig = Rig::new();
        rig.board.publish(EventKind::Paused {});
        let mut events = rig.client().events(true, None).unwrap();
        assert_eq!(
            events.next(Duration::from_secs(5)).unwrap().unwrap().seq,
            Some(0)
        );
        rig.board.publish(EventKind::Resumed {});
        assert_eq!(
            events.next(Duration::from_secs(5)).unwrap().unwrap().kind,
            EventKind::Resumed {}
        );
        rig.board.close();
        while !events.ended() {
            assert!(events.next(Duration::from_secs(5)).unwrap().is_none());
        }
    }

    #[test]
    fn nonsense_is_answered_and_the_connection_lives_on() {
        let rig = Rig::new();
        let mut stream = UnixStream::connect(rig.dir.path().join("s")).unwrap();
        stream
            .write_all(b"{\"v\":1,\"request\":\"explode\"}\n{\"v\":1,\"request\":\"ping\"}\n")
            .unwrap();
        let mut text = String::new();
        let mut chunk = [0; 4096];
        while text.lines().count() < 2 || !text.ends_with('\n') {
            let length = stream.read(&mut chunk).unwrap();
            text.push_str(std::str::from_utf8(&chunk[..length]).unwrap());
        }
        assert!(text.contains("unknown variant `explode`"), "{text}");
        assert!(text.contains("pong"), "{text}");
    }

    #[test]
    fn another_uid_is_refused_even_when_the_socket_lets_it_in() {
        let rig = Rig::new();
        let path = rig.dir.path().join("s");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .unwrap();
        let text = std::thread::spawn(move || {
            let nobody = rustix::process::Uid::from_raw(65534);
            // Raw system call: only this thread changes.
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let mut stream = UnixStream::connect(path).unwrap();
            let _ = stream.write_all(b"{\"v\":1,\"request\":\"recover\"}\n");
            let mut text = String::new();
            let _ = stream.read_to_string(&mut text);
            text
        })
        .join()
        .unwrap();
        assert!(text.contains("uid 65534 may not control"), "{text}");
        assert!(rig.commands.try_recv().is_err());
    }
}
