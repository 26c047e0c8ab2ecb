//! The checks of one backend: when it is probed, and what its results mean.
//!
//! Slow is not dead: an LLM server may answer its health check after half a minute, because its one process computes. So a
//! probe that is connected and late waits on for its answer, for `busy_timeout_ms` at most. Meanwhile probes only connect:
//! a worker that dies refuses them, or is silent, and is found as fast as without this rule.

use super::{
    Outcome, Probe, ProbeStep,
    checker::{CheckPlan, CheckerShared},
    passive::{Hint, Suspicion},
    permits::Lane,
    verdict::Verdict,
};
use crate::{
    clock,
    desired::model::{BackendId, Health, HealthKind},
};
use futures_util::future::BoxFuture;
use std::{sync::Arc, time::Duration};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

/// A probe whose answer is late.
struct LateProbe {
    rest: BoxFuture<'static, Outcome>,
    start: Instant,
    /// When it fails.
    give_up: Instant,
    _permit: OwnedSemaphorePermit,
}

impl LateProbe {
    /// The answer, or none when it is time to give up. Never resolves without a late probe.
    async fn answer(late: &mut Option<Self>) -> Option<Outcome> {
        match late {
            None => std::future::pending().await,
            Some(late) => tokio::time::timeout_at(late.give_up, &mut late.rest).await.ok(),
        }
    }
}

/// When a result came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timing {
    /// Within the timeout.
    InTime,
    /// Later, or not at all.
    Late,
    /// From a probe that only connects, while another one is late.
    Connect,
}

/// The checks of one backend.
struct BackendWatch {
    shared: Arc<CheckerShared>,
    id: BackendId,
    plan: CheckPlan,
    suspicion: Arc<Suspicion>,
    verdict: Verdict,
    began: Instant,
    lane: Lane,
    /// Why probes are early; kept until one of them decides.
    hint: Option<Hint>,
    /// A probe whose answer is late. Meanwhile probes only connect: more requests would add to the worker's load.
    late: Option<LateProbe>,
    /// Late probes in a row.
    lates: u32,
}

/// Probes one backend until the task is aborted.
pub(super) async fn watch_backend(
    shared: Arc<CheckerShared>,
    id: BackendId,
    plan: CheckPlan,
    known: Health,
    suspicion: Arc<Suspicion>,
) {
    // The first probe starts at a random time of the first interval, to spread the probes.
    let verdict = Verdict::new(known);
    let mut wait = verdict.wait(&plan.check, 0.5).mul_f64(rand::random());
    let mut watch = BackendWatch {
        shared,
        id,
        plan,
        suspicion,
        verdict,
        began: Instant::now(),
        lane: Lane::New,
        hint: None,
        late: None,
        lates: 0,
    };
    while let Some(next) = watch.step(wait).await {
        wait = next;
    }
}

impl BackendWatch {
    /// Waits until a probe is due or a late one is answered, and returns the wait before the next probe. None once the
    /// checker stops.
    async fn step(&mut self, wait: Duration) -> Option<Duration> {
        let due = self.shared.probe_time(wait, &self.plan.check);
        let may_hint = self.hint.is_none() && self.verdict.health() == Health::Healthy;
        tokio::select! {
            biased;
            found = self.suspicion.next_hint(), if may_hint => {
                self.begin_early(found);
                self.probe(Instant::now()).await?;
            }
            answer = LateProbe::answer(&mut self.late) => {
                let took = self.late.take().map_or(Duration::ZERO, |late| late.start.elapsed());
                self.late_answer(answer, took).await;
            }
            () = tokio::time::sleep_until(due) => self.probe(due).await?,
        }
        let wait = self.verdict.wait(&self.plan.check, rand::random());
        // Without a verdict probes are frequent, but a worker that answers late is not asked more often for that.
        let least = Duration::from_millis(self.plan.check.interval_ms.into());
        Some(if self.late.is_some() && self.verdict.health() == Health::Unknown {
            wait.max(least)
        } else {
            wait
        })
    }

    /// Notes that passive failures bring the next probes forward.
    fn begin_early(&mut self, hint: Hint) {
        let address = self.plan.target.address;
        tracing::debug!(backend = %self.id, %address, failures = %hint, "passive failures: probing early");
        self.verdict.suspect();
        self.shared.record_early_probe(&self.id, hint);
        self.hint = Some(hint);
    }

    /// Probes once. None once the checker stops.
    async fn probe(&mut self, due: Instant) -> Option<()> {
        let permit = self.shared.permit(&self.id, self.lane, due, &self.plan.check).await?;
        let start = Instant::now();
        let mut target = self.plan.target.clone();
        if self.late.is_some() {
            target.kind = HealthKind::Tcp;
        }
        let step = (self.shared.prober)(target).await;
        drop(permit);
        let took = start.elapsed();
        self.lane = if took >= self.plan.target.timeout { Lane::Silent } else { Lane::Answering };
        match step {
            ProbeStep::Late(rest) => self.begin_late(rest, start).await,
            ProbeStep::Done(Outcome::NotProbed(obstacle)) => {
                tracing::debug!(backend = %self.id, %obstacle, "not probed");
                self.shared.registry.record_not_probed(&self.id, &obstacle, clock::unix_ms());
            }
            ProbeStep::Done(Outcome::Passed(reason)) => match &self.late {
                Some(late) => {
                    let waited = late.start.elapsed();
                    self.observe_late(format!("no answer for {:.0} s", waited.as_secs_f64()), waited);
                }
                None => self.take(true, reason, took, Timing::InTime).await,
            },
            ProbeStep::Done(Outcome::Failed(reason)) => {
                let was = self.verdict.health();
                let timing = if self.late.is_some() { Timing::Connect } else { Timing::InTime };
                self.take(false, reason, took, timing).await;
                // Nobody answers on the connection to a worker that died.
                if was != Health::Healthy || self.verdict.health() != was {
                    self.late = None;
                }
            }
        }
        Some(())
    }

    /// The answer of a probe is late. Waits for it further, unless too many probes wait.
    async fn begin_late(&mut self, rest: BoxFuture<'static, Outcome>, start: Instant) {
        let (timeout, took) = (self.plan.target.timeout, start.elapsed());
        let reason = format!("no answer within {} ms", timeout.as_millis());
        let busy_timeout = Duration::from_millis(self.plan.check.busy_timeout_ms.into());
        if busy_timeout <= timeout {
            return self.take(false, reason, took, Timing::InTime).await;
        }
        self.observe_late(reason, took);
        if let Ok(permit) = self.shared.late_permits.clone().try_acquire_owned() {
            self.late = Some(LateProbe { rest, start, give_up: start + busy_timeout, _permit: permit });
        }
    }

    fn observe_late(&mut self, reason: String, took: Duration) {
        let (id, address) = (&self.id, self.plan.target.address);
        self.verdict.observe_late();
        self.lates += 1;
        if self.lates == u32::from(self.plan.check.fall) {
            tracing::info!(backend = %id, %address, %reason, "busy: accepts connections, and answers its checks late");
        }
        self.shared.record_late(id, format!("{reason}, connections are accepted"), took);
        if self.hint.take().is_some() {
            self.suspicion.refute(Instant::now());
            self.shared.record_refuted(id);
        }
    }

    /// Takes the answer of a late probe; none if it stays without one.
    async fn late_answer(&mut self, answer: Option<Outcome>, took: Duration) {
        let after = format!(", after {:.1} s", took.as_secs_f64());
        match answer {
            Some(Outcome::Passed(reason)) => self.take(true, reason + &after, took, Timing::Late).await,
            Some(Outcome::Failed(reason)) => self.take(false, reason + &after, took, Timing::Late).await,
            Some(Outcome::NotProbed(obstacle)) => {
                self.shared.registry.record_not_probed(&self.id, &obstacle, clock::unix_ms());
            }
            None => {
                let reason = format!("no answer for {:.0} s, connections are accepted", took.as_secs_f64());
                let before = self.verdict.give_up(&self.plan.check, self.began.elapsed());
                self.conclude(false, reason, took, (Timing::Late, before)).await;
            }
        }
    }

    /// Takes the result of a probe.
    async fn take(&mut self, ok: bool, reason: String, took: Duration, timing: Timing) {
        let before = self.verdict.observe(ok, &self.plan.check, self.began.elapsed());
        self.conclude(ok, reason, took, (timing, before)).await;
    }

    /// Records a result, and the verdict if it has changed from `before`.
    async fn conclude(
        &mut self,
        ok: bool,
        mut reason: String,
        took: Duration,
        (timing, before): (Timing, Option<Health>),
    ) {
        let (id, address) = (&self.id, self.plan.target.address);
        let took_us = took.as_micros() as u64;
        tracing::debug!(backend = %id, %address, ok, %reason, took_us, "probe");
        let required = self.verdict.required_successes(&self.plan.check, self.began.elapsed());
        let damped = (required > u32::from(self.plan.check.rise)).then_some(required);
        let late = timing == Timing::Late;
        let probe = Probe { time_ms: clock::unix_ms(), ok, reason: reason.clone(), took_us, late };
        let in_time = timing == Timing::InTime;
        self.shared.record_probe(id, probe, damped, in_time);
        if in_time {
            self.lates = 0;
        }
        if ok && self.hint.take().is_some() {
            self.suspicion.refute(Instant::now());
            self.shared.record_refuted(id);
        }
        let Some(from) = before else { return };
        let to = self.verdict.health();
        self.suspicion.reset();
        if let Some(hint) = self.hint.take() {
            reason = format!("{reason}; probed early: {hint}");
        }
        // An event of the API tells of it too, and is in the log.
        tracing::debug!(backend = %id, %address, ?from, ?to, %reason, "health changed");
        self.shared.set_verdict(id, to, &reason).await;
    }
}
