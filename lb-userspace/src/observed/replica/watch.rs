//! Watches one replica: holds a stream open or polls in intervals, processes each report, and probes the worker when
//! reports fail.

use super::{
    ReplicaRegistry, Scores,
    events::Events,
    exposition::PAGE_LIMIT,
    fetch::{FetchError, FetchResponse, FetchTarget, fetch},
    scrape::Scraper,
};
use crate::{
    clock,
    desired::model::{
        BackendId, ClockWatch, REPORT_LIMIT, Readiness, ReplicaSource, Report, ReportError, SourceKind,
    },
    observed::{
        dial::Dial,
        health::{Outcome, ProbeStep, ProbeTarget, Prober},
    },
    plan::policy::{damp::Damper, load},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    time::Instant,
};

/// A stream that lasted at least this long is reopened immediately when it breaks.
const STABLE_AFTER: Duration = Duration::from_secs(1);
/// Shortest and longest wait between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Short-lived streams in a row after which polling replaces streaming for a while.
const MAX_SHORT_STREAMS: u32 = 3;
/// A flapping replica must stay up this long to be accepted again; each further loss doubles it, up to fifteen times.
const HOLD: Duration = Duration::from_secs(1);
/// How long polling replaces streaming.
const POLLING: Duration = Duration::from_secs(30);

/// How one replica is watched; a change restarts the task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WatchPlan {
    pub target: FetchTarget,
    pub source: ReplicaSource,
    /// Probe that confirms that a replica is dead: the service's own check, or a TCP connection.
    pub probe: ProbeTarget,
}

/// State that all tasks share.
pub(super) struct WatchShared {
    pub registry: Arc<ReplicaRegistry>,
    pub readiness: mpsc::Sender<(BackendId, Readiness)>,
    pub scores: Arc<Scores>,
    pub prober: Prober,
    pub dial: Dial,
    /// Limits attempts in flight; open streams do not count.
    pub permits: Semaphore,
    /// Notified when something that must be saved has changed.
    pub changed: Notify,
}

/// Watches one replica until the task is aborted.
pub(super) async fn watch(shared: Arc<WatchShared>, id: BackendId, plan: WatchPlan) {
    let interval = Duration::from_millis(plan.source.interval_ms.into());
    // The first attempt starts at a random time, to spread the load.
    tokio::time::sleep(interval.min(Duration::from_millis(500)).mul_f64(rand::random())).await;
    let scraper = (plan.source.kind != SourceKind::Stream).then(|| Scraper::new(&plan.source));
    let mut task = Task {
        shared,
        id,
        plan,
        scraper,
        began: Instant::now(),
        clock: ClockWatch::default(),
        falls: Damper::default(),
        held_until: Duration::ZERO,
    };
    let (mut failures, mut short_streams, mut polling_until) = (0, 0, None::<Instant>);
    loop {
        let start = Instant::now();
        let is_polling = polling_until.is_some_and(|until| start < until);
        let wait = match task.fetch_report(!is_polling).await {
            Ok(()) => {
                failures = 0;
                interval.mul_f64(0.9 + 0.2 * rand::random::<f64>())
            }
            Err(WatchError { error, was_stream }) => {
                task.record_failure(&error, was_stream).await;
                if error.suggests_death() {
                    task.confirm_death(&error).await;
                }
                let was_stable = was_stream && start.elapsed() >= STABLE_AFTER;
                short_streams = if was_stream && !was_stable { short_streams + 1 } else { 0 };
                if short_streams >= MAX_SHORT_STREAMS {
                    (short_streams, polling_until) = (0, Some(Instant::now() + POLLING));
                }
                failures = if was_stable { 0 } else { failures + 1 };
                if was_stable { Duration::ZERO } else { backoff(failures, rand::random()) }
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Wait after the given number of failures in a row: doubled each time, and reduced randomly by up to half.
fn backoff(failures: u32, random: f64) -> Duration {
    let whole = BACKOFF.0.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACKOFF.1);
    whole.mul_f64(0.5 + 0.5 * random)
}

/// How a poll or a stream failed.
struct WatchError {
    error: FetchError,
    was_stream: bool,
}

struct Task {
    shared: Arc<WatchShared>,
    id: BackendId,
    plan: WatchPlan,
    /// None for our own protocol.
    scraper: Option<Scraper>,
    began: Instant,
    clock: ClockWatch,
    /// Recent losses of the replica.
    falls: Damper,
    /// Time since `began` until which a lost replica is not accepted again.
    held_until: Duration,
}

impl Task {
    /// Sends one request. A plain answer is one report; a stream is read until it ends, which is always an error.
    async fn fetch_report(&mut self, stream: bool) -> Result<(), WatchError> {
        let plain = |error| WatchError { error, was_stream: false };
        let accept = match (&self.scraper, stream) {
            (Some(_), _) => "text/plain;version=0.0.4, application/openmetrics-text;q=0.5",
            (None, true) => "text/event-stream, application/json;q=0.5",
            (None, false) => "application/json",
        };
        let answer = {
            let Ok(_permit) = self.shared.permits.acquire().await else { return Ok(()) };
            fetch(&self.plan.target, accept, &self.shared.dial).await.map_err(plain)?
        };
        if self.scraper.is_none() && answer.is_stream() {
            self.shared.registry.edit(&self.id, |entry| entry.streaming = true);
            let error = match self.read_stream(answer).await {
                Err(error) => error,
                Ok(()) => FetchError::Broken { what: "the stream ended".to_owned() },
            };
            return Err(WatchError { error, was_stream: true });
        }
        let limit = if self.scraper.is_some() { PAGE_LIMIT } else { REPORT_LIMIT };
        let bytes = answer.read_all(limit).await.map_err(plain)?;
        let report = match &mut self.scraper {
            Some(scraper) => scraper.report(&bytes, self.began.elapsed()),
            None => Report::parse(&bytes),
        };
        self.accept_report(report).await.map_err(|error| plain(error.into()))
    }

    /// Reads a stream to its end.
    async fn read_stream(&mut self, mut answer: FetchResponse) -> Result<(), FetchError> {
        let timeout = self.plan.target.timeout;
        let silence = Duration::from_millis(self.plan.source.interval_ms.into()) * 3 + timeout;
        self.clock = ClockWatch::default();
        let (mut events, mut last_report) = (Events::default(), Instant::now());
        let mut begun: Option<Instant> = None;
        let mut data: Vec<Vec<u8>> = Vec::new();
        loop {
            // A report that has begun must end soon: a server that trickles it is stuck or malicious.
            let next = match begun {
                Some(begun) => answer.next(begun + timeout, "a report", timeout).await?,
                None => answer.next(last_report + silence, "the time without a report", silence).await?,
            };
            let Some(bytes) = next else { return Ok(()) };
            events.feed(&bytes, |event| data.push(event.to_vec()))?;
            for event in data.drain(..) {
                last_report = Instant::now();
                begun = None;
                if let Err(error) = self.accept_report(Report::parse(&event)).await {
                    self.record_refused(&error);
                }
            }
            if events.is_pending() {
                begun.get_or_insert_with(Instant::now);
            } else {
                begun = None;
            }
            if last_report + silence <= Instant::now() {
                let limit_ms = silence.as_millis() as u64;
                return Err(FetchError::Slow { what: "the time without a report", limit_ms });
            }
        }
    }

    /// Processes a report: updates score, registry and readiness.
    async fn accept_report(&mut self, report: Result<Report, ReportError>) -> Result<(), ReportError> {
        let report = report?;
        self.clock.check(&report, self.began.elapsed().as_millis() as u64)?;
        let score = load::score(&report, self.plan.source.capacity);
        // The score comes first, since the dataplane uses it for new flows.
        let cost = load::request_cost(load::capacity(&report, self.plan.source.capacity));
        self.shared.scores.report(&self.id, score, cost);
        let readiness = Readiness::from(report.phase);
        let reason = match &report.model {
            Some(model) => format!("reported by the replica, model {model}"),
            None => "reported by the replica".to_owned(),
        };
        let (now, held) = (clock::unix_ms(), self.held_until.saturating_sub(self.began.elapsed()));
        let changed = self.shared.registry.edit(&self.id, |entry| {
            entry.report = Some(report);
            entry.report_ms = now;
            entry.score = Some(score);
            entry.reports += 1;
            entry.trouble = None;
            if entry.readiness == Readiness::Lost && !held.is_zero() {
                let what = format!("flapping: accepted again in {} s if it stays up", held.as_secs() + 1);
                entry.trouble = Some(super::registry::Trouble { time_ms: now, what });
                return false;
            }
            entry.record_readiness(readiness, now, &reason)
        });
        self.publish(changed.unwrap_or(false), readiness, &reason).await;
        Ok(())
    }

    async fn publish(&self, changed: bool, readiness: Readiness, reason: &str) {
        if !changed {
            return;
        }
        let (backend, address) = (&self.id, self.plan.target.address);
        // An event of the API tells of it too, and is in the log.
        tracing::debug!(%backend, %address, %readiness, reason, "replica readiness changed");
        self.shared.changed.notify_one();
        // The receiver is gone only when lbd ends.
        let _ = self.shared.readiness.send((self.id.clone(), readiness)).await;
    }

    /// Records a refused report. The last valid report stays in effect.
    fn record_refused(&self, error: &ReportError) {
        let what = format!("report refused: {error}");
        let first = self.shared.registry.edit(&self.id, |entry| {
            entry.refused += 1;
            let first = entry.trouble.as_ref().is_none_or(|t| t.what != what);
            entry.trouble = Some(super::registry::Trouble { time_ms: clock::unix_ms(), what: what.clone() });
            first
        });
        if first == Some(true) {
            tracing::warn!(backend = %self.id, address = %self.plan.target.address, what, "replica report refused");
        }
    }

    /// Records a failed poll or stream.
    async fn record_failure(&self, error: &FetchError, was_stream: bool) {
        if let FetchError::Report(error) = error {
            self.record_refused(error);
        }
        tracing::debug!(backend = %self.id, address = %self.plan.target.address, %error, was_stream, "replica source failed");
        self.shared.registry.edit(&self.id, |entry| {
            entry.streaming = false;
            entry.breaks += 1;
            if !matches!(error, FetchError::Report(_)) {
                entry.trouble =
                    Some(super::registry::Trouble { time_ms: clock::unix_ms(), what: error.to_string() });
            }
        });
    }

    /// Probes a replica that does not report, and marks it as lost if the probe fails.
    async fn confirm_death(&mut self, error: &FetchError) {
        let result = match (self.shared.prober)(self.plan.probe.clone()).await {
            ProbeStep::Done(Outcome::Passed(reason)) => Ok(reason),
            ProbeStep::Done(Outcome::Failed(reason)) => Err(reason),
            // Nothing is known of the worker: its last report stands until a probe can be made.
            ProbeStep::Done(Outcome::NotProbed(obstacle)) => {
                tracing::debug!(backend = %self.id, %obstacle, "not probed");
                return;
            }
            // It is busy, not dead: its kernel accepts connections.
            ProbeStep::Late(_) => Ok("connected, and the answer is late".to_owned()),
        };
        let (now, elapsed) = (clock::unix_ms(), self.began.elapsed());
        if result.is_err() {
            let was_lost = self.shared.registry.get(&self.id).is_some_and(|e| e.readiness == Readiness::Lost);
            if !was_lost {
                self.falls.record_fall(elapsed);
            }
            // From the third recent loss on, the replica must stay up for a while before it is accepted again.
            self.held_until = elapsed + HOLD * (self.falls.factor(elapsed) - 1);
        }
        let changed = self.shared.registry.edit(&self.id, |entry| match &result {
            Err(reason) => {
                let reason = format!("{error}; probe: {reason}");
                entry.record_readiness(Readiness::Lost, now, &reason).then_some((Readiness::Lost, reason))
            }
            // The worker is up again, but its last report is from before it died.
            Ok(reason) if entry.readiness == Readiness::Lost => {
                let reason = format!("probe: {reason}; no report yet");
                entry
                    .record_readiness(Readiness::Unknown, now, &reason)
                    .then_some((Readiness::Unknown, reason))
            }
            Ok(_) => None,
        });
        if let Some((readiness, reason)) = changed.flatten() {
            self.publish(true, readiness, &reason).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit() {
        let ms = |n, r| backoff(n, r).as_millis();
        assert_eq!(
            [ms(1, 1.0), ms(2, 1.0), ms(3, 1.0), ms(7, 1.0), ms(99, 1.0)],
            [50, 100, 200, 2_000, 2_000]
        );
        assert_eq!([ms(1, 0.0), ms(99, 0.0)], [25, 1_000]);
    }
}
