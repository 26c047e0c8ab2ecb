//! Puts VIPs on this host and takes them off it, so that BIRD, FRR or ExaBGP, which announce the addresses of an
//! interface, announce exactly what is served.
//!
//! Input: the reconciler's snapshots, the drain of this host, and the addresses that the kernel says there are
//! (rtnetlink, watched). Output: addresses (/32, /128) of one interface, marked as ours; and an [`Announcement`]
//! for API, metrics and the other hosts. The rule is [`crate::plan::policy::announce`]. Called by the daemon.

pub mod addresses;

use crate::{
    apply::{dataplane::DataplaneError, reconcile::Published},
    clock,
    desired::model::Health,
    plan::{
        compile::CompiledBackend,
        policy::announce::{ServiceAt, VipDecision, decide},
    },
};
use addresses::Found;
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

/// A VIP that was taken off comes back after this long at the earliest: routers punish routes that flap.
const HOLD: Duration = Duration::from_secs(1);
/// Addresses are compared with what they should be this often, whether or not the kernel said anything.
const RESYNC: Duration = Duration::from_secs(10);
/// After a failure, time to the next attempt.
const RETRY: Duration = Duration::from_secs(1);

/// Why VIPs cannot be put on or taken off.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The interface is not there.
    #[error(transparent)]
    Interface(#[from] DataplaneError),
    /// The kernel does not keep marks of addresses.
    #[error(
        "Linux {release} cannot tell the VIPs that lbd puts on an interface from other addresses; 5.18 and later can"
    )]
    TooOld {
        /// Its version.
        release: String,
    },
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: rtnetlink::Error,
    },
}

fn kernel(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> AnnounceError {
    let what = what.into();
    move |source| AnnounceError::Kernel { what, source }
}

/// A VIP of some service, as it is on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VipState {
    /// The address.
    pub vip: IpAddr,
    /// Interface that it is put on.
    pub interface: String,
    /// Whether it is on this host.
    pub on: bool,
    /// Whether it belongs there, and why.
    pub decision: VipDecision,
    /// Since when it is on, or off, in milliseconds since 1970 UTC.
    pub since_ms: u64,
    /// It was there before lbd, which therefore leaves it alone, on this interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign: Option<String>,
}

/// What this host announces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Interface that VIPs are put on.
    pub interface: String,
    /// VIPs of all services.
    pub vips: Vec<VipState>,
    /// How often a VIP was put on or taken off since the start.
    pub changes: u64,
    /// Why the last attempt failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl Announcement {
    /// VIPs that are on this host.
    pub fn on(&self) -> impl Iterator<Item = IpAddr> {
        self.vips.iter().filter(|v| v.on).map(|v| v.vip)
    }

    /// What is known of a VIP.
    pub fn vip(&self, vip: IpAddr) -> Option<&VipState> {
        self.vips.iter().find(|v| v.vip == vip)
    }
}

/// Puts VIPs on and takes them off.
pub struct Announcer {
    handle: Handle,
    changed: BoxStream<'static, ()>,
    interface: String,
    /// What it shows.
    shown: watch::Sender<Announcement>,
    /// When each VIP was last taken off.
    off: BTreeMap<IpAddr, Instant>,
    changes: u64,
}

fn index_of(interface: &str) -> Result<u32, DataplaneError> {
    nix::net::if_::if_nametoindex(interface).map_err(|_| {
        let all = nix::net::if_::if_nameindex();
        let mut present: Vec<String> = all
            .map(|all| all.iter().map(|i| i.name().to_string_lossy().into_owned()).collect())
            .unwrap_or_default();
        present.sort();
        DataplaneError::NoInterface { interface: interface.to_owned(), present: present.join(", ") }
    })
}

/// Marks came with Linux 5.18; an older one ignores them without a word.
fn keeps_marks(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (5, 18)
}

impl Announcer {
    /// Opens netlink in the current network namespace; changes nothing yet.
    ///
    /// # Errors
    /// There is no such interface, or the sockets cannot be had.
    pub fn open(interface: &str) -> Result<(Self, watch::Receiver<Announcement>), AnnounceError> {
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
            shown,
            off: BTreeMap::new(),
            changes: 0,
        };
        Ok((announcer, seen))
    }

    /// Follows the snapshots and the drain until nobody publishes any more. The first snapshot must be of what
    /// is in the maps, not the empty one from before.
    ///
    /// # Errors
    /// None: what fails is shown, and tried again.
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
                            tracing::error!(%error, "VIPs are not as they should be");
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
                _ = self.changed.next() => {}
                () = sleep_until(again) => {}
            }
        }
    }

    /// Brings the addresses up to date once; says when to look again at the latest.
    async fn attempt(&mut self, services: &[ServiceAt], is_draining: bool) -> Result<Instant, AnnounceError> {
        let ifindex = index_of(&self.interface)?;
        let found = addresses::read(&self.handle).await.map_err(kernel("read this host's addresses"))?;
        let (ours, others): (Vec<Found>, Vec<Found>) = found.into_iter().partition(|f| f.is_marked);
        let on: BTreeSet<IpAddr> = ours.iter().filter(|f| f.ifindex == ifindex).map(|f| f.address).collect();
        let decisions = decide(services, &on, is_draining);
        let foreign: BTreeMap<IpAddr, u32> = others
            .iter()
            .filter(|f| decisions.contains_key(&f.address))
            .map(|f| (f.address, f.ifindex))
            .collect();
        // Off first: what is not served must go, whatever else fails.
        for found in ours {
            let vip = found.address;
            let belongs = found.ifindex == ifindex && decisions.get(&vip).is_some_and(|d| d.is_on());
            if belongs {
                continue;
            }
            addresses::take_off(&self.handle, found).await.map_err(kernel(format!("take {vip} off")))?;
            let why = decisions.get(&vip).map_or("no service has it".to_owned(), ToString::to_string);
            tracing::info!(%vip, interface = self.interface, why, "VIP taken off");
            self.off.insert(vip, Instant::now());
            self.changes += 1;
        }
        let now = Instant::now();
        self.off.retain(|_, at| *at + HOLD > now);
        let mut again = now + RESYNC;
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
            let failed = || kernel(format!("put {vip} on {}", self.interface));
            addresses::set_up(&self.handle, ifindex).await.map_err(failed())?;
            addresses::put(&self.handle, ifindex, vip).await.map_err(failed())?;
            tracing::info!(%vip, interface = self.interface, "VIP put on");
            up.insert(vip);
            self.changes += 1;
        }
        self.show(&decisions, &up, &foreign);
        Ok(again)
    }

    fn show(
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
                VipState { vip, interface: shown.interface.clone(), on, decision, since_ms, foreign }
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

/// What the rule needs to know of each service.
fn services(published: &Published) -> Vec<ServiceAt> {
    let all = published.services.iter().filter_map(|(name, status)| {
        let service = published.desired.services.get(name)?;
        let good = |b: &CompiledBackend| b.eligible && b.health == Health::Healthy;
        let proven = status.panic || status.backends.iter().any(good);
        Some(ServiceAt { vip: service.vip, served: status.eligible > 0, proven })
    });
    all.collect()
}

/// Takes every VIP off that an `lbd ingress` of this host has put on, whichever interface it is on; for the end
/// of forwarding. Returns them.
///
/// # Errors
/// The kernel refuses.
pub async fn withdraw() -> Result<Vec<IpAddr>, AnnounceError> {
    let (connection, handle, _) = new_connection()?;
    let task = tokio::spawn(connection);
    let found = addresses::read(&handle).await.map_err(kernel("read this host's addresses"))?;
    let mut gone = Vec::new();
    for found in found.into_iter().filter(|f| f.is_marked) {
        let vip = found.address;
        addresses::take_off(&handle, found).await.map_err(kernel(format!("take {vip} off")))?;
        tracing::info!(%vip, "VIP taken off");
        gone.push(vip);
    }
    task.abort();
    Ok(gone)
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
