//! Asking the rules, and doing what they say.
//!
//! Owns the plan in force. Invariants: without a plan, or for an operation that no rule names, an operation costs one atomic load here; a decision is made once per
//! operation, before anything of it is done; a delayed operation is parked, never slept on; requests of door threads ([`crate::door`]) and of callers out of
//! scope are not even counted; FORGET and INTERRUPT are no operations in this sense.

use std::cell::OnceCell;
use std::ffi::CString;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use hobble_fuse::park::{Wait, Wake};
use hobble_fuse::{Caller, InjectedErrno, Op, Reply, Request};
use hobble_rules::{
    CallerFacts as RuleCaller, Comm, Decision, Op as RuleOp, OpContext, OpSet, PathMatch, Plan,
};

use crate::adopt::HandleId;
use crate::config::{CallerFacts, Callers};
use crate::handle::Handle;
use crate::lock::{lock, read, write};
use crate::mirror::Inner;
use crate::store::{Link, Matched, Node};
use crate::subject::{is_exclusive, range, rule_op};
use crate::sys::identity;

/// The plan in force.
#[derive(Default)]
pub(crate) struct Rules {
    /// One bit per operation that some rule names; 0 without a plan.
    ops: AtomicU64,
    active: RwLock<Option<Active>>,
    /// Operations in progress, so that a change of the plan can wait for those that began under the old one.
    progress: Progress,
    /// One change at a time.
    changing: Mutex<()>,
}

/// Counts operations in progress in two classes: those that began before the last change of the plan, and those since.
#[derive(Default)]
struct Progress {
    class: AtomicUsize,
    counts: [AtomicUsize; 2],
}

/// One operation in progress.
pub(crate) struct InProgress<'a>(&'a AtomicUsize);

impl Drop for InProgress<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Progress {
    fn begin(&self) -> InProgress<'_> {
        let [even, odd] = &self.counts;
        loop {
            let class = self.class.load(Ordering::SeqCst);
            let count = if class.is_multiple_of(2) { even } else { odd };
            count.fetch_add(1, Ordering::SeqCst);
            let begun = InProgress(count);
            // If the class changed in between, whoever changed it may have looked already.
            if self.class.load(Ordering::SeqCst) == class {
                return begun;
            }
        }
    }

    /// Begins a new class and waits until no operation of the old one is in progress. `false` when that took too long.
    fn drain(&self, limit: Duration) -> bool {
        let [even, odd] = &self.counts;
        let class = self.class.fetch_add(1, Ordering::SeqCst);
        let count = if class.is_multiple_of(2) { even } else { odd };
        let end = Instant::now() + limit;
        while count.load(Ordering::SeqCst) != 0 {
            if Instant::now() >= end {
                return false;
            }
            // Operations take microseconds; one that hangs in the backing filesystem is not worth a wake-up of its own.
            std::thread::sleep(Duration::from_micros(50));
        }
        true
    }
}

#[derive(Clone)]
struct Active {
    plan: Arc<Plan>,
    /// When injection began.
    origin: Instant,
}

/// What has to follow a change of the plan.
#[derive(Clone, Debug, Default)]
pub struct PlanChange {
    /// Handles whose reads and writes bypass the server although a rule wants to see them: until they are opened anew the rule cannot fire on them.
    pub must_reopen: Vec<HandleId>,
    /// Handles whose reads and writes come to the server although no rule wants them: right, but slow.
    pub may_reopen: Vec<HandleId>,
    /// Whether the kernel has dropped everything it had cached that would hide a rule. If not, it is waiting for an operation in progress, and will.
    pub settled: bool,
}

/// How long to wait for the kernel to drop what it has cached.
const SETTLE: Duration = Duration::from_secs(2);

fn bit(op: RuleOp) -> u64 {
    1 << op.index()
}

fn bits(ops: OpSet) -> u64 {
    ops.iter().map(bit).fold(0, |word, bit| word | bit)
}

impl Rules {
    /// Whether any rule names the operation. The one thing that an operation without rules pays for.
    fn name(&self, op: RuleOp) -> bool {
        self.ops.load(Ordering::Acquire) & bit(op) != 0
    }

    /// Whether any rule may want to see reads or writes.
    fn name_data(&self) -> bool {
        self.ops.load(Ordering::Acquire) & bits(OpSet::WITH_DATA) != 0
    }

    fn active(&self) -> Option<Active> {
        read(&self.active).clone()
    }

    /// Whether some rule may match this operation on this node.
    pub(crate) fn matches(&self, inner: &Inner, node: &Node, op: RuleOp) -> bool {
        if !self.name(op) {
            return false;
        }
        let Some(active) = self.active() else {
            return false;
        };
        let paths = inner.matches_of(&active.plan, node);
        if paths.is_empty() {
            active.plan.match_unknown_path().ops().contains(op)
        } else {
            paths.iter().any(|path| path.ops().contains(op))
        }
    }

    /// Whether reads and writes of this node have to come to the server.
    pub(crate) fn intercepts_data(&self, inner: &Inner, node: &Node) -> bool {
        if self.ops.load(Ordering::Acquire) == 0 {
            return false;
        }
        self.active()
            .is_some_and(|active| intercepts(inner, &active.plan, node))
    }
}

fn intercepts(inner: &Inner, plan: &Plan, node: &Node) -> bool {
    if !plan.ops().intersects(OpSet::WITH_DATA) {
        return false;
    }
    // Before Linux 6.6 a file that is open for direct I/O cannot be mapped shared (fs/fuse/file.c, `fuse_file_mmap`: ENODEV), and reads and writes that pass by the page cache
    // would not agree with what is mapped: all of its users stay with the cache, where a rule for reads sees only what is not cached yet.
    if node.was_mapped.load(Ordering::Acquire) && !inner.maps_direct() {
        return false;
    }
    let paths = inner.matches_of(plan, node);
    if paths.is_empty() {
        return plan.intercepts_data(&plan.match_unknown_path());
    }
    paths.iter().any(|path| plan.intercepts_data(path))
}

/// The rules' view of who asks.
struct Asker<'a> {
    caller: Caller,
    callers: &'a dyn Callers,
    facts: OnceCell<CallerFacts>,
}

impl Asker<'_> {
    fn facts(&self) -> &CallerFacts {
        self.facts
            .get_or_init(|| self.callers.facts(self.caller.tid))
    }
}

impl RuleCaller for Asker<'_> {
    fn uid(&self) -> u32 {
        self.caller.uid
    }

    fn pid(&self) -> Option<u32> {
        self.facts().pid
    }

    fn comm(&self) -> Option<Comm> {
        self.facts().comm
    }

    fn thread_comm(&self) -> Option<Comm> {
        self.facts().thread_comm
    }
}

impl Inner {
    /// One request, faults included.
    pub(crate) fn serve(self: &Arc<Self>, request: Request, reply: Reply) {
        let op = match request.op() {
            Ok(op) => op,
            Err(error) => {
                reply.malformed(&error);
                return;
            }
        };
        if matches!(op, Op::Forget { .. } | Op::BatchForget(_)) {
            return self.perform(&request, op, reply, &Decision::default());
        }
        let in_progress = self.rules.progress.begin();
        let Some((decision, generation)) = self
            .decide(&request, &op)
            .filter(|(decision, _)| !decision.is_pass())
        else {
            return self.perform(&request, op, reply, &Decision::default());
        };
        if decision.delay.is_zero() {
            return self.carry_out(&request, op, reply, &decision);
        }
        let until = Wait::until(Instant::now() + decision.delay);
        let wait = if is_exclusive(&op) {
            until.exclusive()
        } else {
            until
        };
        drop(in_progress);
        let inner = Arc::clone(self);
        // Decoded again afterwards: the operation borrows from the request, which moves.
        self.lot
            .park(request, reply, wait, move |request, reply, wake| {
                inner.resume(&request, reply, wake, &decision, generation);
            });
    }

    /// The delay of an operation has ended.
    ///
    /// What was cut short is carried out as if there were no rule, and so is what a plan decided that is no longer in force: nothing is faulted after the rules have gone.
    fn resume(
        self: &Arc<Self>,
        request: &Request,
        reply: Reply,
        wake: Wake,
        decision: &Decision,
        generation: u64,
    ) {
        if let Err(error) = identity::enter() {
            tracing::error!(%error, "a worker has no credentials to serve with");
            reply.error(crate::error::errno(&error));
            return;
        }
        let _in_progress = self.rules.progress.begin();
        let in_force = self
            .rules
            .active()
            .is_some_and(|active| active.plan.generation() == generation);
        let plain = Decision::default();
        let decision = if wake == Wake::Deadline && in_force {
            decision
        } else {
            &plain
        };
        match request.op() {
            Ok(op) => self.carry_out(request, op, reply, decision),
            Err(error) => {
                reply.malformed(&error);
            }
        }
    }

    /// What comes after the delay.
    fn carry_out(
        self: &Arc<Self>,
        request: &Request,
        op: Op<'_>,
        reply: Reply,
        decision: &Decision,
    ) {
        let errno = decision
            .errno
            .and_then(|errno| InjectedErrno::new(errno.raw()));
        match (errno, &op) {
            (None, _) => self.perform(request, op, reply, decision),
            // What closing a file does to locks and handles happens whatever close() returns (fs/open.c filp_flush, fs/file_table.c __fput); of RELEASE nobody sees a result.
            (Some(_), Op::Release { .. } | Op::Releasedir { .. }) => {
                self.perform(request, op, reply, decision)
            }
            (Some(errno), Op::Flush { fh, lock_owner }) => {
                self.flush_locks(*fh, *lock_owner);
                reply.injected(errno);
            }
            (Some(errno), _) => {
                reply.injected(errno);
            }
        }
    }

    /// What the rules say, and the generation of the plan that says it; `None` when they say nothing.
    fn decide(&self, request: &Request, op: &Op<'_>) -> Option<(Decision, u64)> {
        let name = rule_op(op)?;
        if !self.rules.name(name) {
            return None;
        }
        let mut caller = request.caller();
        let handle = match op {
            Op::Release { fh, .. } | Op::Releasedir { fh, .. } => self.handles.get(*fh).ok(),
            _ => None,
        };
        if let Some(handle) = handle {
            // Sent by the kernel on nobody's behalf; it belongs to whoever opened the file.
            caller.tid = handle.opener;
        }
        if self.doors.is_door(caller.tid) || !self.callers.in_scope(caller.tid) {
            return None;
        }
        let active = self.rules.active()?;
        let matches = self.matches_for(&active.plan, request.node(), op);
        let paths: Vec<&PathMatch> = matches.iter().flat_map(|paths| paths.iter()).collect();
        let (offset, len) = range(op);
        let asker = Asker {
            caller,
            callers: &*self.callers,
            facts: OnceCell::new(),
        };
        let decision = active.plan.decide(&OpContext {
            op: name,
            paths: &paths,
            caller: &asker,
            offset,
            len,
            now: active.origin.elapsed(),
            file: &|| self.file_of(request.node(), op),
        });
        Some((decision, active.plan.generation()))
    }

    pub(crate) fn match_path(&self, plan: &Plan, path: &[u8]) -> PathMatch {
        let mut absolute = Vec::with_capacity(self.volume.len() + 1 + path.len());
        absolute.extend_from_slice(&self.volume);
        if !path.is_empty() || absolute.is_empty() {
            absolute.push(b'/');
        }
        absolute.extend_from_slice(path);
        plan.match_path(path, &absolute)
    }

    /// What the rules say about all known paths of a node; computed when the plan, the node's names or those of a directory above have changed.
    pub(crate) fn matches_of(&self, plan: &Plan, node: &Node) -> Arc<[PathMatch]> {
        let moves = self.store.moves();
        let (matched, changes) = node.matched();
        if let Some(matched) = matched
            && matched.moves == moves
            && matched
                .paths
                .first()
                .is_some_and(|path| path.generation() == plan.generation())
        {
            return matched.paths;
        }
        let paths: Arc<[PathMatch]> = self
            .store
            .paths_of(node.id)
            .iter()
            .map(|path| self.match_path(plan, path))
            .collect();
        let matched = Matched {
            moves,
            paths: Arc::clone(&paths),
        };
        node.set_matched(matched, changes);
        paths
    }

    /// Swaps the plan. See [`crate::Mirror::set_plan`].
    pub(crate) fn set_plan(&self, plan: Option<(Arc<Plan>, Instant)>) -> PlanChange {
        let _alone = lock(&self.rules.changing);
        let new = plan.map(|(plan, origin)| Active { plan, origin });
        let ops = new.as_ref().map_or(0, |active| bits(active.plan.ops()));
        let old = {
            let mut active = write(&self.rules.active);
            // New operations see the new plan only; one that has begun goes on with the old one's decision.
            self.rules.ops.store(ops, Ordering::Release);
            std::mem::replace(&mut *active, new.clone())
        };
        let plans: Vec<&Plan> = [&old, &new]
            .into_iter()
            .flatten()
            .map(|active| &*active.plan)
            .collect();
        // What is answered from now on follows the new plan; what was answered before is then dropped from the kernel's caches.
        let drained = self.rules.progress.drain(SETTLE);
        self.invalidate(&plans);
        let mut change = self.fitting(new.as_ref().map(|active| &*active.plan));
        change.settled = self.kernel.get().is_none_or(|kernel| kernel.flush(SETTLE)) && drained;
        change
    }

    /// Has the kernel drop what it knows that would hide a rule, or that a rule has made up.
    fn invalidate(&self, plans: &[&Plan]) {
        let Some(kernel) = self.kernel.get() else {
            return;
        };
        let named = plans
            .iter()
            .fold(OpSet::EMPTY, |ops, plan| ops.union(plan.ops()));
        let attributes = OpSet::WITH_ATTRIBUTES;
        let hidden = attributes
            .union(OpSet::WITH_DATA)
            .union(OpSet::only(RuleOp::Readlink))
            .union(OpSet::only(RuleOp::Getxattr));
        if !named.intersects(hidden) {
            return;
        }
        for node in self.store.all() {
            let mut ops = OpSet::EMPTY;
            // The old plan's matches are computed first, so that what is kept with the node is the new plan's.
            for plan in plans {
                let paths = self.matches_of(plan, &node);
                let of_plan = paths
                    .iter()
                    .fold(OpSet::EMPTY, |ops, path| ops.union(path.ops()));
                ops = ops.union(if paths.is_empty() {
                    plan.match_unknown_path().ops()
                } else {
                    of_plan
                });
            }
            if ops.intersects(OpSet::WITH_DATA) {
                kernel.inval_inode(node.id, 0, 0);
            } else if ops.intersects(hidden) {
                // A negative offset means attributes and ACLs only.
                kernel.inval_inode(node.id, -1, 0);
            }
            if ops.intersects(attributes) {
                let links: Vec<Link> = node.with_names(|names| names.iter().cloned().collect());
                for Link { parent, name } in links {
                    if let Ok(name) = CString::new(name.into_vec()) {
                        kernel.inval_entry(parent, name, self.expires_entries());
                    }
                }
            }
        }
    }

    /// Whether the kernel can be told to look a name up again without dropping what hangs on it.
    fn expires_entries(&self) -> bool {
        self.negotiated.get().is_some_and(|agreed| {
            agreed
                .features
                .contains(hobble_fuse::Features::HAS_EXPIRE_ONLY)
        })
    }

    /// Whether a file whose reads and writes come to the server can be mapped shared.
    fn maps_direct(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
            || self.negotiated.get().is_some_and(|agreed| {
                agreed
                    .features
                    .contains(hobble_fuse::Features::DIRECT_IO_ALLOW_MMAP)
            })
    }

    /// Handles that bypass a rule of the plan in force, among those that `choose` wants.
    pub(crate) fn misfits(&self, choose: impl Fn(&Handle) -> bool) -> Vec<HandleId> {
        let Some(active) = self.rules.active() else {
            return Vec::new();
        };
        let candidate = |handle: &Handle| {
            !handle.direct
                && handle.node.is_regular()
                && !handle.superseded.load(Ordering::Acquire)
                && choose(handle)
        };
        // Matching walks up the directories, which is not for under the lock of the handles.
        let mut handles = self.handles.select(candidate);
        handles.retain(|handle| intercepts(self, &active.plan, &handle.node));
        handles.iter().map(|handle| HandleId(handle.fh)).collect()
    }

    /// These nodes have other names now: what is open of them, or below them, may have come under a rule that it bypasses. To be called when the names have changed; an open looks at
    /// them once more when its handle can be found ([`Inner::open`]), so that one of the two sees the other.
    pub(crate) fn names_changed(&self, nodes: &[&Node]) {
        if !self.rules.name_data() || nodes.is_empty() {
            return;
        }
        let below = nodes.iter().any(|node| node.is_dir());
        let concerned =
            |handle: &Handle| below || nodes.iter().any(|node| node.id == handle.node.id);
        if !self.misfits(concerned).is_empty() {
            self.callers.misfits();
        }
    }

    /// Handles whose I/O mode does not fit the plan.
    fn fitting(&self, plan: Option<&Plan>) -> PlanChange {
        let mut change = PlanChange::default();
        for handle in self.handles.all() {
            if !handle.node.is_regular() {
                continue;
            }
            let wanted = plan.is_some_and(|plan| intercepts(self, plan, &handle.node));
            match (wanted, handle.direct) {
                (true, false) => change.must_reopen.push(HandleId(handle.fh)),
                (false, true) => change.may_reopen.push(HandleId(handle.fh)),
                _ => {}
            }
        }
        change
    }
}
