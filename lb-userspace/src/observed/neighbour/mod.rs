//! How the kernel would reach each backend: egress interface, addresses, MTU, and the next hop's MAC, kept
//! resolved and watched.
//!
//! Input: the addresses of the desired state (watched), and the kernel's links, routes and neighbours
//! (rtnetlink, watched). Output: whole [`Paths`], whenever something in them changes; an address
//! that is missing is left to the kernel's FIB. [`table`] is pure; [`netlink`] talks to the kernel.
//! Called by the daemon.

pub mod netlink;
pub mod table;

use crate::desired::{
    model::{Desired, ForwardingMode, Paths, Service},
    store::Stored,
};
use futures_util::{StreamExt, stream::BoxStream};
use netlink::{Kernel, Message, Seen};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};
use table::Table;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

/// How long changes are gathered: long enough for a burst, too short for a packet to notice.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Shortest time between two rounds of route lookups, however fast routes change.
const ROUTES: Duration = Duration::from_millis(300);
/// Everything is read anew this often, should a message have been lost unseen.
const RESYNC: Duration = Duration::from_secs(60);
/// Where the kernel does not keep neighbours resolved by itself, it is asked to use them this often.
const REFRESH: Duration = Duration::from_secs(15);

/// Backends without a next hop that are told one by one.
const TOLD: usize = 10;

/// Why the kernel cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum NeighbourError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// A dump failed.
    #[error("cannot read {what} by netlink: {source}")]
    Read {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: rtnetlink::Error,
    },
    /// The connection's task has ended.
    #[error("the netlink connection ended")]
    Closed,
}

/// Keeps next hops up to date.
pub struct Resolver {
    kernel: Kernel,
    messages: BoxStream<'static, Message>,
    table: Table,
    wanted: BTreeSet<IpAddr>,
    /// State that `wanted` is of.
    followed: Arc<Desired>,
    /// Neighbours that the kernel was asked to keep resolved.
    kept: BTreeSet<(u32, IpAddr)>,
    told: Option<Paths>,
    unresolved: BTreeMap<IpAddr, String>,
}

impl Resolver {
    /// Opens netlink in the current network namespace.
    ///
    /// # Errors
    /// The sockets cannot be had.
    pub fn open() -> Result<Self, NeighbourError> {
        let (kernel, messages) = Kernel::open()?;
        Ok(Self {
            kernel,
            messages,
            table: Table::default(),
            wanted: BTreeSet::new(),
            followed: Arc::default(),
            kept: BTreeSet::new(),
            told: None,
            unresolved: BTreeMap::new(),
        })
    }

    /// Follows the desired state and the kernel until either is gone. Sends the first map at once, even if
    /// it is empty.
    ///
    /// # Errors
    /// Netlink failed for good.
    pub async fn run(
        mut self,
        mut desired: watch::Receiver<Stored>,
        paths: mpsc::Sender<Paths>,
    ) -> Result<(), NeighbourError> {
        self.resync().await?;
        self.followed = desired.borrow_and_update().desired.clone();
        let wanted = addresses(&self.followed);
        self.want(&wanted).await;
        self.keep_resolved().await;
        self.tell(&paths).await;
        let (mut resync, mut refresh) = (Instant::now() + RESYNC, Instant::now() + REFRESH);
        let mut routes_at = Instant::now();
        let (mut due, mut routes_stale) = (None::<Instant>, false);
        loop {
            let act = due.unwrap_or(resync.min(refresh));
            tokio::select! {
                message = self.messages.next() => {
                    let Some(message) = message else { return Err(NeighbourError::Closed) };
                    match self.table.take(netlink::read(message)) {
                        Seen::Nothing => continue,
                        Seen::Table => {}
                        Seen::Routes => routes_stale = true,
                        Seen::Loss => { tracing::warn!("netlink messages were lost: reading everything anew"); resync = Instant::now() }
                    }
                    let at = Instant::now() + DEBOUNCE;
                    due = Some(due.unwrap_or(at));
                }
                changed = desired.changed() => {
                    if changed.is_err() { return Ok(()); }
                    let new = desired.borrow_and_update().desired.clone();
                    let same = has_same_backends(&self.followed, &new);
                    let wanted = if same { BTreeSet::new() } else { addresses(&new) };
                    self.followed = new;
                    if same || wanted == self.wanted { continue; }
                    self.want(&wanted).await;
                    due = Some(Instant::now());
                }
                () = sleep_until(act) => {
                    let now = Instant::now();
                    due = None;
                    if now >= resync {
                        self.resync().await?;
                        (resync, routes_stale) = (now + RESYNC, true);
                    }
                    if routes_stale && now < routes_at {
                        // Routes flap: neighbours and links are told now, routes in a moment.
                        due = Some(routes_at);
                    } else if routes_stale {
                        self.look_up_routes(&self.wanted.clone()).await;
                        (routes_at, routes_stale) = (Instant::now() + ROUTES, false);
                    }
                    if now >= refresh {
                        refresh = now + REFRESH;
                        if !self.kernel.keeps_neighbours() { self.kept.clear(); }
                    }
                    self.keep_resolved().await;
                    self.tell(&paths).await;
                    if paths.is_closed() { return Ok(()); }
                }
            }
        }
    }

    /// Reads links and neighbours anew.
    async fn resync(&mut self) -> Result<(), NeighbourError> {
        self.table.links = self.kernel.links().await?;
        self.table.neighbours = self.kernel.neighbours().await?;
        Ok(())
    }

    /// Takes up new addresses and lets go of those that are gone.
    async fn want(&mut self, wanted: &BTreeSet<IpAddr>) {
        let new: BTreeSet<IpAddr> = wanted.difference(&self.wanted).copied().collect();
        self.table.routes.retain(|address, _| wanted.contains(address));
        self.wanted.clone_from(wanted);
        self.look_up_routes(&new).await;
    }

    async fn look_up_routes(&mut self, addresses: &BTreeSet<IpAddr>) {
        for &address in addresses {
            let route = self.kernel.route(address).await;
            self.table.routes.insert(address, route);
        }
    }

    /// Asks the kernel to resolve the next hops, and to keep them so.
    async fn keep_resolved(&mut self) {
        let needed = self.table.needed();
        for &(ifindex, address) in self.kept.difference(&needed) {
            self.kernel.release(ifindex, address).await;
        }
        self.kept.retain(|k| needed.contains(k));
        for &(ifindex, address) in &needed {
            // One that was flushed, say with its interface, is asked for again.
            if self.kept.contains(&(ifindex, address))
                && self.table.neighbours.contains_key(&(ifindex, address))
            {
                continue;
            }
            match self.kernel.keep(ifindex, address).await {
                Ok(()) => {
                    self.kept.insert((ifindex, address));
                }
                Err(error) => tracing::debug!(ifindex, %address, %error, "neighbour cannot be asked for"),
            }
        }
    }

    async fn tell(&mut self, paths: &mpsc::Sender<Paths>) {
        let (found, missing) = self.table.next_hops();
        let news: Vec<_> = missing.iter().filter(|(a, why)| self.unresolved.get(a) != Some(why)).collect();
        for (address, why) in news.iter().take(TOLD) {
            tracing::info!(%address, why, "backend has no next hop: its packets ask the kernel's routes");
        }
        if news.len() > TOLD {
            tracing::info!(
                backends = news.len() - TOLD,
                "and more have no next hop: `lbctl status` counts them"
            );
        }
        let resolved: Vec<_> = self.unresolved.keys().filter(|a| found.contains_key(*a)).collect();
        match resolved[..] {
            [] => {}
            [address] => tracing::info!(%address, "next hop resolved"),
            _ => tracing::info!(backends = resolved.len(), "next hops resolved"),
        }
        self.unresolved = missing;
        let found = Paths { next_hops: found, links: self.table.ethernet() };
        if self.told.as_ref() != Some(&found) {
            self.told = Some(found.clone());
            let _ = paths.send(found).await;
        }
    }
}

fn addresses(desired: &Desired) -> BTreeSet<IpAddr> {
    desired.services.values().flat_map(|s| hops_of(s)).collect()
}

/// Addresses that need a next hop: all but those of this host itself.
fn hops_of(service: &Service) -> impl Iterator<Item = IpAddr> {
    let backends = (service.mode != ForwardingMode::Local).then_some(&service.backends);
    backends.into_iter().flat_map(|all| all.values().map(|b| b.address))
}

/// Whether both states have the same backends at the same addresses; cheap where services are shared.
fn has_same_backends(old: &Desired, new: &Desired) -> bool {
    let addresses = |s: &Arc<Service>| -> Vec<IpAddr> { hops_of(s).collect() };
    let same = |a: &Arc<Service>, b: &Arc<Service>| Arc::ptr_eq(a, b) || addresses(a) == addresses(b);
    old.services.len() == new.services.len()
        && old.services.iter().all(|(name, a)| new.services.get(name).is_some_and(|b| same(a, b)))
}
