//! How a command fails: an exit code, a chain of causes and a hint.
//!
//! Invariant: every way out of the program that is not success goes through [`Fail`], so that scripts find the documented
//! exit code and people find `error:`, `caused by:` and `hint:` on standard error.

use hobble_api::Timestamp;
use hobble_api::event::{Event, EventKind, Failed};
use hobble_api::exit::ExitCode;
use hobble_attach::AttachError;

use crate::out::Out;

/// More mistakes than this tell nobody anything; `hobble check --json` has them all.
const MISTAKES_SHOWN: usize = 50;

/// One of several mistakes found together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mistake {
    /// Where and what.
    pub(crate) text: String,
    /// What would be right.
    pub(crate) hint: Option<String>,
}

/// The reason why a command did not do what it was asked to do.
#[derive(Debug)]
pub(crate) struct Fail {
    /// What the shell is told.
    code: u8,
    /// The step that failed, in the words of the `failed` event.
    step: String,
    /// The attachment concerned; empty when there is none.
    id: String,
    /// Outermost first.
    error: anyhow::Error,
    /// What `error` sums up; printed instead of it when there is any.
    mistakes: Vec<Mistake>,
    hint: Option<String>,
    rolled_back: bool,
    /// The `failed` event of this failure has been written already.
    told: bool,
}

/// The result of a command.
pub(crate) type Outcome<T> = Result<T, Fail>;

impl Fail {
    /// The command line or the specification is wrong.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            code: ExitCode::Usage.code(),
            step: "options".to_owned(),
            id: String::new(),
            error: anyhow::Error::msg(message.into()),
            mistakes: Vec::new(),
            hint: None,
            rolled_back: true,
            told: false,
        }
    }

    /// Anything else that went wrong before a target was touched.
    pub(crate) fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: ExitCode::Failed.code(),
            step: "options".to_owned(),
            id: String::new(),
            error: error.into(),
            mistakes: Vec::new(),
            hint: None,
            rolled_back: true,
            told: false,
        }
    }

    /// The specification is wrong in these ways.
    pub(crate) fn mistakes(mistakes: Vec<Mistake>) -> Self {
        let all: Vec<&str> = mistakes
            .iter()
            .take(MISTAKES_SHOWN)
            .map(|mistake| mistake.text.as_str())
            .collect();
        let mut fail = Self::usage(all.join("; "));
        fail.mistakes = mistakes;
        fail
    }

    /// Says what to do about it.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Puts a message in front of the chain of causes.
    pub(crate) fn context(mut self, message: impl Into<String>) -> Self {
        self.error = self.error.context(message.into());
        self
    }

    /// Names the step that failed.
    pub(crate) fn step(mut self, step: impl Into<String>) -> Self {
        self.step = step.into();
        self
    }

    /// Names the attachment concerned.
    pub(crate) fn about(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Exits with another code.
    pub(crate) fn exiting(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The target is not as it was.
    pub(crate) fn needing_recovery(mut self) -> Self {
        self.rolled_back = false;
        self.code = ExitCode::NeedsRecovery.code();
        self
    }

    /// The `failed` event has been written by the attachment itself.
    pub(crate) fn told(mut self) -> Self {
        self.told = true;
        self
    }

    /// What the shell is told.
    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    /// Prints it: for people on standard error, and with `--json` as a `failed` event on standard output.
    pub(crate) fn report(&self, out: &mut Out) {
        for mistake in self.mistakes.iter().take(MISTAKES_SHOWN) {
            out.error("error:", &mistake.text);
            if let Some(hint) = &mistake.hint {
                out.note("hint:", hint);
            }
        }
        if let Some(more @ 1..) = self.mistakes.len().checked_sub(MISTAKES_SHOWN) {
            out.note("note:", &format!("and {more} more"));
        }
        if self.mistakes.is_empty() {
            let mut chain = self.error.chain();
            if let Some(first) = chain.next() {
                out.error("error:", &first.to_string());
            }
            for cause in chain {
                out.note("caused by:", &cause.to_string());
            }
        }
        if let Some(hint) = &self.hint {
            out.note("hint:", hint);
        }
        if out.is_json() && !self.told {
            let failed = EventKind::Failed(self.as_failed());
            out.event(&Event::new(Timestamp::now(), self.id.as_str(), failed));
        }
    }

    fn as_failed(&self) -> Failed {
        let cause: Vec<String> = self.error.chain().map(ToString::to_string).collect();
        Failed {
            step: self.step.clone(),
            cause: cause.join(": "),
            hint: self.hint.clone(),
            rolled_back: self.rolled_back,
            exit: None,
        }
    }
}

impl From<AttachError> for Fail {
    fn from(error: AttachError) -> Self {
        Self {
            code: error.exit_code().code(),
            step: error.step().name().to_owned(),
            id: String::new(),
            mistakes: Vec::new(),
            hint: error.hint().map(str::to_owned),
            rolled_back: error.rolled_back(),
            told: false,
            error: anyhow::Error::new(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_mistakes_are_cut_short() {
        let mistake = |number| Mistake {
            text: format!("mistake {number}."),
            hint: None,
        };
        let fail = Fail::mistakes((0..MISTAKES_SHOWN + 5).map(mistake).collect());
        assert_eq!(fail.code(), 2);
        assert_eq!(
            fail.as_failed().cause.matches("mistake").count(),
            MISTAKES_SHOWN
        );
    }

    #[test]
    fn the_event_has_the_whole_chain() {
        let cause = std::io::Error::from_raw_os_error(2);
        let fail = Fail::failed(cause)
            .context("cannot read x")
            .step("journal")
            .hint("look")
            .needing_recovery();
        let failed = fail.as_failed();
        assert_eq!(
            failed.cause,
            "cannot read x: No such file or directory (os error 2)"
        );
        assert_eq!(
            (failed.step.as_str(), failed.hint.as_deref()),
            ("journal", Some("look"))
        );
        assert!(!failed.rolled_back);
        assert_eq!(fail.code(), 5);
    }
}
