//! Decides which VIPs belong on this host, so that routing daemons announce only VIPs that are served, and cut nobody off.
//!
//! Input: for each service its VIP, whether backends take its new flows, and whether one of them has passed its
//! checks; the VIPs that are on the host now, whether the host drains, and what other hosts publish ([`Handover`]).
//! Output: a decision for each VIP, and this host's own [`Handover`]. Pure; called by `announce`.
//!
//! A VIP is on if any of its services is served: BGP knows addresses, not ports. Adding a VIP needs a backend that is
//! known to be good, keeping it does not: at a cold start backends without a verdict serve, but a host that knows no
//! good worker must not draw clients from hosts that do.
//!
//! A VIP that is on and no longer served is *kept*, because established flows may still work, until
//! 1. another host takes it over: a host that announces and serves the VIP answers the publication that this host keeps it
//!    since a certain time with a cover for exactly that time, and the cover stands for as long as hosts may differ in
//!    noticing the same failure or recovery (otherwise all but the slowest would withdraw each time); or
//! 2. the drain time has passed since it was last served, no host that keeps it has live flows, and no service at it
//!    answers its clients by resets.
//!
//! Rule 1 cannot take a VIP from all hosts, however late hosts see each other's publications. Call the time at which a
//! host stopped serving its epoch. If a host leaves because of a cover, the covering host had seen this epoch while it
//! served itself. If that host stops serving later, its own epoch is later, and only a host that has seen this later
//! epoch while it served can cover it. A chain of covers therefore only leads to later epochs, and never closes: the
//! host with the latest epoch, or one that serves, still announces.

use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    time::Duration,
};

/// State of a service for the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceAt {
    /// VIP of the service; several services may share one.
    pub vip: IpAddr,
    /// Whether backends take the service's new flows. Those that all fail their checks, and take flows by the panic rule
    /// alone, do not count.
    pub served: bool,
    /// Whether one of these backends has passed its checks or has none.
    pub proven: bool,
    /// Whether backends take new flows by the panic rule: a VIP is not withdrawn for the time that has passed.
    pub panics: bool,
    /// Whether the VIP is kept for this service's flows (`when_all_down` is `keep` or `reset`).
    pub keeps: bool,
    /// Whether the VIP is kept until another host serves it, because clients are answered (`when_all_down = reset`).
    pub resets: bool,
    /// Whether this host has live flows of the service.
    pub has_flows: bool,
    /// Drain time of the service, in milliseconds.
    pub drain_ms: u64,
    /// Longest time between two hosts noticing the same change of the backends, in milliseconds.
    pub spread_ms: u64,
}

/// Whether a VIP belongs on this host, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VipDecision {
    /// On: a service at this VIP is served.
    Served,
    /// On: no service at this VIP is served, here or on a host that is known to take over, but flows may continue.
    Kept,
    /// Off: no service at this VIP has a backend that takes new flows.
    NoBackend,
    /// Off: as [`VipDecision::NoBackend`], and another host has confirmed that it serves the VIP.
    HandedOver,
    /// Not added yet: no backend has passed its checks since lbd started.
    Unproven,
    /// Off: the host drains.
    Draining,
}

impl VipDecision {
    /// Whether the VIP belongs on the host.
    pub fn is_on(self) -> bool {
        matches!(self, Self::Served | Self::Kept)
    }
}

impl fmt::Display for VipDecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Served => "served",
            Self::Kept => "kept: no backend takes new flows",
            Self::NoBackend => "no backend takes new flows",
            Self::HandedOver => "no backend takes new flows on this host, and another host serves the VIP",
            Self::Unproven => "no backend has passed its checks yet",
            Self::Draining => "the host drains",
        })
    }
}

/// A VIP that is kept although nothing serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptVip {
    /// When the VIP was last served, in milliseconds since 1970 UTC; differs each time.
    pub since_ms: u64,
    /// Time until which the VIP is kept at least unless another host serves it, in milliseconds since 1970 UTC.
    pub until_ms: u64,
    /// Whether this host has live flows of the VIP, for which it is kept longer.
    pub has_flows: bool,
    /// Whether clients of a service at the VIP are answered by a reset, for which it is kept until another host serves it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resets: bool,
}

impl KeptVip {
    /// Since when and until when the VIP is kept, in words.
    pub fn describe(&self, now_ms: u64) -> String {
        let since_s = now_ms.saturating_sub(self.since_ms) / 1_000;
        if self.resets {
            return format!("for {since_s} s, until a host serves it");
        }
        match self.until_ms.saturating_sub(now_ms).div_ceil(1_000) {
            0 => format!("for {since_s} s, and while flows remain"),
            left_s => format!("for {since_s} s, at least {left_s} s more, then while flows remain"),
        }
    }
}

/// What a host publishes about its VIPs, so that others know whether they may withdraw theirs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// VIPs that the host keeps.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kept: BTreeMap<IpAddr, KeptVip>,
    /// VIPs that the host announces and serves: names of hosts that keep them, and since when. These may withdraw.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub covers: BTreeMap<IpAddr, BTreeMap<String, u64>>,
}

/// The present, by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Milliseconds since boot: measures durations.
    pub boot_ms: u64,
    /// Milliseconds since 1970 UTC: shown to people.
    pub unix_ms: u64,
}

/// All services at one VIP.
#[derive(Clone, Copy, Default)]
struct AtVip {
    served: bool,
    proven: bool,
    /// Whether any service keeps the VIP; the next three fields are about such services only.
    keeps: bool,
    resets: bool,
    has_flows: bool,
    panics: bool,
    drain_ms: u64,
    /// Of all services.
    spread_ms: u64,
}

impl AtVip {
    fn add(&mut self, service: &ServiceAt) {
        self.served |= service.served;
        self.proven |= service.served && service.proven;
        self.spread_ms = self.spread_ms.max(service.spread_ms);
        if service.keeps {
            self.keeps = true;
            self.resets |= service.resets;
            self.has_flows |= service.has_flows;
            self.panics |= service.panics;
            self.drain_ms = self.drain_ms.max(service.drain_ms);
        }
    }
}

/// A VIP that is on and not served.
#[derive(Clone, Copy)]
struct Unserved {
    since_boot_ms: u64,
    /// Since when another host has covered it without interruption.
    covered_boot_ms: Option<u64>,
    /// Time from the last decision after which the next may differ, if nothing else changes.
    left: Option<Duration>,
    kept: KeptVip,
}

/// Decides about the VIPs of one host; remembers when each stopped being served.
pub struct VipPolicy {
    host: String,
    unserved: BTreeMap<IpAddr, Unserved>,
    /// VIPs that are served by a backend that is known to be good.
    proven: BTreeSet<IpAddr>,
    last_epoch: u64,
}

impl VipPolicy {
    /// Starts for a host, without memory: a VIP that is on and not served counts as served until now.
    pub fn new(host: String) -> Self {
        Self { host, unserved: BTreeMap::new(), proven: BTreeSet::new(), last_epoch: 0 }
    }

    /// Decides for each VIP whether it belongs on this host, given those that are `on` and what other hosts publish.
    ///
    /// A VIP is on as long as one service at it is served: removing it because of another service would take the
    /// served one down too. It is added only after a backend has passed its checks, so that a host that has just
    /// started attracts no clients before it knows a healthy worker; a VIP that is already on (lbd was restarted) stays.
    pub fn decide(
        &mut self,
        services: &[ServiceAt],
        on: &BTreeSet<IpAddr>,
        is_draining: bool,
        peers: &BTreeMap<String, Handover>,
        now: Now,
    ) -> BTreeMap<IpAddr, VipDecision> {
        let mut all: BTreeMap<IpAddr, AtVip> = BTreeMap::new();
        services.iter().for_each(|service| all.entry(service.vip).or_default().add(service));
        self.unserved.retain(|vip, _| on.contains(vip) && all.get(vip).is_some_and(|at| !at.served));
        self.proven = all.iter().filter(|(_, at)| at.proven).map(|(&vip, _)| vip).collect();
        let decisions = all.into_iter().map(|(vip, at)| {
            let decision = match (at.served, on.contains(&vip)) {
                _ if is_draining => VipDecision::Draining,
                (true, false) if !at.proven => VipDecision::Unproven,
                (true, _) => VipDecision::Served,
                (false, false) => VipDecision::NoBackend,
                (false, true) => self.decide_unserved(vip, at, peers, now),
            };
            (vip, decision)
        });
        decisions.collect()
    }

    /// Decides for a VIP that is on and that nothing serves here.
    fn decide_unserved(
        &mut self,
        vip: IpAddr,
        at: AtVip,
        peers: &BTreeMap<String, Handover>,
        now: Now,
    ) -> VipDecision {
        let last = &mut self.last_epoch;
        let unserved = self.unserved.entry(vip).or_insert_with(|| {
            *last = now.unix_ms.max(*last + 1);
            let kept = KeptVip { since_ms: *last, until_ms: 0, has_flows: false, resets: false };
            Unserved { since_boot_ms: now.boot_ms, covered_boot_ms: None, left: None, kept }
        });
        unserved.kept.until_ms = unserved.kept.since_ms.saturating_add(at.drain_ms);
        unserved.kept.has_flows = at.has_flows;
        unserved.kept.resets = at.resets;
        let since_ms = unserved.kept.since_ms;
        let covers = |peer: &Handover| peer.covers.get(&vip)?.get(&self.host).copied();
        let has_flows = |peer: &Handover| peer.kept.get(&vip).is_some_and(|kept| kept.has_flows);
        let left_of = |ms: u64, since_ms: u64| ms.saturating_sub(now.boot_ms.saturating_sub(since_ms));
        let is_covered = peers.values().any(|peer| covers(peer) == Some(since_ms));
        unserved.covered_boot_ms = is_covered.then(|| unserved.covered_boot_ms.unwrap_or(now.boot_ms));
        let cover_left_ms = unserved.covered_boot_ms.map(|since_ms| left_of(at.spread_ms, since_ms));
        let drain_left_ms = left_of(at.drain_ms, unserved.since_boot_ms);
        let next_ms = [cover_left_ms, Some(drain_left_ms)].into_iter().flatten().filter(|&ms| ms > 0).min();
        unserved.left = next_ms.map(Duration::from_millis);
        if !at.keeps {
            VipDecision::NoBackend
        } else if cover_left_ms == Some(0) {
            VipDecision::HandedOver
        // Flows of other hosts count too: a router that loses one of several paths may move flows of the others.
        } else if at.resets || drain_left_ms > 0 || at.has_flows || at.panics || peers.values().any(has_flows)
        {
            VipDecision::Kept
        } else {
            VipDecision::NoBackend
        }
    }

    /// Since when and until when a VIP is kept, if it is on and not served.
    pub fn kept(&self, vip: IpAddr) -> Option<KeptVip> {
        self.unserved.get(&vip).map(|unserved| unserved.kept)
    }

    /// Time from the last decision after which the next may differ, if nothing else changes.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.unserved.values().filter_map(|unserved| unserved.left).min()
    }

    /// What to publish after the last decision was carried out: `up` are the VIPs that are on now.
    pub fn handover(&self, up: &BTreeSet<IpAddr>, peers: &BTreeMap<String, Handover>) -> Handover {
        let kept = self.unserved.iter().filter(|(vip, _)| up.contains(vip)).map(|(&vip, u)| (vip, u.kept));
        let mut covers: BTreeMap<IpAddr, BTreeMap<String, u64>> = BTreeMap::new();
        for (name, peer) in peers {
            for (&vip, kept) in
                peer.kept.iter().filter(|(vip, _)| up.contains(vip) && self.proven.contains(vip))
            {
                covers.entry(vip).or_default().insert(name.clone(), kept.since_ms);
            }
        }
        Handover { kept: kept.collect(), covers }
    }
}

#[cfg(test)]
mod tests;
