//! Standard output and standard error.
//!
//! Invariants: standard output carries results and nothing else; with `--json` every line of it is one JSON object (for `exec`,
//! whose standard output belongs to its command, JSON goes to standard error). A reader
//! that goes away (`hobble inject … | head -1`) never ends the command: what it would have read is dropped, because a
//! recovery may still have to be done.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use hobble_api::VERSION;
use hobble_api::event::Event;
use serde::Serialize;

/// Progress is shown once something takes longer than this.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where lines stay, the same progress is not told again sooner than this.
const REPEAT: Duration = Duration::from_secs(10);

/// Colours that are used, by meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Headings.
    Bold,
    /// What is as it should be.
    Good,
    /// What is degraded.
    Warn,
    /// What is wrong.
    Bad,
}

impl Style {
    const fn code(self) -> &'static str {
        match self {
            Style::Bold => "1",
            Style::Good => "32",
            Style::Warn => "33",
            Style::Bad => "31",
        }
    }
}

/// The two streams of the command.
#[derive(Debug)]
pub(crate) struct Out {
    json: bool,
    /// Standard output belongs to somebody else.
    results_aside: bool,
    colour_out: bool,
    colour_err: bool,
    err_is_terminal: bool,
    progress: Option<Progress>,
}

#[derive(Debug)]
struct Progress {
    since: Instant,
    last_line: Option<(Instant, String)>,
    shown: bool,
}

impl Out {
    /// Looks at the streams and at `NO_COLOR` and `TERM`.
    pub(crate) fn new(json: bool) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let err_is_terminal = std::io::stderr().is_terminal();
        Self {
            json,
            results_aside: false,
            colour_out: wanted && !json && std::io::stdout().is_terminal(),
            colour_err: wanted && err_is_terminal,
            err_is_terminal,
            progress: None,
        }
    }

    /// Leaves standard output to somebody else: JSON goes to standard error from now on.
    pub(crate) fn leave_stdout(&mut self) {
        self.results_aside = true;
    }

    /// Whether results are JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Text for standard output in a colour, where colours are shown.
    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        paint(self.colour_out, style, text)
    }

    /// A line of the result, for people; nothing with `--json`.
    pub(crate) fn line(&mut self, text: impl AsRef<str>) {
        if !self.json {
            self.raw(text.as_ref());
        }
    }

    /// A line of standard output whatever the mode.
    pub(crate) fn raw(&mut self, text: &str) {
        self.clear_progress();
        let mut stdout = std::io::stdout().lock();
        // See the invariant: a reader that is gone is nobody's error.
        let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    }

    /// An object of the result, with the format's version in front; nothing without `--json`.
    pub(crate) fn object<T: Serialize>(&mut self, object: &T) {
        #[derive(Serialize)]
        struct Versioned<'a, T> {
            v: u32,
            #[serde(flatten)]
            object: &'a T,
        }
        self.json_line(&Versioned { v: VERSION, object });
    }

    /// An event of the result; nothing without `--json`.
    pub(crate) fn event(&mut self, event: &Event) {
        self.json_line(event);
    }

    fn json_line<T: Serialize>(&mut self, value: &T) {
        if !self.json {
            return;
        }
        match serde_json::to_string(value) {
            Ok(line) if self.results_aside => {
                self.clear_progress();
                let _ = writeln!(std::io::stderr().lock(), "{line}");
            }
            Ok(line) => self.raw(&line),
            Err(error) => self.error(
                "error:",
                &format!("a result cannot be written as JSON: {error}"),
            ),
        }
    }

    /// A line on standard error behind a red word.
    pub(crate) fn error(&mut self, word: &str, text: &str) {
        self.aside(Style::Bad, word, text);
    }

    /// A line on standard error behind a yellow word.
    pub(crate) fn warn(&mut self, word: &str, text: &str) {
        self.aside(Style::Warn, word, text);
    }

    /// A line on standard error behind a bold word.
    pub(crate) fn note(&mut self, word: &str, text: &str) {
        self.aside(Style::Bold, word, text);
    }

    fn aside(&mut self, style: Style, word: &str, text: &str) {
        self.clear_progress();
        let mut line = paint(self.colour_err, style, word);
        let _ = write!(line, " {text}");
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }

    /// Says how far something has come, if it takes long: rewritten in place on a terminal; elsewhere at most one line a
    /// second, and less often when there is nothing new. Ended by [`Out::progress_done`] or by any other output.
    pub(crate) fn progress(&mut self, now: Instant, text: &str) {
        let progress = self.progress.get_or_insert(Progress {
            since: now,
            last_line: None,
            shown: false,
        });
        if now.duration_since(progress.since) < PATIENCE {
            return;
        }
        let mut stderr = std::io::stderr().lock();
        if self.err_is_terminal {
            progress.shown = true;
            let _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
        } else if progress.last_line.as_ref().is_none_or(|(last, said)| {
            let silence = now.duration_since(*last);
            silence >= REPEAT || (silence >= PATIENCE && said != text)
        }) {
            progress.last_line = Some((now, text.to_owned()));
            let _ = writeln!(stderr, "{text}");
        }
    }

    /// What was going on is over; the next progress starts anew.
    pub(crate) fn progress_done(&mut self) {
        self.clear_progress();
        self.progress = None;
    }

    fn clear_progress(&mut self) {
        if let Some(progress) = &mut self.progress
            && progress.shown
        {
            progress.shown = false;
            let mut stderr = std::io::stderr().lock();
            let _ = write!(stderr, "\r\x1b[K").and_then(|()| stderr.flush());
        }
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        self.clear_progress();
    }
}

fn paint(colour: bool, style: Style, text: &str) -> String {
    if colour {
        format!("\x1b[{}m{text}\x1b[0m", style.code())
    } else {
        text.to_owned()
    }
}

/// Columns of text.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns aligned to the right.
    right: Vec<usize>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self {
            rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()],
            right: Vec::new(),
        }
    }

    /// Aligns columns, counted from 0, to the right.
    pub(crate) fn right(mut self, columns: &[usize]) -> Self {
        self.right = columns.to_vec();
        self
    }

    /// Adds a row.
    pub(crate) fn row<I>(&mut self, cells: I)
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The lines of [`Table::lines`], two blanks further in.
    pub(crate) fn indented(&self) -> impl Iterator<Item = String> {
        self.lines().into_iter().map(|line| format!("  {line}"))
    }

    /// Lines of equal columns, two blanks apart, without blanks at the end.
    pub(crate) fn lines(&self) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                self.rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        self.rows
            .iter()
            .map(|row| {
                let mut line = String::new();
                for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                    if column > 0 {
                        line.push_str("  ");
                    }
                    let blanks = " ".repeat(width.saturating_sub(cell.chars().count()));
                    if self.right.contains(&column) {
                        line.push_str(&blanks);
                        line.push_str(cell);
                    } else {
                        line.push_str(cell);
                        line.push_str(&blanks);
                    }
                }
                line.truncate(line.trim_end().len());
                line
            })
            .collect()
    }
}

/// A duration in two significant units at most, for people.
pub(crate) fn human_duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    let seconds = duration.as_secs();
    match (micros, seconds) {
        (0..1_000, _) => format!("{micros} µs"),
        (1_000..100_000, _) => format!("{:.1} ms", duration.as_secs_f64() * 1e3),
        (100_000..1_000_000, _) => format!("{:.0} ms", duration.as_secs_f64() * 1e3),
        (_, 0..60) => format!("{:.1} s", duration.as_secs_f64()),
        (_, 60..3_600) => format!("{}m{:02}s", seconds / 60, seconds % 60),
        (_, 3_600..86_400) => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// A count with its noun: `1 rule`, `3 rules`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ if noun.ends_with('s') => format!("{number} {noun}es"),
        _ => format!("{number} {noun}s"),
    }
}

/// Text from elsewhere made safe for a terminal: control characters are escaped.
pub(crate) fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let mut table = Table::new(&["RULE", "MATCHED", "NOTE"]).right(&[1]);
        table.row(["a", "7", ""]);
        table.row(["longer-name", "1234567890", "x"]);
        assert_eq!(
            table.lines(),
            [
                "RULE            MATCHED  NOTE",
                "a                     7",
                "longer-name  1234567890  x"
            ]
        );
    }

    #[test]
    fn durations_for_people() {
        for (duration, text) in [
            (Duration::from_micros(15), "15 µs"),
            (Duration::from_micros(1_240), "1.2 ms"),
            (Duration::from_millis(250), "250 ms"),
            (Duration::from_millis(2_500), "2.5 s"),
            (Duration::from_secs(61), "1m01s"),
            (Duration::from_secs(3_660), "1h01m"),
            (Duration::from_secs(90_000), "1d01h"),
        ] {
            assert_eq!(human_duration(duration), text);
        }
    }

    #[test]
    fn nouns_follow_their_number() {
        assert_eq!(count(1, "rule"), "1 rule");
        assert_eq!(count(0, "rule"), "0 rules");
        assert_eq!(count(2, "process"), "2 processes");
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b[31mb\nc ä"), "a\\u{1b}[31mb\\nc ä");
    }
}
