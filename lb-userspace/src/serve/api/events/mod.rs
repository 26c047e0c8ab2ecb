//! The stream of events: what happened on this host, in order.
//!
//! Input: what [`derive`] finds by comparing the host's state with what it was. Output: numbered [`EventRecord`]s in a
//! bounded ring, and a line of the log for each; [`stream`] serves them to readers, `lbd::hooks` runs programs for them.
//! A reader holds a position and nothing else, so a slow one costs no memory: what the ring has dropped by then is told
//! as a gap.

pub(super) mod derive;
pub(super) mod stream;
#[cfg(test)]
mod tests;

use crate::{
    clock,
    desired::model::{BackendId, EVENT_KINDS, Name, has_kind_prefix},
};
use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    collections::VecDeque,
    fmt,
    str::FromStr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::watch;

/// Events that are kept. Ten thousand backends that fail together fit.
const KEPT: usize = 16_384;
/// Longest cause of an event, in bytes.
const CAUSE: usize = 1_024;

/// What an event is about. An event of the whole host has no subject.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventSubject {
    /// Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Backend of the service; of a removed backend, its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// VIP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vip: Option<String>,
    /// Region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
}

impl EventSubject {
    fn of_backend(id: &BackendId) -> Self {
        let (service, backend) = (id.service.to_string(), id.backend.to_string());
        Self { service: Some(service), backend: Some(backend), ..Self::default() }
    }

    fn of_service(name: &Name) -> Self {
        Self { service: Some(name.to_string()), ..Self::default() }
    }
}

impl fmt::Display for EventSubject {
    /// Prints `web/w1`, `web`, the interface, the VIP or the region; nothing for the whole host.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, backend, interface, vip, region } = self;
        match (service, backend) {
            (Some(service), Some(backend)) => write!(f, "{service}/{backend}"),
            (Some(one), None) => f.write_str(one),
            _ => f.write_str([interface, vip, region].into_iter().flatten().next().map_or("", |s| s)),
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Number of the event: one more than that of the event before, from 1 since lbd started.
    pub seq: u64,
    /// Id of this run of lbd: numbers of another run are not comparable.
    pub boot: String,
    /// Time, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Kind: dotted words, such as `backend.down`.
    pub kind: Cow<'static, str>,
    /// What the event is about.
    #[serde(flatten)]
    pub subject: EventSubject,
    /// Cause, in words.
    pub cause: String,
    /// Revision of the desired state that was in force on this host.
    pub revision: u64,
}

impl EventRecord {
    /// Whether the event needs attention.
    pub fn is_bad(&self) -> bool {
        is_bad(&self.kind)
    }

    /// Position of a reader that has read up to this event.
    pub fn id(&self) -> EventId {
        EventId { boot: self.boot.clone(), seq: self.seq }
    }
}

/// Position in the stream: `BOOT-SEQ`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventId {
    /// Id of the run of lbd.
    pub boot: String,
    /// Number of the last event that was read.
    pub seq: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.boot, self.seq)
    }
}

impl FromStr for EventId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('-').and_then(|(boot, seq)| Some((boot, seq.parse().ok()?)));
        let (boot, seq) = parts.ok_or_else(|| format!("{text:?} is not the id of an event (BOOT-NUMBER)"))?;
        Ok(Self { boot: boot.to_owned(), seq })
    }
}

/// Which events a reader wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Beginnings of kinds; all kinds if empty.
    pub kinds: Vec<String>,
    /// Only events about this service.
    pub service: Option<String>,
}

impl EventFilter {
    /// Whether the filter selects an event.
    pub fn selects(&self, event: &EventRecord) -> bool {
        let is_kind =
            self.kinds.is_empty() || self.kinds.iter().any(|kind| has_kind_prefix(&event.kind, kind));
        is_kind && (self.service.is_none() || self.service == event.subject.service)
    }
}

/// Some events after a position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventBatch {
    /// Events that the ring no longer has.
    pub missed: u64,
    /// The events that follow.
    pub events: Vec<Arc<EventRecord>>,
}

/// What became of the programs that a hook started.
#[derive(Debug, Default)]
pub struct HookCounts {
    /// Programs that exited with 0.
    pub ok: AtomicU64,
    /// Programs that could not be started, or exited with another code.
    pub failed: AtomicU64,
    /// Programs that were killed because they took too long.
    pub timeout: AtomicU64,
    /// Events that were dropped because the programs before them took too long.
    pub missed: AtomicU64,
}

impl HookCounts {
    /// The counts, by result.
    pub fn by_result(&self) -> [(&'static str, u64); 4] {
        let Self { ok, failed, timeout, missed } = self;
        [("ok", ok), ("failed", failed), ("timeout", timeout), ("missed", missed)]
            .map(|(result, count)| (result, count.load(Ordering::Relaxed)))
    }
}

/// The events of this run of lbd.
#[derive(Debug)]
pub struct EventLog {
    boot: String,
    ring: Mutex<VecDeque<Arc<EventRecord>>>,
    /// Number of the newest event.
    newest: watch::Sender<u64>,
    /// Whether readers are to leave.
    closed: watch::Sender<bool>,
    /// Results of each hook's program, by the path of the program.
    pub hooks: Mutex<Vec<(String, Arc<HookCounts>)>>,
    kept: usize,
}

impl Default for EventLog {
    fn default() -> Self {
        Self::keeping(KEPT)
    }
}

impl EventLog {
    fn keeping(kept: usize) -> Self {
        Self {
            boot: format!("{:08x}", rand::random::<u32>()),
            ring: Mutex::default(),
            newest: watch::Sender::new(0),
            closed: watch::Sender::new(false),
            hooks: Mutex::default(),
            kept,
        }
    }

    /// Id of this run of lbd.
    pub fn boot(&self) -> &str {
        &self.boot
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<Arc<EventRecord>>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event, and writes it to the log.
    fn add(&self, kind: &'static str, subject: EventSubject, cause: &str, revision: u64) {
        debug_assert!(EVENT_KINDS.iter().any(|(known, _)| *known == kind), "{kind} is not in EVENT_KINDS");
        let mut end = cause.len().min(CAUSE);
        while !cause.is_char_boundary(end) {
            end -= 1;
        }
        let event = {
            let mut ring = self.ring();
            let event = Arc::new(EventRecord {
                seq: *self.newest.borrow() + 1,
                boot: self.boot.clone(),
                time_ms: clock::unix_ms(),
                kind: kind.into(),
                subject,
                cause: cause[..end].to_owned(),
                revision,
            });
            if ring.len() == self.kept {
                ring.pop_front();
            }
            ring.push_back(event.clone());
            self.newest.send_replace(event.seq);
            event
        };
        log(&event);
    }

    /// Number of the newest event.
    pub fn newest(&self) -> u64 {
        *self.newest.borrow()
    }

    /// Watches the number of the newest event.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// Watches whether readers are to leave, because lbd stops.
    pub fn closed(&self) -> watch::Receiver<bool> {
        self.closed.subscribe()
    }

    /// Makes all readers leave.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Events that follow number `seq`, at most `limit`.
    pub fn after(&self, seq: u64, limit: usize) -> EventBatch {
        let ring = self.ring();
        let Some(first) = ring.front().map(|event| event.seq) else { return EventBatch::default() };
        let missed = first.saturating_sub(seq + 1);
        let skip = usize::try_from((seq + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        EventBatch { missed, events: ring.iter().skip(skip).take(limit).cloned().collect() }
    }
}

/// Whether a kind needs attention.
fn is_bad(kind: &str) -> bool {
    const BAD: [&str; 11] = [
        "backend.down",
        "backend.unreachable",
        "replica.failed",
        "replica.lost",
        "panic.begun",
        "flood.begun",
        "rollout.aborted",
        "host.drain.begun",
        "interface.lost",
        "apply.failed",
        "problem.begun",
    ];
    BAD.contains(&kind)
}

/// Writes an event to the log.
fn log(event: &EventRecord) {
    let EventRecord { seq, kind, subject, cause, revision, .. } = event;
    let EventSubject { service, backend, interface, vip, region } = subject;
    let about = subject.to_string();
    let space = if about.is_empty() { "" } else { " " };
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                event = %kind, seq, service, backend, interface, vip, region, revision, "{kind}{space}{about}: {cause}"
            )
        };
    }
    if is_bad(kind) { line!(warn) } else { line!(info) }
}
