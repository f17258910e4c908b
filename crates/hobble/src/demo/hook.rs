//! The demo's attachment: made, given rules, watched and taken away through the same calls as any other.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use hobble_api::event::{Attached, EventKind, Recovered};
use hobble_attach::{InjectOptions, Lifetime, Session};

use super::report::Reporter;
use crate::cli::Global;
use crate::experiment;

/// The attachment ends by itself after this long, should the demo and everything else fail to end it.
const LIFETIME: Duration = Duration::from_secs(300);
/// How long attaching or recovering may take.
const CHANGE_WITHIN: Duration = Duration::from_secs(30);
/// How often waits look whether they were interrupted.
const LOOK: Duration = Duration::from_millis(50);

/// The options of the demo's attachment: no rules at first.
pub(super) fn options(pid: u32, directory: &Path, global: &Global, seed: u64) -> InjectOptions {
    let mut options = InjectOptions::new(i32::try_from(pid).unwrap_or(i32::MAX), directory);
    options.state_dir.clone_from(&global.state_dir);
    options.lifetime = Lifetime::For(LIFETIME);
    options.seed = Some(seed);
    options
}

/// A live attachment.
pub(super) struct Hook {
    session: Session,
    attached: Attached,
}

impl Hook {
    /// Attaches and waits until the target runs on the hook.
    pub(super) fn attach(
        options: &InjectOptions,
        reporter: &mut Reporter<'_>,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> anyhow::Result<Self> {
        let session = hobble_attach::inject(options)?;
        let mut hook = Self {
            session,
            attached: Attached::default(),
        };
        match hook.until_injecting(reporter, interrupted) {
            Ok(()) => Ok(hook),
            Err(error) => match hook.abandon() {
                Ok(()) => Err(error),
                Err(worse) => {
                    Err(error.context(format!("putting things back failed as well: {worse:#}")))
                }
            },
        }
    }

    fn until_injecting(
        &mut self,
        reporter: &mut Reporter<'_>,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> anyhow::Result<()> {
        let until = Instant::now() + CHANGE_WITHIN;
        while Instant::now() < until {
            anyhow::ensure!(!interrupted(), "interrupted");
            let Some(event) = self.session.next_event(LOOK)? else {
                anyhow::ensure!(
                    !self.session.ended(),
                    "the attachment ended before it was complete"
                );
                continue;
            };
            reporter.event(&event);
            match event.kind {
                EventKind::Attached(attached) => self.attached = attached,
                EventKind::Injecting(_) => return Ok(()),
                EventKind::Failed(failed) => return Err(hobble_attach::failure(failed).into()),
                _ => {}
            }
        }
        anyhow::bail!("attaching took longer than {} s", CHANGE_WITHIN.as_secs())
    }

    /// How long the target stood still when it was attached, as Hobble measured it.
    pub(super) fn attach_pause(&self) -> Duration {
        Duration::from_micros(self.attached.pause_us)
    }

    /// Passes on events for so long.
    pub(super) fn watch(
        &mut self,
        time: Duration,
        reporter: &mut Reporter<'_>,
    ) -> anyhow::Result<()> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            match self.session.next_event(left)? {
                Some(event) => {
                    reporter.event(&event);
                    if let EventKind::Failed(failed) = event.kind {
                        return Err(hobble_attach::failure(failed).into());
                    }
                }
                None => anyhow::ensure!(
                    !self.session.ended(),
                    "the attachment ended in the middle of the demo"
                ),
            }
        }
    }

    /// Puts one rule in force instead of those that were.
    pub(super) fn update(
        &mut self,
        fault: &str,
        seed: u64,
        reporter: &mut Reporter<'_>,
    ) -> anyhow::Result<()> {
        let document = experiment::document_of_fault(fault)?;
        self.session
            .client()?
            .update(serde_json::to_value(document)?, Some(seed))?;
        reporter.rule(fault);
        Ok(())
    }

    /// How often the rules in force have fired.
    pub(super) fn injected(&mut self) -> anyhow::Result<u64> {
        Ok(self
            .session
            .client()?
            .status()?
            .rules
            .iter()
            .map(|rule| rule.injected)
            .sum())
    }

    /// Puts everything back and says how that went.
    pub(super) fn recover(&mut self, reporter: &mut Reporter<'_>) -> anyhow::Result<Recovered> {
        self.try_recover(&mut |event| reporter.event(event))
    }

    fn try_recover(
        &mut self,
        each: &mut dyn FnMut(&hobble_api::event::Event),
    ) -> anyhow::Result<Recovered> {
        self.session.recover(false).context("recover")?;
        let until = Instant::now() + CHANGE_WITHIN;
        while Instant::now() < until {
            let Some(event) = self.session.next_event(LOOK)? else {
                anyhow::ensure!(
                    !self.session.ended(),
                    "the attachment ended without saying that it recovered"
                );
                continue;
            };
            each(&event);
            match event.kind {
                EventKind::Recovered(recovered) => return Ok(recovered),
                EventKind::Failed(failed) => return Err(hobble_attach::failure(failed).into()),
                _ => {}
            }
        }
        anyhow::bail!("recovering took longer than {} s", CHANGE_WITHIN.as_secs())
    }

    /// Puts everything back when the demo is broken off. An attachment that has ended by itself is no error.
    pub(super) fn abandon(mut self) -> anyhow::Result<()> {
        if self.session.ended() {
            return Ok(());
        }
        match self.try_recover(&mut |_| {}) {
            Ok(_) => Ok(()),
            Err(_) if self.session.ended() => Ok(()),
            Err(error) => Err(error),
        }
    }
}
