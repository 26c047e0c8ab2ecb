//! Adds VIPs to this host and removes them, so that BIRD, FRR or ExaBGP, which announce the addresses of an
//! interface, announce exactly the VIPs that are served, or kept for established flows.
//!
//! Input: the reconciler's snapshots, the drain of this host, the kernel's list of addresses (rtnetlink, watched), and
//! what other hosts publish ([`Peers`]). Output: addresses (/32, /128) of one interface, marked as lbd's; an
//! [`Announcement`] for API, metrics and the other hosts; and this host's part of a handover. The rule is
//! [`crate::plan::policy::announce`]. Called by the daemon.
//!
//! Our addresses carry a mark in the kernel (`IFA_PROTO`), so no memory of lbd can be wrong after a crash or with
//! another lbd. The drain of a host is kept in the local file and not in the desired state: it works while the store
//! is away, and no rollback ends it.

pub mod addresses;
mod peers;

pub use peers::Peers;

use crate::{
    apply::{
        dataplane::{DataplaneError, index_of},
        reconcile::Published,
    },
    clock,
    desired::model::{Health, HealthCheck, HealthKind, WhenAllDown},
    plan::{
        compile::CompiledBackend,
        policy::announce::{KeptVip, Now, ServiceAt, VipDecision, VipPolicy},
    },
};
use addresses::HostAddress;
use futures_util::{StreamExt, stream::BoxStream};
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// Shortest time between removing a VIP and adding it again: routers penalise routes that flap.
const HOLD: Duration = Duration::from_secs(1);
/// Interval at which addresses are compared with the wanted ones, without any notice from the kernel.
const RESYNC: Duration = Duration::from_secs(10);
/// Time between a failure and the next attempt.
const RETRY: Duration = Duration::from_secs(1);

/// Longest time between two hosts applying the same revision, in milliseconds.
const STORE_SPREAD_MS: u64 = 500;
/// Bound of the time for which a host waits for the others' verdicts: its new flows are dropped meanwhile.
const MAX_SPREAD_MS: u64 = 5_000;

/// Why VIPs cannot be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// No netlink socket could be opened.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The interface does not exist.
    #[error(transparent)]
    Interface(#[from] DataplaneError),
    /// The kernel does not keep marks of addresses.
    #[error(
        "Linux {release} cannot mark the addresses that lbd adds to an interface: announce needs Linux 5.18 or later"
    )]
    TooOld {
        /// Version of the kernel.
        release: String,
    },
    /// The kernel refused a request.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// Request, as a verb with its object.
        what: String,
        /// Error of the kernel.
        #[source]
        source: rtnetlink::Error,
    },
}

fn kernel(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> AnnounceError {
    let what = what.into();
    move |source| AnnounceError::Kernel { what, source }
}

/// State of a service's VIP on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VipState {
    /// The address.
    pub vip: IpAddr,
    /// Interface that the VIP is added to.
    pub interface: String,
    /// Whether the VIP is on this host.
    pub on: bool,
    /// Whether the VIP should be on this host, and why.
    pub decision: VipDecision,
    /// Time of the last change of `on`, in milliseconds since 1970 UTC.
    pub since_ms: u64,
    /// Interface that had the VIP without lbd, which therefore leaves it alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign: Option<String>,
    /// For a VIP that is kept although nothing serves it: since when, and until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<KeptVip>,
}

/// VIPs that this host announces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Interface that VIPs are added to.
    pub interface: String,
    /// VIPs of all services.
    pub vips: Vec<VipState>,
    /// Number of VIPs added or removed since the start.
    pub changes: u64,
    /// Error of the last attempt, if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl Announcement {
    /// VIPs that are on this host.
    pub fn on(&self) -> impl Iterator<Item = IpAddr> {
        self.vips.iter().filter(|v| v.on).map(|v| v.vip)
    }

    /// VIPs that are kept although nothing serves them.
    pub fn kept(&self) -> impl Iterator<Item = (IpAddr, KeptVip)> {
        self.vips.iter().filter_map(|v| Some((v.vip, v.kept?)))
    }

    /// State of a VIP.
    pub fn vip(&self, vip: IpAddr) -> Option<&VipState> {
        self.vips.iter().find(|v| v.vip == vip)
    }
}

/// Adds VIPs to an interface and removes them.
pub struct Announcer {
    handle: Handle,
    changed: BoxStream<'static, ()>,
    interface: String,
    policy: VipPolicy,
    peers: Peers,
    /// Published state.
    shown: watch::Sender<Announcement>,
    /// When each VIP was last removed.
    off: BTreeMap<IpAddr, Instant>,
    changes: u64,
}

/// Whether the kernel keeps marks: Linux before 5.18 ignores them silently.
fn keeps_marks(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (5, 18)
}

impl Announcer {
    /// Opens netlink in the current network namespace; changes nothing yet.
    ///
    /// # Errors
    /// The interface does not exist, the kernel is too old, or the sockets cannot be opened.
    pub fn open(
        interface: &str,
        peers: Peers,
    ) -> Result<(Self, watch::Receiver<Announcement>), AnnounceError> {
        index_of(interface)?;
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        if !keeps_marks(&release) {
            return Err(AnnounceError::TooOld { release: release.trim().to_owned() });
        }
        let (connection, handle, _) = new_connection()?;
        tokio::spawn(connection);
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr, MulticastGroup::Link];
        let (watch, _, messages) = new_multicast_connection(&groups)?;
        tokio::spawn(watch);
        let first = Announcement { interface: interface.to_owned(), ..Announcement::default() };
        let (shown, seen) = watch::channel(first);
        let announcer = Self {
            handle,
            changed: messages.map(drop).boxed(),
            interface: interface.to_owned(),
            policy: VipPolicy::new(peers.host().to_owned()),
            peers,
            shown,
            off: BTreeMap::new(),
            changes: 0,
        };
        Ok((announcer, seen))
    }

    /// Follows the snapshots and the drain until their senders are gone. The first snapshot must describe the maps, not be
    /// the initial empty one.
    ///
    /// # Errors
    /// None: a failure is published, and retried.
    pub async fn run(
        mut self,
        mut published: watch::Receiver<Arc<Published>>,
        mut is_draining: watch::Receiver<bool>,
    ) -> Result<(), AnnounceError> {
        loop {
            let services = services(&published.borrow_and_update());
            let draining = *is_draining.borrow_and_update();
            let again = match self.attempt(&services, draining).await {
                Ok(again) => again,
                Err(error) => {
                    let problem = Some(error.to_string());
                    self.shown.send_if_modified(|shown| {
                        let is_new = shown.problem != problem;
                        if is_new {
                            tracing::error!(%error, "cannot update the VIPs of the interface");
                            shown.problem = problem;
                        }
                        is_new
                    });
                    Instant::now() + RETRY
                }
            };
            tokio::select! {
                changed = published.changed() => if changed.is_err() { return Ok(()) },
                changed = is_draining.changed() => if changed.is_err() { return Ok(()) },
                () = self.peers.changed() => {}
                _ = self.changed.next() => {}
                () = sleep_until(again) => {}
            }
        }
    }

    /// Updates the addresses once; returns the latest time for the next update.
    async fn attempt(&mut self, services: &[ServiceAt], is_draining: bool) -> Result<Instant, AnnounceError> {
        let ifindex = index_of(&self.interface)?;
        let found = addresses::read(&self.handle).await.map_err(kernel("read this host's addresses"))?;
        let (ours, others): (Vec<HostAddress>, Vec<HostAddress>) =
            found.into_iter().partition(|f| f.is_marked);
        let on: BTreeSet<IpAddr> = ours.iter().filter(|f| f.ifindex == ifindex).map(|f| f.address).collect();
        let now = Now { boot_ms: clock::boot().as_millis() as u64, unix_ms: clock::unix_ms() };
        let decisions = self.policy.decide(services, &on, is_draining, self.peers.known(), now);
        let foreign: BTreeMap<IpAddr, u32> = others
            .iter()
            .filter(|f| decisions.contains_key(&f.address))
            .map(|f| (f.address, f.ifindex))
            .collect();
        // Remove first: VIPs that are not served must go, whatever else fails.
        for found in ours {
            let vip = found.address;
            let belongs = found.ifindex == ifindex && decisions.get(&vip).is_some_and(|d| d.is_on());
            if belongs {
                continue;
            }
            addresses::remove(&self.handle, found).await.map_err(kernel(format!("remove {vip}")))?;
            let why = decisions.get(&vip).map_or("no service has this VIP".to_owned(), ToString::to_string);
            // An event of the API tells of it too, and is in the log.
            tracing::debug!(%vip, interface = self.interface, why, "VIP removed");
            self.off.insert(vip, Instant::now());
            self.changes += 1;
        }
        let now = Instant::now();
        self.off.retain(|_, at| *at + HOLD > now);
        let mut again = now + RESYNC;
        if let Some(left) = self.policy.next_expiry() {
            again = again.min(now + left);
        }
        let mut up = on;
        up.retain(|vip| decisions.get(vip).is_some_and(|d| d.is_on()));
        for (&vip, _) in decisions.iter().filter(|(vip, d)| d.is_on() && !foreign.contains_key(vip)) {
            if up.contains(&vip) {
                continue;
            }
            if let Some(&at) = self.off.get(&vip) {
                again = again.min(at + HOLD);
                continue;
            }
            let failed = || kernel(format!("add {vip} to {}", self.interface));
            addresses::set_up(&self.handle, ifindex).await.map_err(failed())?;
            addresses::add(&self.handle, ifindex, vip).await.map_err(failed())?;
            tracing::debug!(%vip, interface = self.interface, "VIP added");
            up.insert(vip);
            self.changes += 1;
        }
        self.publish(&decisions, &up, &foreign);
        // Only now: what is told to other hosts must be true.
        self.peers.publish(self.policy.handover(&up, self.peers.known()));
        Ok(again)
    }

    fn publish(
        &self,
        decisions: &BTreeMap<IpAddr, VipDecision>,
        up: &BTreeSet<IpAddr>,
        foreign: &BTreeMap<IpAddr, u32>,
    ) {
        let name = |ifindex: &u32| {
            nix::net::if_::if_indextoname(*ifindex)
                .map_or_else(|_| format!("interface {ifindex}"), |n| n.to_string_lossy().into_owned())
        };
        self.shown.send_if_modified(|shown| {
            let vips = decisions.iter().map(|(&vip, &decision)| {
                let foreign = foreign.get(&vip).map(name);
                let on = up.contains(&vip) || foreign.is_some();
                let before = shown.vip(vip).filter(|before| before.on == on);
                let since_ms = before.map_or_else(clock::unix_ms, |before| before.since_ms);
                let kept = self.policy.kept(vip).filter(|_| decision == VipDecision::Kept);
                VipState { vip, interface: shown.interface.clone(), on, decision, since_ms, foreign, kept }
            });
            let new = Announcement {
                interface: shown.interface.clone(),
                vips: vips.collect(),
                changes: self.changes,
                problem: None,
            };
            let is_new = *shown != new;
            *shown = new;
            is_new
        });
    }
}

/// Longest time between two hosts noticing the same change of a service's backends: probes of hosts differ in phase and in
/// how long an answer takes, and the store's changes reach them at different times.
fn notice_spread_ms(health: &HealthCheck) -> u64 {
    let probes_ms = match health.kind {
        HealthKind::Unset | HealthKind::None => 0,
        _ => u64::from(health.interval_ms) + u64::from(health.timeout_ms),
    };
    (probes_ms + STORE_SPREAD_MS).min(MAX_SPREAD_MS)
}

/// Facts about each service that the rule needs.
fn services(published: &Published) -> Vec<ServiceAt> {
    let all = published.services.iter().filter_map(|(name, status)| {
        let service = published.desired.services.get(name)?;
        let good = |b: &CompiledBackend| b.eligible && b.health == Health::Healthy;
        let proven = status.backends.iter().any(good);
        Some(ServiceAt {
            vip: service.vip,
            // The panic rule says where packets go that come here. It must not draw clients from hosts that know a good
            // worker.
            served: status.eligible > 0 && (proven || !status.panic),
            panics: status.panic,
            proven,
            keeps: service.when_all_down != WhenAllDown::Withdraw,
            resets: service.when_all_down == WhenAllDown::Reset,
            has_flows: status.backends.iter().any(|b| published.tracked_flows(b.index) > 0),
            drain_ms: u64::from(service.drain_s) * 1_000,
            spread_ms: notice_spread_ms(&service.health),
        })
    });
    all.collect()
}

/// Removes every VIP that an `lbd ingress` of this host has added, on all interfaces; for the end of forwarding.
/// Returns the VIPs.
///
/// # Errors
/// The kernel refuses a request.
pub async fn withdraw() -> Result<Vec<IpAddr>, AnnounceError> {
    let (connection, handle, _) = new_connection()?;
    let task = tokio::spawn(connection);
    let found = addresses::read(&handle).await.map_err(kernel("read this host's addresses"))?;
    let mut removed = Vec::new();
    for found in found.into_iter().filter(|f| f.is_marked) {
        let vip = found.address;
        addresses::remove(&handle, found).await.map_err(kernel(format!("remove {vip}")))?;
        tracing::info!(%vip, "VIP removed");
        removed.push(vip);
    }
    task.abort();
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::keeps_marks;

    #[test]
    fn kernels_that_keep_marks_are_told_by_their_version() {
        for (release, keeps) in [
            ("6.1.0-18-amd64\n", true),
            ("5.18.0", true),
            ("5.15.0-91-generic", false),
            ("4.19", false),
            ("", false),
        ] {
            assert_eq!(keeps_marks(release), keeps, "{release}");
        }
    }
}
