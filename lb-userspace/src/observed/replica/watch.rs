//! One replica: a stream held open, or looks at intervals; what comes of each report; and what happens when
//! there is none.

use super::{
    ReplicaRegistry, Scores,
    events::Events,
    exposition::PAGE_LIMIT,
    http::{self, Answer, Ask, FetchError},
    scrape::Scraper,
};
use crate::{
    clock,
    desired::model::{
        BackendId, ClockWatch, REPORT_LIMIT, Readiness, ReplicaSource, Report, ReportError, SourceKind,
    },
    observed::health::{ProbeTarget, Prober},
    plan::policy::{damp::Damper, load},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    time::Instant,
};

/// A stream that lived as long is opened again at once when it breaks.
const LIVED: Duration = Duration::from_secs(1);
/// Waits between attempts: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Streams in a row that may break young before plain looks take over for a while.
const YOUNG: u32 = 3;
/// A replica that keeps being lost must stand so long, and doubly with each further loss, up to fifteen times.
const HOLD: Duration = Duration::from_secs(1);
/// How long they do.
const LOOKING: Duration = Duration::from_secs(30);

/// How one replica is watched; a change of it restarts the task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub ask: Ask,
    pub source: ReplicaSource,
    /// What confirms that a replica whose stream broke is gone: the service's own check, or a connection.
    pub probe: ProbeTarget,
}

/// What all tasks share.
pub(super) struct Shared {
    pub book: Arc<ReplicaRegistry>,
    pub said: mpsc::Sender<(BackendId, Readiness)>,
    pub scores: Arc<Scores>,
    pub prober: Prober,
    /// Attempts under way; open streams are not counted.
    pub permits: Semaphore,
    /// What must be saved has changed.
    pub changed: Notify,
}

/// Watches one replica for ever.
pub(super) async fn watch(shared: Arc<Shared>, id: BackendId, plan: Plan) {
    let interval = Duration::from_millis(plan.source.interval_ms.into());
    // The first looks come at random moments, so that they spread.
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
    let (mut failures, mut young, mut looking_until) = (0, 0, None::<Instant>);
    loop {
        let start = Instant::now();
        let is_looking = looking_until.is_some_and(|until| start < until);
        let wait = match task.look(!is_looking).await {
            Ok(()) => {
                failures = 0;
                interval.mul_f64(0.9 + 0.2 * rand::random::<f64>())
            }
            Err(Ended { error, was_stream }) => {
                task.trouble(&error, was_stream).await;
                if error.is_hint() {
                    task.confirm(&error).await;
                }
                let lived = was_stream && start.elapsed() >= LIVED;
                young = if was_stream && !lived { young + 1 } else { 0 };
                if young >= YOUNG {
                    (young, looking_until) = (0, Some(Instant::now() + LOOKING));
                }
                failures = if lived { 0 } else { failures + 1 };
                if lived { Duration::ZERO } else { backoff(failures, rand::random()) }
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Wait before the `failures`th new attempt: doubled each time, and spread by half.
fn backoff(failures: u32, random: f64) -> Duration {
    let whole = BACKOFF.0.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACKOFF.1);
    whole.mul_f64(0.5 + 0.5 * random)
}

/// How a look or a stream ended.
struct Ended {
    error: FetchError,
    was_stream: bool,
}

struct Task {
    shared: Arc<Shared>,
    id: BackendId,
    plan: Plan,
    /// None for our own protocol.
    scraper: Option<Scraper>,
    began: Instant,
    clock: ClockWatch,
    /// How often it was lost of late, and until when it must stand to be believed again.
    falls: Damper,
    held_until: Duration,
}

impl Task {
    /// Asks once. A plain answer is one report; a stream is read until it ends, which is always an error.
    async fn look(&mut self, stream: bool) -> Result<(), Ended> {
        let plain = |error| Ended { error, was_stream: false };
        let accept = match (&self.scraper, stream) {
            (Some(_), _) => "text/plain;version=0.0.4, application/openmetrics-text;q=0.5",
            (None, true) => "text/event-stream, application/json;q=0.5",
            (None, false) => "application/json",
        };
        let answer = {
            let Ok(_permit) = self.shared.permits.acquire().await else { return Ok(()) };
            http::get(&self.plan.ask, accept).await.map_err(plain)?
        };
        if self.scraper.is_none() && answer.is_stream() {
            self.shared.book.edit(&self.id, |entry| entry.streaming = true);
            let error = match self.stream(answer).await {
                Err(error) => error,
                Ok(()) => FetchError::Broken { what: "the stream ended".to_owned() },
            };
            return Err(Ended { error, was_stream: true });
        }
        let limit = if self.scraper.is_some() { PAGE_LIMIT } else { REPORT_LIMIT };
        let bytes = answer.whole(limit).await.map_err(plain)?;
        let report = match &mut self.scraper {
            Some(scraper) => scraper.report(&bytes, self.began.elapsed()),
            None => Report::parse(&bytes),
        };
        self.take(report).await.map_err(|error| plain(error.into()))
    }

    /// Reads a stream to its end.
    async fn stream(&mut self, mut answer: Answer) -> Result<(), FetchError> {
        let timeout = self.plan.ask.timeout;
        let silence = Duration::from_millis(self.plan.source.interval_ms.into()) * 3 + timeout;
        self.clock = ClockWatch::default();
        let (mut events, mut heard) = (Events::default(), Instant::now());
        let mut begun: Option<Instant> = None;
        let mut data: Vec<Vec<u8>> = Vec::new();
        loop {
            // A report that has begun must end soon: who trickles it is stuck, or means harm.
            let next = match begun {
                Some(begun) => answer.next(begun + timeout, "a report", timeout).await?,
                None => answer.next(heard + silence, "the time without a report", silence).await?,
            };
            let Some(bytes) = next else { return Ok(()) };
            events.feed(&bytes, |event| data.push(event.to_vec()))?;
            for event in data.drain(..) {
                heard = Instant::now();
                begun = None;
                if let Err(error) = self.take(Report::parse(&event)).await {
                    self.refuse(&error);
                }
            }
            if events.pending() {
                begun.get_or_insert_with(Instant::now);
            } else {
                begun = None;
            }
            if heard + silence <= Instant::now() {
                let limit_ms = silence.as_millis() as u64;
                return Err(FetchError::Slow { what: "the time without a report", limit_ms });
            }
        }
    }

    /// Takes a report in: book, score, readiness.
    async fn take(&mut self, report: Result<Report, ReportError>) -> Result<(), ReportError> {
        let report = report?;
        self.clock.check(&report, self.began.elapsed().as_millis() as u64)?;
        let score = load::score(&report, self.plan.source.capacity);
        // First of all: the dataplane waits for it.
        let cost = load::request_cost(load::capacity(&report, self.plan.source.capacity));
        self.shared.scores.report(&self.id, score, cost);
        let readiness = Readiness::from(report.phase);
        let reason = match &report.model {
            Some(model) => format!("the replica says so, model {model}"),
            None => "the replica says so".to_owned(),
        };
        let (now, held) = (clock::unix_ms(), self.held_until.saturating_sub(self.began.elapsed()));
        let turned = self.shared.book.edit(&self.id, |entry| {
            entry.report = Some(report);
            entry.report_ms = now;
            entry.score = Some(score);
            entry.reports += 1;
            entry.trouble = None;
            if entry.readiness == Readiness::Lost && !held.is_zero() {
                let what = format!("comes and goes: believed again in {} s if it stays", held.as_secs() + 1);
                entry.trouble = Some(super::registry::Trouble { time_ms: now, what });
                return false;
            }
            entry.turn(readiness, now, &reason)
        });
        self.tell(turned.unwrap_or(false), readiness, &reason).await;
        Ok(())
    }

    async fn tell(&self, turned: bool, readiness: Readiness, reason: &str) {
        if !turned {
            return;
        }
        let (backend, address) = (&self.id, self.plan.ask.address);
        match readiness {
            Readiness::Failed | Readiness::Lost => {
                tracing::warn!(%backend, %address, %readiness, reason, "replica");
            }
            _ => tracing::info!(%backend, %address, %readiness, reason, "replica"),
        }
        self.shared.changed.notify_one();
        // Nobody listens any more only when lbd ends.
        let _ = self.shared.said.send((self.id.clone(), readiness)).await;
    }

    /// Notes a report that was not believed. The last good one stands.
    fn refuse(&self, error: &ReportError) {
        let what = format!("report refused: {error}");
        let first = self.shared.book.edit(&self.id, |entry| {
            entry.refused += 1;
            let first = entry.trouble.as_ref().is_none_or(|t| t.what != what);
            entry.trouble = Some(super::registry::Trouble { time_ms: clock::unix_ms(), what: what.clone() });
            first
        });
        if first == Some(true) {
            tracing::warn!(backend = %self.id, address = %self.plan.ask.address, what, "replica");
        }
    }

    /// Notes a stream or a look that failed.
    async fn trouble(&self, error: &FetchError, was_stream: bool) {
        if let FetchError::Report(error) = error {
            self.refuse(error);
        }
        tracing::debug!(backend = %self.id, address = %self.plan.ask.address, %error, was_stream, "replica");
        self.shared.book.edit(&self.id, |entry| {
            entry.streaming = false;
            entry.breaks += 1;
            if !matches!(error, FetchError::Report(_)) {
                entry.trouble =
                    Some(super::registry::Trouble { time_ms: clock::unix_ms(), what: error.to_string() });
            }
        });
    }

    /// A replica cannot be heard: is it gone? Asks at once, by the service's own check.
    async fn confirm(&mut self, error: &FetchError) {
        let result = (self.shared.prober)(self.plan.probe.clone()).await;
        let (now, elapsed) = (clock::unix_ms(), self.began.elapsed());
        if result.is_err() {
            let was_lost = self.shared.book.get(&self.id).is_some_and(|e| e.readiness == Readiness::Lost);
            if !was_lost {
                self.falls.fall(elapsed);
            }
            // Who is lost for the third time of late must stand a while; from the moment that it is there again.
            self.held_until = elapsed + HOLD * (self.falls.factor(elapsed) - 1);
        }
        let turned = self.shared.book.edit(&self.id, |entry| match &result {
            Err(reason) => {
                let reason = format!("{error}; probe: {reason}");
                entry.turn(Readiness::Lost, now, &reason).then_some((Readiness::Lost, reason))
            }
            // It lives, and what it last said was that of one that died since.
            Ok(reason) if entry.readiness == Readiness::Lost => {
                let reason = format!("probe: {reason}; no report yet");
                entry.turn(Readiness::Unknown, now, &reason).then_some((Readiness::Unknown, reason))
            }
            Ok(_) => None,
        });
        if let Some((readiness, reason)) = turned.flatten() {
            self.tell(true, readiness, &reason).await;
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
