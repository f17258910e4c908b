//! What processes hold is exchanged, all of it, in one stop.

mod target;

use std::time::Duration;

use hobble_graft::census::Census;
use hobble_graft::ids::ProcessId;
use hobble_graft::stop::{Deadline, Tracer};
use hobble_graft::switch::{NoHandover, Report, Step, Switch, SwitchFailed};
use target::Target;
use target::volume::{Side, Volume};

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Stop(#[from] hobble_graft::stop::StopError),
    #[error(transparent)]
    Switch(#[from] SwitchFailed),
}

fn budget() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

/// Everything to the given side.
fn switch<'c>(volume: &Volume, census: &'c Census, side: Side) -> Switch<'c> {
    let mut switch = Switch::new(census);
    for description in census.descriptions() {
        switch.description(description.id, volume.stand_in(description, side));
    }
    for file in census.mapped_files() {
        let access = if file.is_writable { rustix::fs::OFlags::RDWR } else { rustix::fs::OFlags::RDONLY };
        switch.mapped_file(file.id, volume.open(&volume.relative(&file.facts), access, side));
    }
    for fs in census.fs_structs() {
        let open = |d: &hobble_graft::census::Directory| {
            volume.open(&volume.relative(&d.facts), rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY, side)
        };
        if let Some(cwd) = &fs.cwd {
            switch.working_directory(fs.id, open(cwd));
        }
        if let Some(root) = &fs.root {
            switch.root_directory(fs.id, open(root));
        }
    }
    switch
}

/// Moves everything to the given side in one stop; gives the report and how long the targets stood still.
fn move_all(volume: &Volume, processes: &[ProcessId], side: Side) -> (Report, Duration) {
    let census = volume.census(processes);
    let switch = switch(volume, &census, side);
    let (report, released) = Tracer::scope(|tracer| -> Result<_, Failed> {
        let mut stopped = tracer.stop_all(processes, budget())?;
        let mut steps: Vec<Step> = Vec::new();
        let report = switch.apply(&mut stopped, budget(), &mut steps, &mut NoHandover)?;
        assert!(!steps.is_empty() || report.descriptors == 0);
        Ok((report, stopped.release()))
    })
    .unwrap();
    drop(switch);
    drop(census);
    assert_eq!(report.not_moved, []);
    let after = volume.census(processes);
    for description in after.descriptions() {
        assert_eq!(volume.side_of(&description.facts), side, "{:?}", description.facts);
    }
    for file in after.mapped_files() {
        assert_eq!(volume.side_of(&file.facts), side, "{:?}", file.facts);
    }
    for fs in after.fs_structs() {
        for directory in fs.cwd.iter().chain(&fs.root) {
            assert_eq!(volume.side_of(&directory.facts), side, "{:?}", directory.facts);
        }
    }
    (report, released.stood_still)
}

/// Opens argv[2] descriptors on argv[1], each with a position, flags and close-on-exec of its own, and checks them when told to.
const MANY: &str = r#"
int main(int argc, char **argv) {
    int n = atoi(argv[2]);
    int *fds = calloc(n, sizeof *fds);
    for (int i = 0; i < n; i++) {
        int flags = (i % 3 == 0 ? O_CLOEXEC : 0) | (i % 5 == 0 ? O_APPEND : 0) | (i % 7 == 0 ? O_NONBLOCK : 0);
        check((fds[i] = open(argv[1], (i % 2 ? O_RDONLY : O_RDWR) | flags)) >= 0);
        check(lseek(fds[i], i, SEEK_SET) == i);
    }
    int copy = n > 1 ? dup(fds[1]) : -1;
    ready();
    for (;;) {
        wait_for_line();
        for (int i = 0; i < n; i++) {
            int flags = (i % 2 ? O_RDONLY : O_RDWR) | (i % 5 == 0 ? O_APPEND : 0) | (i % 7 == 0 ? O_NONBLOCK : 0);
            check((fcntl(fds[i], F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == flags);
            check(fcntl(fds[i], F_GETFD) == (i % 3 == 0 ? FD_CLOEXEC : 0));
            check(lseek(fds[i], 0, SEEK_CUR) == i);
            unsigned char c;
            check(read(fds[i], &c, 1) == 1 && c == (unsigned char)(i * 7));
            check(lseek(fds[i], i, SEEK_SET) == i);
        }
        if (copy >= 0) {
            check(lseek(copy, 3, SEEK_SET) == 3 && lseek(fds[1], 0, SEEK_CUR) == 3);
            check(lseek(copy, 1, SEEK_SET) == 1);
        }
        say("ok");
    }
}
"#;

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7) as u8).collect()
}

#[test]
fn descriptors_move_there_and_back_in_one_stop() {
    for count in [1, 100, 1_000, 5_000] {
        let volume = Volume::new();
        let path = volume.file("data", &content(8192));
        let number = count.to_string();
        let mut target = Target::c_with("many", MANY, &[path.as_os_str(), number.as_ref()]);
        let before = target.fingerprint();
        let expected = count + usize::from(count > 1);
        let mut stops = Vec::new();
        for round in 0..6 {
            let side = if round % 2 == 0 { Side::Clone } else { Side::Native };
            let (report, stood_still) = move_all(&volume, &[target.id()], side);
            assert_eq!((report.descriptions, report.descriptors), (count, expected));
            target.tell("check");
            assert_eq!(target.line(), "ok");
            stops.push(stood_still);
        }
        assert_eq!(target.fingerprint(), before);
        stops.sort();
        eprintln!("{count} descriptors: stood still {:?} (median), {:?} to {:?}", stops[stops.len() / 2], stops[0], stops[stops.len() - 1]);
    }
}
