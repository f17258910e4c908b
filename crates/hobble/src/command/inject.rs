//! `hobble inject`: attach, tell what happens, and see to it that everything is put back.
//!
//! Invariants: once the attachment exists, the only ways out in the foreground are its `recovered` or `failed` event or the
//! loss of its server, and a signal asks for recovery instead of ending the command; with `--detach` the command leaves as
//! soon as the rules are in force.

use std::collections::BTreeSet;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use hobble_api::Timestamp;
use hobble_api::event::{Event, EventKind, Progress, Recovered, Why};
use hobble_api::exit::ExitCode;
use hobble_api::status::Verdict;
use hobble_attach::{AttachError, InjectOptions, Lifetime, Session, Step};

use crate::command::watch::{Afterwards, Watch};
use crate::command::{need_root, print};
use crate::fail::{Fail, Outcome};
use crate::intent;
use crate::out::{Out, human_duration, printable};
use crate::render;
use crate::signals::Signals;

/// How often the wait for events looks for signals.
const LOOK: Duration = Duration::from_millis(100);

/// How long another server gets to take over from a dead one.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(5);

/// How long the holder of a dead server may take to put everything back.
const HOLDER_WITHIN: Duration = Duration::from_secs(30);

/// Carries it out.
pub(crate) fn run(intent: &intent::Inject, out: &mut Out) -> Outcome<()> {
    for warning in &intent.warnings {
        out.warn("warning:", &printable(warning));
    }
    if intent.dry_run {
        return dry_run(&intent.options, out);
    }
    need_root()?;
    let signals = Signals::install()?;
    let session = hobble_attach::inject(&intent.options)?;
    let foreground = Foreground {
        options: &intent.options,
        session,
        signals,
        asked: None,
        busy: Some("attaching"),
        why: None,
        injecting: false,
        retried: false,
        watch: None,
        dead_since: None,
        told: BTreeSet::new(),
    };
    foreground.run(out)
}

/// Verdict, plan and who is affected; fails when it would be refused.
fn dry_run(options: &InjectOptions, out: &mut Out) -> Outcome<()> {
    let preflight = hobble_attach::preflight(options)?;
    out.event(&Event::new(
        Timestamp::now(),
        "",
        EventKind::Preflight(preflight.clone()),
    ));
    print(out, render::preflight(&preflight));
    if preflight.verdict != Verdict::Refuse {
        return Ok(());
    }
    let first = preflight.reasons.first();
    let cause = first.map_or_else(
        || "pre-flight refuses".to_owned(),
        |reason| printable(&reason.text),
    );
    let mut fail = Fail::failed(anyhow!("refused: {cause}"))
        .step("preflight")
        .told();
    if let Some(hint) = first.and_then(|reason| reason.hint.as_deref()) {
        fail = fail.hint(hint);
    }
    Err(fail)
}

/// The answer to a recovery that was asked for because of a signal.
type Asked = Receiver<Result<(), AttachError>>;

struct Foreground<'a> {
    options: &'a InjectOptions,
    session: Session,
    signals: Signals,
    asked: Option<Asked>,
    /// What is going on and may take long.
    busy: Option<&'static str>,
    why: Option<Why>,
    injecting: bool,
    /// An attempt to put everything back has failed.
    retried: bool,
    watch: Option<Watch>,
    /// When the server was found to be dead.
    dead_since: Option<Instant>,
    /// Codes of what has been told to be degraded.
    told: BTreeSet<String>,
}

impl Foreground<'_> {
    fn run(mut self, out: &mut Out) -> Outcome<()> {
        let path = self.options.path.to_string_lossy();
        out.line(format!(
            "attachment: {} ({})",
            self.session.id(),
            printable(&path)
        ));
        let mut seen = 0;
        loop {
            self.look_at_signals(&mut seen, out)?;
            self.look_at_answer(out);
            let event = match self.session.next_event(LOOK) {
                Ok(Some(event)) => event,
                // The server could not put everything back: its holder's successor is at it.
                Ok(None) if self.session.ended() && self.retried => {
                    let error = AttachError::new(Step::Recover, "the server could not recover");
                    return Err(self.lost(error, out));
                }
                Ok(None) if self.session.ended() => return Err(self.ended_without_a_word()),
                Ok(None) if self.is_without_server() => {
                    return Err(self.lost(AttachError::new(Step::Control, "the server died"), out));
                }
                Ok(None) => {
                    if let Some(busy) = self.busy {
                        out.progress(Instant::now(), busy);
                    }
                    continue;
                }
                Err(error) => return Err(self.lost(error, out)),
            };
            out.event(&event);
            if let EventKind::Attaching(progress) = &event.kind {
                out.progress(Instant::now(), &progress_text(progress));
                continue;
            }
            out.progress_done();
            // A failure is told once, by the error that ends the command.
            if !out.is_json() && !matches!(event.kind, EventKind::Failed(_)) {
                print(out, render::event(&self.untold(&event)));
            }
            match event.kind {
                EventKind::Attached(_) => self.watch = Watch::of(&self.session),
                EventKind::Injecting(_) => {
                    self.injecting = true;
                    self.busy = None;
                    self.say_how_to_end(out);
                    if self.options.detach && self.asked.is_none() {
                        return Ok(());
                    }
                }
                EventKind::Recovering { why } => {
                    self.why = Some(why);
                    self.busy = Some("recovering");
                }
                EventKind::Retrying(_) => {
                    self.retried = true;
                    self.asked = None;
                    // The next signal asks at once.
                    self.why = None;
                }
                EventKind::Recovered(recovered) => return self.recovered(&recovered),
                EventKind::Failed(failed) => {
                    return Err(Fail::from(hobble_attach::failure(failed)).told());
                }
                _ => {}
            }
        }
    }

    /// Whether the server is dead, and nobody has taken over in time. Whoever has is watched from then on.
    fn is_without_server(&mut self) -> bool {
        if !self.watch.as_ref().is_some_and(Watch::server_is_dead) {
            self.dead_since = None;
            return false;
        }
        let since = *self.dead_since.get_or_insert_with(Instant::now);
        if let Some(watch) = Watch::of(&self.session) {
            self.watch = Some(watch);
            self.dead_since = None;
            return false;
        }
        since.elapsed() > TAKEN_OVER_WITHIN
    }

    fn say_how_to_end(&self, out: &mut Out) {
        let id = self.session.id();
        let end = match self.options.lifetime {
            Lifetime::For(time) => format!("recovers in {}, or", human_duration(time)),
            Lifetime::Forever => "recovers only".to_owned(),
        };
        if self.options.detach {
            out.note("note:", &format!("{end} by `hobble recover {id}`"));
        } else {
            out.note("note:", &format!("{end} by Ctrl-C"));
        }
    }

    /// The first signal asks for recovery, a further one is told that it is going on.
    fn look_at_signals(&mut self, seen: &mut usize, out: &mut Out) -> Outcome<()> {
        let count = self.signals.count();
        if count == *seen {
            return Ok(());
        }
        *seen = count;
        if self.asked.is_some() || self.why.is_some() {
            out.warn(
                "warning:",
                "recovery is going on; ending it half way would leave the target on a dead filesystem",
            );
        } else {
            out.note("note:", "recovering");
            self.asked = Some(self.ask()?);
        }
        Ok(())
    }

    /// Asks for recovery on a thread of its own: the answer comes when it is done, and events are to be shown meanwhile.
    fn ask(&self) -> Outcome<Asked> {
        let (sender, receiver) = mpsc::channel();
        let client = self.session.client();
        std::thread::Builder::new()
            .name("recover".to_owned())
            .spawn(move || {
                // Nobody listens any more when the events told the end first.
                let _ = sender.send(client.and_then(|mut client| client.interrupt().map(drop)));
            })
            .map_err(|error| {
                Fail::failed(error)
                    .context("cannot ask for recovery")
                    .needing_recovery()
            })?;
        Ok(receiver)
    }

    /// A refused recovery is told, and the next signal asks again.
    fn look_at_answer(&mut self, out: &mut Out) {
        let Some(asked) = &self.asked else { return };
        match asked.try_recv() {
            // A recovery that failed is told by its event.
            Ok(Err(error)) if error.exit_code() == ExitCode::NeedsRecovery => self.asked = None,
            Ok(Err(error)) if !self.session.ended() => {
                Fail::from(error)
                    .hint(format!(
                        "`hobble recover --force {}` goes on regardless",
                        self.session.id()
                    ))
                    .told()
                    .report(out);
                self.asked = None;
            }
            Ok(_) | Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
        }
    }

    fn recovered(&self, recovered: &Recovered) -> Outcome<()> {
        if !recovered.left.is_empty() {
            return Err(Fail::failed(anyhow!("not everything could be put back"))
                .step("recover")
                .hint(format!("hobble recover {}", self.session.id()))
                .needing_recovery()
                .told());
        }
        match self.why {
            Some(Why::TargetExit) => Err(Fail::failed(anyhow!("the target has exited"))
                .step("recover")
                .exiting(ExitCode::TargetVanished.code())
                .told()),
            Some(why @ (Why::LostServer | Why::LostLease | Why::HookLost | Why::Failed)) => {
                Err(Fail::failed(anyhow!("ended early: {}", why.meaning()))
                    .step("recover")
                    .exiting(ExitCode::RolledBack.code())
                    .told())
            }
            _ if !self.injecting => Err(Fail::failed(anyhow!(
                "interrupted before any rule was in force"
            ))
            .step("inject")
            .exiting(ExitCode::RolledBack.code())
            .told()),
            _ => Ok(()),
        }
    }

    fn ended_without_a_word(&self) -> Fail {
        Fail::failed(anyhow!(
            "attachment {} ended without saying how",
            self.session.id()
        ))
        .step("control")
        .about(self.session.id())
        .hint(format!(
            "hobble show {0}; hobble recover {0}",
            self.session.id()
        ))
        .needing_recovery()
    }

    /// The event without those degradations that have been told before: pre-flight and attaching find the same ones.
    fn untold(&mut self, event: &Event) -> Event {
        let mut event = event.clone();
        let reasons = match &mut event.kind {
            EventKind::Preflight(preflight) => &mut preflight.reasons,
            EventKind::Attached(attached) => &mut attached.degraded,
            _ => return event,
        };
        reasons.retain(|reason| self.told.insert(reason.code.clone()));
        event
    }

    /// The server is dead or cannot be heard any more: its holder puts everything back, and that is waited for.
    fn lost(&self, error: AttachError, out: &mut Out) -> Fail {
        let id = self.session.id();
        let recovering = EventKind::Recovering {
            why: Why::LostServer,
        };
        out.event(&Event::new(Timestamp::now(), id, recovering.clone()));
        out.progress_done();
        if !out.is_json() {
            print(
                out,
                render::event(&Event::new(Timestamp::now(), id, recovering)),
            );
        }
        let state_dir = &self.options.state_dir;
        let afterwards =
            Watch::afterwards(self.watch.as_ref(), state_dir, id, HOLDER_WITHIN, || {
                out.progress(Instant::now(), "waiting for the holder");
            });
        let fail = Fail::from(error).about(id);
        match afterwards {
            Afterwards::PutBack => fail
                .context(format!(
                    "attachment {id} ended early; its holder has put everything back"
                ))
                .exiting(ExitCode::RolledBack.code()),
            Afterwards::StillThere => fail
                .context(format!("attachment {id} is without a server"))
                .hint(format!("hobble recover {id}"))
                .needing_recovery(),
        }
    }
}

fn progress_text(progress: &Progress) -> String {
    let phase = printable(&progress.phase);
    if progress.total > 0 {
        format!("attaching: {phase} {}/{}", progress.done, progress.total)
    } else {
        format!("attaching: {phase}")
    }
}
