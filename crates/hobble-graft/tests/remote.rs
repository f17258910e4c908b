//! Threads are stopped, make system calls for us, and go on as if nothing had been.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod programs;

use std::time::Duration;

use hobble_graft::remote::Borrowed;
use hobble_graft::stop::{Deadline, StopError, Tracer};
use programs::Target;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

#[test]
fn a_borrowed_thread_makes_calls_and_leaves_nothing_behind() {
    let target = Target::c(
        "busy",
        r#"
        int main(void) { ready(); for (volatile unsigned long i = 0;; i++) {} }
    "#,
    );
    let before = target.fingerprint();
    for _ in 0..50 {
        let pid = Tracer::scope(|tracer| -> Result<_, hobble_graft::remote::RemoteError> {
            let mut stopped = tracer.stop_all(&[target.id()], soon())?;
            let mut borrowed = Borrowed::open(
                &mut stopped,
                target.id(),
                target.pid().leader(),
                soon(),
                &mut |_| Ok(()),
            )?;
            let pid = borrowed.system_call(libc::SYS_getpid, [0; 6], soon())?;
            let bad = borrowed.system_call(libc::SYS_close, [9999, 0, 0, 0, 0, 0], soon())?;
            assert_eq!(bad, Err(rustix::io::Errno::BADF));
            borrowed.close()?;
            stopped.release();
            Ok(pid)
        })
        .unwrap();
        assert_eq!(pid, Ok(target.pid().as_raw() as u64));
    }
    assert_eq!(target.fingerprint(), before);
    assert!(target.is_running());
}

#[test]
fn what_cannot_be_stopped_is_named() {
    let own = hobble_graft::ids::ProcessId::own().unwrap();
    let error = Tracer::scope(|t| t.stop_all(&[own], soon()).map(drop)).unwrap_err();
    assert!(matches!(error, StopError::Own { .. }), "{error}");
}
