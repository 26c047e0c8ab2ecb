//! Monitors the host under the programs: programs that the kernel refused, interfaces that appear and disappear, and
//! drivers that deliver packets the programs cannot parse. Input: the dataplane's [`Interfaces`] and counters. Output: the
//! problems that status reports, and an event when the program has been attached to another interface.

use crate::{
    apply::{
        dataplane::{Interfaces, KernelFeatures, PAGE_MTU, Reader, RefusedProgram},
        ethtool::Ethtool,
        link_events::LinkEvents,
        offloads,
        reconcile::Event,
    },
    desired::model::{Desired, Name},
    plan::compile,
    serve::api::types::{self, Loaded},
};
use lb_common::Reason;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};

/// How often to sample counters and offloads.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);
/// Packets per sample without headers in the linear part that malformed packets alone do not explain.
const TRUNCATED_MIN: u64 = 50;

/// Monitor of programs, interfaces and drivers.
pub struct Hardware {
    interfaces: Arc<Interfaces>,
    frags: bool,
    left_out: Vec<RefusedProgram>,
    reader: Arc<Reader>,
    /// Services that need a program which the kernel refused, and why they are not served.
    refused: Mutex<BTreeMap<Name, String>>,
    last_sample: Mutex<Readings>,
}

/// Results of the last sample.
#[derive(Default)]
struct Readings {
    truncated: Alarm,
    problems: Vec<String>,
}

/// Detects a counter that keeps rising: on after two consecutive samples with a rise of [`TRUNCATED_MIN`], off after a
/// sample without a rise.
#[derive(Default)]
struct Alarm {
    last: Option<u64>,
    high: u32,
    is_on: bool,
}

impl Alarm {
    /// Adds the next sample.
    fn sample(&mut self, count: u64) {
        let rise = self.last.map_or(0, |last| count.saturating_sub(last));
        self.last = Some(count);
        self.high = if rise >= TRUNCATED_MIN { self.high + 1 } else { 0 };
        self.is_on = self.high >= 2 || (self.is_on && rise > 0);
    }
}

impl Hardware {
    /// Creates the monitor of a dataplane that has just been attached.
    pub fn new(
        interfaces: Arc<Interfaces>,
        frags: bool,
        left_out: Vec<RefusedProgram>,
        reader: Arc<Reader>,
    ) -> Self {
        let (refused, last_sample) = (Mutex::default(), Mutex::default());
        Self { interfaces, frags, left_out, reader, refused, last_sample }
    }

    /// Returns the interfaces that the program is attached to.
    pub fn attached(&self) -> Vec<types::Interface> {
        let mut troubles = self.interfaces.troubles();
        let one = |i: crate::apply::dataplane::AttachedInterface| types::Interface {
            problem: troubles.remove(&i.name),
            name: i.name,
            ifindex: i.ifindex,
            mode: i.mode.to_owned(),
            why_generic: i.why_generic,
        };
        self.interfaces.attached().into_iter().map(one).collect()
    }

    /// Returns the state of the programs for the API.
    pub fn loaded(&self) -> Loaded {
        let waiting = self.interfaces.waiting();
        let mut problems: Vec<String> =
            waiting.iter().map(|w| format!("interface {} is not attached: {}", w.name, w.reason)).collect();
        problems.extend(self.interfaces.troubles().into_values());
        problems.extend(self.interfaces.unpinned());
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        problems.extend(refused.iter().map(|(name, why)| format!("service {name} is not served: {why}")));
        drop(refused);
        problems
            .extend(self.last_sample.lock().unwrap_or_else(PoisonError::into_inner).problems.iter().cloned());
        let left_out = self.left_out.iter().map(|one| types::LeftOut {
            program: one.program.to_owned(),
            feature: one.feature_name().to_owned(),
            reason: one.reason.clone(),
        });
        let kernel = KernelFeatures::get().list().into_iter().map(|(name, has)| (name.to_owned(), has));
        Loaded {
            frags: self.frags,
            kernel: kernel.collect(),
            left_out: left_out.collect(),
            waiting: waiting
                .into_iter()
                .map(|w| types::WaitingInterface { name: w.name, reason: w.reason })
                .collect(),
            problems,
        }
    }

    /// Returns why a service cannot be served here, if it needs a program that the kernel refused.
    fn refusal(&self, service: &crate::desired::model::Service) -> Option<String> {
        let needs = compile::features_needed(service);
        let (what, missing) = needs.iter().find_map(|(bit, what)| {
            let missing = self.left_out.iter().find(|one| one.feature & bit != 0)?;
            Some((what, missing))
        })?;
        Some(format!(
            "{what} needs the program {}, which this host could not load: {}",
            missing.program, missing.reason
        ))
    }

    /// Refuses a state in which a service needs a program that the kernel refused. Services that are refused already, set
    /// by another host or before, do not block other changes.
    pub fn check(&self, desired: &Desired) -> Result<(), String> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = desired.services.iter().filter(|(name, _)| !refused.contains_key(*name));
        match new.find_map(|(name, service)| Some((name, self.refusal(service)?))) {
            Some((name, why)) => Err(format!("service {name}: {why}")),
            None => Ok(()),
        }
    }

    /// Returns the part of a state that can be served here. `remember`: whether status reports the rest.
    pub fn served(&self, desired: Arc<Desired>, remember: bool) -> Arc<Desired> {
        if self.left_out.is_empty() {
            return desired;
        }
        let all = desired.services.iter();
        let refused: BTreeMap<Name, String> =
            all.filter_map(|(name, service)| Some((name.clone(), self.refusal(service)?))).collect();
        let served = if refused.is_empty() {
            desired
        } else {
            let mut served = Desired::clone(&desired);
            served.services.retain(|name, _| !refused.contains_key(name));
            Arc::new(served)
        };
        if remember {
            *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = refused;
        }
        served
    }

    /// Compares and repairs the interfaces after each change of one, and once a second; samples problems. Runs until the
    /// receiver of events is gone.
    pub async fn run(self: Arc<Self>, events: mpsc::Sender<Event>) {
        let mut changes = LinkEvents::open();
        let mut next_sample = Instant::now();
        loop {
            let sample = Instant::now() >= next_sample;
            if sample {
                next_sample += SAMPLE_INTERVAL;
            }
            let this = self.clone();
            let check = move || {
                if sample {
                    this.sample();
                }
                this.interfaces.repair()
            };
            let Ok(repaired) = tokio::task::spawn_blocking(check).await else { return };
            if repaired.has_changed {
                let attached = self.interfaces.attached();
                let attached = attached.into_iter().map(|i| (i.ifindex, i.name)).collect();
                if events.send(Event::Attached(attached)).await.is_err() {
                    return;
                }
            }
            changes.next().await;
        }
    }

    fn sample(&self) {
        let reasons = self.reader.reasons();
        let truncated = reasons.iter().find(|(r, _)| *r == Reason::Truncated).map_or(0, |(_, n)| *n);
        let mut problems = self.interface_problems();
        let mut last = self.last_sample.lock().unwrap_or_else(PoisonError::into_inner);
        last.truncated.sample(truncated);
        if last.truncated.is_on {
            problems.push(TRUNCATED_RISES.to_owned());
        }
        last.problems = problems;
    }

    fn interface_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let Ok(tool) = Ethtool::open() else { return problems };
        for i in self.interfaces.attached() {
            if i.mode != "driver" {
                if self.frags {
                    problems.push(format!(
                        "interface {}: programs with frags run in generic mode, in which Linux 6.3 and later may panic: remove \
                         your programs with frags from STAGES and restart lbd",
                        i.name
                    ));
                }
                continue;
            }
            let mtu = tool.mtu(&i.name).unwrap_or(0);
            if !self.frags && mtu > PAGE_MTU {
                problems.push(format!(
                    "interface {} has MTU {mtu}, but programs without frags support at most {PAGE_MTU} on every driver: restart \
                     lbd, which then loads them with frags (no packet is lost)",
                    i.name
                ));
            }
            let certain = offloads::examine(&i.name).unwrap_or_default().into_iter().filter(|t| t.is_certain);
            problems.extend(certain.map(|t| format!("interface {}: {}: {}", i.name, t.what, t.fix)));
        }
        problems
    }
}

/// Problem that is reported while the alarm of truncated packets is on.
pub const TRUNCATED_RISES: &str = "a driver delivers packets without headers in their linear part (header split, or a striding \
     receive queue at a large MTU), and the program passes them to the host unbalanced: counter `truncated` rises. Disable \
     this: `ethtool -G IFACE tcp-data-split off`, `ethtool --set-priv-flags IFACE rx_striding_rq off`; or use an MTU of \
     at most 3046";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alarm_is_on_while_a_counter_keeps_rising() {
        let mut alarm = Alarm::default();
        let mut feed = |count| {
            alarm.sample(count);
            alarm.is_on
        };
        assert!(!feed(1_000_000), "the first reading is no rise");
        assert!(!feed(1_000_000 + TRUNCATED_MIN), "one rise may be malformed packets");
        assert!(feed(1_000_000 + 2 * TRUNCATED_MIN));
        assert!(feed(1_000_001 + 2 * TRUNCATED_MIN), "still rising");
        assert!(!feed(1_000_001 + 2 * TRUNCATED_MIN), "stopped");
        assert!(!feed(1_000_002 + 3 * TRUNCATED_MIN));
    }
}
