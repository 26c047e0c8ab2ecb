//! The host under the programs: which of them the kernel took, interfaces that come and go, and drivers that hand over
//! packets the programs cannot work with. Input: the dataplane's [`Interfaces`] and counters. Output: what status says
//! of it, and an event when the program has been attached to one more interface.

use crate::{
    apply::{
        dataplane::{Interfaces, Kernel, PAGE_MTU, Reader, RefusedProgram},
        ethtool::Ethtool,
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

/// How often interfaces are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often counters and offloads are looked at.
const SAMPLE: Duration = Duration::from_secs(5);
/// Packets without their headers in the linear part, in one sample, that no sender of broken packets explains.
const TRUNCATED: u64 = 50;

/// The host under the programs.
pub struct Hardware {
    interfaces: Arc<Interfaces>,
    frags: bool,
    left_out: Vec<RefusedProgram>,
    reader: Arc<Reader>,
    /// Services that need a program which the kernel refused, and why they are not served.
    refused: Mutex<BTreeMap<Name, String>>,
    seen: Mutex<Seen>,
}

/// What was seen last.
#[derive(Default)]
struct Seen {
    truncated: Alarm,
    problems: Vec<String>,
}

/// Whether a counter keeps rising: by [`TRUNCATED`] in each of two samples; until one in which it does not rise at all.
#[derive(Default)]
struct Alarm {
    last: Option<u64>,
    high: u32,
    is_on: bool,
}

impl Alarm {
    /// Takes the next sample in.
    fn sample(&mut self, count: u64) {
        let rise = self.last.map_or(0, |last| count.saturating_sub(last));
        self.last = Some(count);
        self.high = if rise >= TRUNCATED { self.high + 1 } else { 0 };
        self.is_on = self.high >= 2 || (self.is_on && rise > 0);
    }
}

impl Hardware {
    /// Of a dataplane that has just been attached.
    pub fn new(
        interfaces: Arc<Interfaces>,
        frags: bool,
        left_out: Vec<RefusedProgram>,
        reader: Arc<Reader>,
    ) -> Self {
        let (refused, seen) = (Mutex::default(), Mutex::default());
        Self { interfaces, frags, left_out, reader, refused, seen }
    }

    /// Where the program runs.
    pub fn attached(&self) -> Vec<types::Interface> {
        let one = |i: crate::apply::dataplane::Interface| types::Interface {
            name: i.name,
            ifindex: i.ifindex,
            mode: i.mode.to_owned(),
            why_generic: i.why_generic,
        };
        self.interfaces.attached().into_iter().map(one).collect()
    }

    /// What the API says of the programs.
    pub fn loaded(&self) -> Loaded {
        let waiting = self.interfaces.waiting();
        let mut problems: Vec<String> =
            waiting.iter().map(|w| format!("interface {} is not attached: {}", w.name, w.reason)).collect();
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        problems.extend(refused.iter().map(|(name, why)| format!("service {name} is not served: {why}")));
        drop(refused);
        problems.extend(self.seen.lock().unwrap_or_else(PoisonError::into_inner).problems.iter().cloned());
        let left_out = self.left_out.iter().map(|one| types::LeftOut {
            program: one.program.to_owned(),
            feature: one.feature_name().to_owned(),
            reason: one.reason.clone(),
        });
        let kernel = Kernel::get().list().into_iter().map(|(name, has)| (name.to_owned(), has));
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

    /// Why a service cannot be served here, if its programs were refused.
    fn refusal(&self, service: &crate::desired::model::Service) -> Option<String> {
        let needs = compile::features_needed(service);
        let (what, lost) = needs.iter().find_map(|(bit, what)| {
            let lost = self.left_out.iter().find(|one| one.feature & bit != 0)?;
            Some((what, lost))
        })?;
        Some(format!(
            "{what} needs the program {}, which this host does not have: {}",
            lost.program, lost.reason
        ))
    }

    /// Why a state is refused: a service in it needs what the kernel refused. One that is so already, by another host's
    /// word or from before, does not stand in the way of other changes.
    pub fn check(&self, desired: &Desired) -> Result<(), String> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = desired.services.iter().filter(|(name, _)| !refused.contains_key(*name));
        match new.find_map(|(name, service)| Some((name, self.refusal(service)?))) {
            Some((name, why)) => Err(format!("service {name}: {why}")),
            None => Ok(()),
        }
    }

    /// The part of a state that can be served here. `remember`: whether status is to tell of the rest.
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

    /// Attaches where it can be attached later, and looks at what may go wrong, until nobody takes events.
    pub async fn run(self: Arc<Self>, events: mpsc::Sender<Event>) {
        let mut next_sample = Instant::now();
        loop {
            let sample = Instant::now() >= next_sample;
            if sample {
                next_sample += SAMPLE;
            }
            let this = self.clone();
            let look = move || {
                if sample {
                    this.sample();
                }
                this.interfaces.try_again()
            };
            let Ok(new) = tokio::task::spawn_blocking(look).await else { return };
            for i in &new {
                tracing::info!(interface = i.name, mode = i.mode, "attached");
            }
            if !new.is_empty() {
                let attached = self.interfaces.attached();
                let attached = attached.into_iter().map(|i| (i.ifindex, i.name)).collect();
                if events.send(Event::Attached(attached)).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn sample(&self) {
        let reasons = self.reader.reasons();
        let truncated = reasons.iter().find(|(r, _)| *r == Reason::Truncated).map_or(0, |(_, n)| *n);
        let mut problems = self.interface_problems();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.truncated.sample(truncated);
        if seen.truncated.is_on {
            problems.push(TRUNCATED_RISES.to_owned());
        }
        seen.problems = problems;
    }

    fn interface_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let Ok(tool) = Ethtool::open() else { return problems };
        for i in self.interfaces.attached() {
            if i.mode != "driver" {
                if self.frags {
                    problems.push(format!(
                        "interface {}: programs with frags in generic mode, with which Linux 6.3 and later may panic: take \
                         users' programs with frags out of STAGES and restart lbd",
                        i.name
                    ));
                }
                continue;
            }
            let mtu = tool.mtu(&i.name).unwrap_or(0);
            if !self.frags && mtu > PAGE_MTU {
                problems.push(format!(
                    "interface {} has MTU {mtu}, and programs without frags take {PAGE_MTU} on every driver: restart lbd, \
                     which then loads them with frags (no packet is lost)",
                    i.name
                ));
            }
            let certain = offloads::examine(&i.name).unwrap_or_default().into_iter().filter(|t| t.is_certain);
            problems.extend(certain.map(|t| format!("interface {}: {}: {}", i.name, t.what, t.fix)));
        }
        problems
    }
}

/// What is said while the alarm is on.
pub const TRUNCATED_RISES: &str = "a driver hands over packets without headers in their linear part (header split, or a striding \
     receive queue at a large MTU), and the program passes them to the host unbalanced: counter `truncated` rises. Switch \
     it off: `ethtool -G IFACE tcp-data-split off`, `ethtool --set-priv-flags IFACE rx_striding_rq off`; or use an MTU of \
     at most 3046";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alarm_is_about_a_counter_that_keeps_rising() {
        let mut alarm = Alarm::default();
        let mut feed = |count| {
            alarm.sample(count);
            alarm.is_on
        };
        assert!(!feed(1_000_000), "what was counted before says nothing");
        assert!(!feed(1_000_000 + TRUNCATED), "once may be somebody's broken packets");
        assert!(feed(1_000_000 + 2 * TRUNCATED));
        assert!(feed(1_000_001 + 2 * TRUNCATED), "still rising");
        assert!(!feed(1_000_001 + 2 * TRUNCATED), "it has stopped");
        assert!(!feed(1_000_002 + 3 * TRUNCATED));
    }
}
