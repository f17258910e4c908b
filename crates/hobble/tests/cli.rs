//! The command line from outside: help, usage errors, diagnostics, JSON shapes and generated files. No test here needs root or
//! touches a process; those live with the end-to-end tests.
//!
//! Texts are compared with files in `tests/snapshots`. `HOBBLE_BLESS=1 cargo test -p hobble --test cli` rewrites them; look at
//! the difference before committing it.

// The helpers are test code too; Clippy's exception knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use serde_json::Value;

const COMMANDS: [&str; 14] = [
    "inject",
    "exec",
    "ps",
    "show",
    "update",
    "pause",
    "resume",
    "renew",
    "recover",
    "events",
    "check",
    "doctor",
    "completions",
    "man",
];

/// The program with an empty state directory and nothing of the caller's environment that it listens to.
fn hobble(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("hobble").unwrap();
    for variable in [
        "HOBBLE_STATE_DIR",
        "HOBBLE_LOG",
        "HOBBLE_FAULT_POINT",
        "HOBBLE_MASK",
    ] {
        command.env_remove(variable);
    }
    command.args(arguments);
    command
}

fn output(arguments: &[&str]) -> Output {
    hobble(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What a user sees: exit code, standard output, standard error.
fn transcript(arguments: &[&str], output: &Output) -> String {
    let mut transcript = format!("$ hobble {}\n", arguments.join(" "));
    transcript.push_str(&text(&output.stdout));
    for line in text(&output.stderr).lines() {
        writeln!(transcript, "! {line}").unwrap();
    }
    writeln!(transcript, "= {}", output.status.code().unwrap()).unwrap();
    transcript
}

fn snapshot(name: &str, found: &str) {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/snapshots")
        .join(name);
    if std::env::var_os("HOBBLE_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == found,
        "{} differs (HOBBLE_BLESS=1 rewrites it).\n--- expected\n{expected}\n--- found\n{found}",
        path.display()
    );
}

#[test]
fn help_of_every_command() {
    let mut all = String::new();
    let help = text(&output(&["--help"]).stdout);
    // The demo is there or not, depending on a feature.
    all.extend(
        help.lines()
            .filter(|line| !line.starts_with("  demo "))
            .map(|line| format!("{line}\n")),
    );
    for command in COMMANDS {
        let found = output(&[command, "--help"]);
        assert!(
            found.status.success() && found.stderr.is_empty(),
            "{command}"
        );
        write!(all, "\n######## {command}\n\n{}", text(&found.stdout)).unwrap();
    }
    snapshot("help.txt", &all);
}

#[test]
fn every_command_that_changes_something_has_examples_in_its_help() {
    for command in [
        "inject",
        "exec",
        "update",
        "recover",
        "check",
        "completions",
        "man",
    ] {
        assert!(
            text(&output(&[command, "--help"]).stdout).contains("\nExamples:\n"),
            "{command}"
        );
    }
}

#[test]
fn usage_errors() {
    let cases: &[&[&str]] = &[
        &[],
        &["inejct"],
        &["inject", "--pid", "0", "--path", "/d", "--no-rules"],
        &["inject", "--pid", "1"],
        &["inject", "--path", "/d", "--no-rules"],
        &["inject", "--pid", "1", "--path", "/d"],
        &["inject", "--pid", "1", "--path", "d", "--no-rules"],
        &[
            "inject",
            "--pid",
            "1",
            "--path",
            "/d",
            "--no-rules",
            "--fault",
            "errno=EIO",
        ],
        &[
            "inject",
            "--pid",
            "1",
            "--path",
            "/d",
            "--no-rules",
            "--dry-run",
            "--detach",
        ],
        &[
            "inject",
            "--pid",
            "1",
            "--path",
            "/d",
            "--no-rules",
            "--for",
            "-3s",
        ],
        &[
            "inject",
            "--pid",
            "1",
            "--path",
            "/d",
            "--no-rules",
            "--for",
            "10",
        ],
        &[
            "inject",
            "--pid",
            "1",
            "--path",
            "/d",
            "--no-rules",
            "--max-pause",
            "0s",
        ],
        &[
            "inject",
            "--pid",
            "1",
            "--path",
            "/d",
            "--no-rules",
            "--scope",
            "pod",
        ],
        &[
            "inject",
            "--pid",
            "1",
            "--path",
            "/d",
            "--no-rules",
            "--seed",
            "-1",
        ],
        &["exec", "--path", "/d"],
        &["exec", "--", "true"],
        &["update"],
        &["recover", "abcd", "--all"],
        &["doctor", "--pid", "1"],
        &["check"],
        &["completions", "tcsh"],
    ];
    let mut all = String::new();
    for case in cases {
        let found = output(case);
        let code = found.status.code().unwrap();
        // The small exit codes of `exec` belong to its command.
        let expected = if case.first() == Some(&"exec") {
            125
        } else {
            2
        };
        assert_eq!(code, expected, "{case:?}");
        assert!(found.stdout.is_empty(), "{case:?}: {}", text(&found.stdout));
        let shown = transcript(case, &found);
        // Without arguments the whole help is shown, and that has a snapshot of its own.
        if !case.is_empty() {
            all.push_str(&shown);
            all.push('\n');
        }
    }
    snapshot("usage.txt", &all);
}

#[test]
fn diagnostics_of_check() {
    let directory = tempfile::tempdir().unwrap();
    let spec = "version: 1\nvolume: data\nduration: -5m\nrules:\n  - name: a\n    op: [wirte]\n    when: { percent: 101 }\n    \
                fault: { errno: EIOO }\n  - name: b\n    opp: read\n    fault: { latncy: 20ms }\n";
    std::fs::write(directory.path().join("wrong.yaml"), spec).unwrap();
    let right = "version: 1\nrules:\n  - { name: slow, op: [fsync], fault: { latency: 20ms } }\n";
    std::fs::write(directory.path().join("right.yaml"), right).unwrap();
    let cases: &[&[&str]] = &[
        &["check", "wrong.yaml"],
        &["check", "right.yaml"],
        &[
            "check",
            "right.yaml",
            "--fault",
            "errno=EIO op=write percent=10",
        ],
        &["check", "right.yaml", "-o", "json"],
        &["check", "--fault", "corrupt=zero op=write"],
        &["check", "--fault", "errno=EIO op=access"],
        &[
            "check",
            "--fault",
            "latency=20ms jitter=5ms op=write,fsync path=pg_wal/** percent=10",
            "-o",
            "yaml",
        ],
        &["check", "--fault", "hang=1s"],
        &["check", "missing.yaml"],
    ];
    let mut all = String::new();
    for case in cases {
        let found = hobble(case).current_dir(directory.path()).output().unwrap();
        all.push_str(&transcript(case, &found));
        all.push('\n');
    }
    snapshot("check.txt", &all);
}

#[test]
fn check_reads_standard_input_and_converts_back_and_forth() {
    let yaml = output(&[
        "check",
        "--fault",
        "errno=ENOSPC op=write times=3",
        "-o",
        "yaml",
    ])
    .stdout;
    let json = hobble(&["check", "-", "-o", "json"])
        .write_stdin(yaml.clone())
        .output()
        .unwrap();
    assert!(json.status.success(), "{}", text(&json.stderr));
    assert_eq!(
        serde_json::from_slice::<Value>(&json.stdout).unwrap()["rules"][0]["fault"]["errno"],
        "ENOSPC"
    );
    let again = hobble(&["check", "-", "-o", "yaml"])
        .write_stdin(json.stdout)
        .output()
        .unwrap();
    assert_eq!(text(&again.stdout), text(&yaml));
}

#[test]
fn check_has_one_json_object() {
    let found = output(&["check", "--json", "--fault", "errno=EIO op=write"]);
    let report: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(
        (&report["v"], &report["ok"]),
        (&Value::from(1), &Value::from(true))
    );
    assert_eq!(report["rules"][0]["name"], "errno-1");
    let found = output(&["check", "--json", "--fault", "errno=EIOO op=wirte"]);
    assert_eq!(found.status.code(), Some(2));
    let report: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let diagnostics = report["diagnostics"].as_array().unwrap();
    assert_eq!(diagnostics.len(), 2, "{report}");
    assert!(
        diagnostics
            .iter()
            .all(|diagnostic| diagnostic["severity"] == "error" && diagnostic["column"].is_u64())
    );
}

#[test]
fn hostile_specifications_are_refused_quickly() {
    let began = std::time::Instant::now();
    let nonsense: Vec<u8> = (0..10 * 1024 * 1024_u32)
        .map(|index| b"{[:&*- \n\"a1"[(index.wrapping_mul(2_654_435_761) >> 13) as usize % 11])
        .collect();
    let deep = "[".repeat(500_000);
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d \
                [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
    for spec in [
        nonsense,
        deep.into_bytes(),
        bomb.as_bytes().to_vec(),
        vec![0xff, 0xfe],
        Vec::new(),
    ] {
        let found = hobble(&["check", "-"]).write_stdin(spec).output().unwrap();
        assert_eq!(found.status.code(), Some(2), "{}", text(&found.stderr));
        assert!(
            text(&found.stderr).starts_with("error: "),
            "{}",
            text(&found.stderr)
        );
    }
    assert!(
        began.elapsed() < std::time::Duration::from_secs(20),
        "took {:?}",
        began.elapsed()
    );
}

/// Every mistake that Hobble itself finds is also a `failed` line on standard output.
#[test]
fn failures_are_json_lines_too() {
    let found = output(&["inject", "--pid", "1", "--path", "/d", "--json"]);
    assert_eq!(found.status.code(), Some(2));
    let line: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(line["event"], "failed");
    assert_eq!(line["v"], 1);
    assert_eq!(line["rolled_back"], true);
    assert!(
        line["cause"].as_str().unwrap().contains("no rule"),
        "{line}"
    );
    assert!(
        line["hint"].as_str().unwrap().contains("--no-rules"),
        "{line}"
    );
    assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
    assert!(line["id"].is_string(), "{line}");
}

/// Whether this is root; `/proc/self` belongs to the effective user (proc(5)).
fn is_root() -> bool {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0
}

/// As somebody else: every command that concerns attachments says that it is root's.
#[test]
fn attachments_are_roots() {
    for arguments in [
        &["ps"][..],
        &["show"],
        &["pause", "abcd"],
        &["recover", "--all"],
        &["inject", "--pid", "1", "--path", "/d", "--no-rules"],
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hobble"));
        if is_root() {
            command = std::process::Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
            // The build directory may be closed to others; the open file is not.
            command
                .arg("/proc/self/fd/0")
                .stdin(std::fs::File::open(env!("CARGO_BIN_EXE_hobble")).unwrap());
        }
        let found = command.args(arguments).output().unwrap();
        let said = text(&found.stderr);
        assert_eq!(found.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(
            said.starts_with("error: only root may"),
            "{arguments:?}: {said}"
        );
        assert!(said.contains("\nhint: "), "{arguments:?}: {said}");
    }
}

#[test]
fn an_empty_state_directory_has_no_attachments() {
    if !is_root() {
        // Then it is the test above that says what happens.
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("not-there");
    let state = state.to_str().unwrap();
    let found = output(&["ps", "--state-dir", state]);
    assert!(found.status.success(), "{}", text(&found.stderr));
    assert_eq!(text(&found.stdout), "nothing is attached\n");
    let found = output(&["ps", "--json", "--state-dir", state]);
    assert!(found.status.success() && found.stdout.is_empty());
    for command in ["show", "pause", "resume", "events"] {
        let found = output(&[command, "--state-dir", state]);
        assert_eq!(found.status.code(), Some(1), "{command}");
        assert_eq!(
            text(&found.stderr),
            "error: nothing is attached\n",
            "{command}"
        );
        let found = output(&[command, "nope", "--state-dir", state]);
        assert_eq!(found.status.code(), Some(1), "{command}");
        assert!(
            text(&found.stderr).starts_with("error: no attachment `nope`\n"),
            "{}",
            text(&found.stderr)
        );
    }
    let found = output(&[
        "update",
        "--fault",
        "errno=EIO op=write",
        "--state-dir",
        state,
    ]);
    assert_eq!(found.status.code(), Some(1));
    assert!(
        !Path::new(state).exists(),
        "asking must not create anything"
    );
}

#[test]
fn the_state_directory_comes_from_the_environment_too() {
    if !is_root() {
        return;
    }
    let found = hobble(&["ps"])
        .env("HOBBLE_STATE_DIR", "/nonexistent/hobble")
        .output()
        .unwrap();
    assert!(found.status.success(), "{}", text(&found.stderr));
    let file = tempfile::NamedTempFile::new().unwrap();
    let found = hobble(&["ps"])
        .env("HOBBLE_STATE_DIR", file.path())
        .output()
        .unwrap();
    assert_eq!(found.status.code(), Some(1), "a file is no state directory");
}

#[test]
fn completions_for_every_shell_know_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let found = output(&["completions", shell]);
        assert!(found.status.success(), "{shell}");
        let script = text(&found.stdout);
        for command in COMMANDS {
            assert!(script.contains(command), "{shell} does not know {command}");
        }
        assert!(
            !script.contains("__serve") && !script.contains("demo-writer"),
            "{shell} offers inner commands"
        );
    }
}

#[test]
fn a_man_page_for_every_command() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("man1");
    let found = output(&["man", target.to_str().unwrap()]);
    assert!(found.status.success(), "{}", text(&found.stderr));
    assert!(text(&std::fs::read(target.join("hobble.1")).unwrap()).contains(".TH hobble 1"));
    for command in COMMANDS {
        let page = text(&std::fs::read(target.join(format!("hobble-{command}.1"))).unwrap());
        assert!(page.contains(".SH SYNOPSIS"), "{command}");
    }
    let blocked = directory.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let found = output(&["man", blocked.to_str().unwrap()]);
    assert_eq!(found.status.code(), Some(1));
    assert!(text(&found.stderr).contains("caused by:"));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let script = format!(
        "{} completions bash | head -c 10",
        env!("CARGO_BIN_EXE_hobble")
    );
    let found = std::process::Command::new("bash")
        .args(["-c", &format!("set -o pipefail; {script}")])
        .output()
        .unwrap();
    assert!(found.status.success(), "{}", text(&found.stderr));
    assert!(found.stderr.is_empty(), "{}", text(&found.stderr));
}

#[test]
fn fault_points_are_listed() {
    let found = output(&["__fault-points"]);
    assert!(found.status.success());
    assert!(text(&found.stdout).lines().any(|point| point == "mounted"));
}
