//! git clones, collects garbage and checks inside an attachment with faults that it survives: no damage.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use hobble_e2e::{rule_count, scene};
use hobble_testkit::command::run;
use hobble_testkit::target::{Target, text};
use hobble_testkit::volume::Kind;

/// A shell that runs each line it is given and answers whether that went well.
const SHELL: &str = r#"
echo '{"ready":true,"pids":['$$']}'
while read -r line; do
    [ "$line" = quit ] && { echo '{"errors":[]}'; exit 0; }
    if said=$(eval "$line" 2>&1); then
        echo '{"errors":[]}'
    else
        printf '{"errors":["%s"]}\n' "$(printf %s "$line: $said" | tr -c 'a-zA-Z0-9 .,:/_-' ' ' | head -c 500)"
    fi
done
"#;

fn make_repository(at: &str) -> Result<()> {
    let script = format!(
        "set -e; git init -q '{at}'; cd '{at}'; git config user.email a@example.invalid; git config user.name a; \
         for i in $(seq 60); do mkdir -p d$((i % 7)); seq $i 400 > d$((i % 7))/f$i; git add .; git commit -q -m $i; done"
    );
    run(
        Command::new("bash")
            .args(["-c", &script])
            .env("GIT_CONFIG_NOSYSTEM", "1"),
        Duration::from_secs(120),
    )
    .map(drop)
}

#[test]
fn clone_gc_and_fsck_find_no_damage() -> Result<()> {
    scene(Kind::Ext4, |hobble, volume| {
        let at = text(volume.path())?;
        make_repository(&format!("{at}/origin"))?;
        let mut command = Command::new("bash");
        command.args(["-c", SHELL]).current_dir(volume.path());
        let mut shell = Target::start_command(command)?;
        let injection = hobble.attach(
            shell.pid(),
            volume.path(),
            &[
                "--fault",
                "latency=2ms op=write,fsync percent=30",
                "--fault",
                "latency=1ms op=read,open percent=10",
            ],
        )?;
        shell.expect("git clone -q --no-local origin clone")?;
        shell.expect("git -C clone repack -q -a -d")?;
        shell.expect("git -C clone gc -q --aggressive --prune=now")?;
        shell.expect("git -C clone fsck --full --strict")?;
        shell.expect("cd clone; for i in 1 2 3; do echo $i > new; git add new; git -c user.name=a -c user.email=a@example.invalid commit -q -m n$i; done")?;
        let recovered = injection.recover()?;
        ensure!(
            rule_count(&recovered, "latency-1", "injected")? > 0,
            "{recovered}"
        );
        shell.expect("git fsck --full --strict; git log --oneline > log; cd ..")?;
        shell.finish()?;
        let check = format!(
            "set -e; cd '{at}/clone'; git fsck --full --strict; git status --porcelain; test $(git rev-list --count HEAD) = 63; diff -r -x .git -x new -x log . ../origin"
        );
        run(
            Command::new("bash").args(["-c", &check]),
            Duration::from_secs(60),
        )
        .map(drop)
    })
}
