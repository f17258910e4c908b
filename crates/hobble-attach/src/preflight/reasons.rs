//! The reasons that pre-flight collects.
//!
//! Invariant: a reason to degrade is said once, however many processes it holds for.

use hobble_api::exit::ExitCode;
use hobble_api::status::Reason;

#[derive(Default)]
pub(super) struct Reasons {
    pub(super) refuse: Vec<(Reason, ExitCode)>,
    pub(super) degraded: Vec<Reason>,
}

impl Reasons {
    pub(super) fn refuse(&mut self, code: &str, text: impl Into<String>, hint: Option<&str>) {
        self.refuse_with(code, text, hint, ExitCode::Failed);
    }

    pub(super) fn refuse_with(
        &mut self,
        code: &str,
        text: impl Into<String>,
        hint: Option<&str>,
        exit: ExitCode,
    ) {
        self.refuse.push((
            Reason {
                code: code.to_owned(),
                text: text.into(),
                hint: hint.map(str::to_owned),
            },
            exit,
        ));
    }

    pub(super) fn degrade(&mut self, code: &str, text: impl Into<String>, hint: Option<&str>) {
        let reason = Reason {
            code: code.to_owned(),
            text: text.into(),
            hint: hint.map(str::to_owned),
        };
        if !self.degraded.contains(&reason) {
            self.degraded.push(reason);
        }
    }
}

/// The exit code of a refusal: that the target has gone matters more than what else is wrong.
pub(super) fn exit_of(refusals: &[(Reason, ExitCode)]) -> Option<ExitCode> {
    let vanished = refusals
        .iter()
        .any(|(_, exit)| *exit == ExitCode::TargetVanished);
    if vanished {
        Some(ExitCode::TargetVanished)
    } else {
        refusals.first().map(|(_, exit)| *exit)
    }
}
