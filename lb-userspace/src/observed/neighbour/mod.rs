//! Next hop of each backend as the kernel would choose it: egress interface, addresses, MTU, and the next hop's MAC,
//! kept resolved and watched.
//!
//! Input: the addresses of the desired state (watched), and the kernel's links, routes and neighbours
//! (rtnetlink, watched). Output: complete [`Paths`], whenever something in them changes; packets to a missing
//! address consult the kernel's FIB. [`table`] is pure; [`netlink`] talks to the kernel.
//! Called by the daemon.

mod lost;
pub mod netlink;
pub mod table;

use crate::{
    desired::{
        model::{Desired, ForwardingMode, Paths, Service},
        store::Stored,
    },
    observed::path_mtu::{self, PathMtus},
};
use futures_util::{StreamExt, stream::BoxStream};
use lost::Lost;
use netlink::{Effect, Message, Netlink};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};
use table::{NeighbourTable, NoHop};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

/// How long changes are collected: long enough for a burst, too short to affect packets.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Shortest time between two rounds of route lookups.
const ROUTE_INTERVAL: Duration = Duration::from_millis(300);
/// Interval of a full read, in case a message was lost unnoticed.
const RESYNC: Duration = Duration::from_secs(60);
/// Interval at which lbd asks a kernel that does not keep neighbours resolved by itself.
const REFRESH: Duration = Duration::from_secs(15);

/// Largest number of backends without a next hop that are logged one by one.
const MAX_LOGGED: usize = 10;

/// Why routes and neighbours cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum NeighbourError {
    /// A netlink socket cannot be opened.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] std::io::Error),
    /// A dump failed.
    #[error("cannot read {what} over netlink: {source}")]
    Read {
        /// Kind of objects.
        what: &'static str,
        /// Error of netlink.
        #[source]
        source: rtnetlink::Error,
    },
    /// The connection's task has ended.
    #[error("the netlink connection ended")]
    Closed,
}

/// Keeps next hops up to date.
pub struct Resolver {
    kernel: Netlink,
    messages: BoxStream<'static, Message>,
    table: NeighbourTable,
    wanted: BTreeSet<IpAddr>,
    /// Desired state that `wanted` was taken from.
    current: Arc<Desired>,
    /// Neighbours that the kernel was asked to keep resolved.
    kept: BTreeSet<(u32, IpAddr)>,
    published: Option<Paths>,
    unresolved: BTreeMap<IpAddr, NoHop>,
    lost: Lost,
    path_mtus: PathMtus,
}

impl Resolver {
    /// Opens netlink in the current network namespace.
    ///
    /// # Errors
    /// The sockets cannot be opened.
    pub fn open() -> Result<Self, NeighbourError> {
        let (kernel, messages) = Netlink::open()?;
        Ok(Self {
            kernel,
            messages,
            table: NeighbourTable::default(),
            wanted: BTreeSet::new(),
            current: Arc::default(),
            kept: BTreeSet::new(),
            published: None,
            unresolved: BTreeMap::new(),
            lost: Lost::default(),
            path_mtus: PathMtus::default(),
        })
    }

    /// Watches the desired state and the kernel until either is gone. Sends the first paths immediately, even if
    /// they are empty.
    ///
    /// # Errors
    /// Netlink failed permanently.
    pub async fn run(
        mut self,
        mut desired: watch::Receiver<Stored>,
        paths: mpsc::Sender<Paths>,
    ) -> Result<(), NeighbourError> {
        self.resync().await?;
        self.current = desired.borrow_and_update().desired.clone();
        let wanted = backend_addresses(&self.current);
        self.set_wanted(&wanted).await;
        self.keep_resolved().await;
        self.publish(&paths).await;
        let (mut resync, mut refresh) = (Instant::now() + RESYNC, Instant::now() + REFRESH);
        let mut routes_at = Instant::now();
        let (mut due, mut routes_stale) = (None::<Instant>, false);
        let mut heard = path_mtu::listen();
        loop {
            let mtu_ends = self.path_mtus.next_end().map_or(resync, Instant::from_std);
            let act = due.unwrap_or(resync.min(refresh).min(mtu_ends));
            let act = self.lost.next(Instant::now()).map_or(act, |at| at.min(act));
            tokio::select! {
                message = self.messages.next() => {
                    let Some(message) = message else { return Err(NeighbourError::Closed) };
                    match self.table.update(netlink::read(message)) {
                        Effect::Nothing => continue,
                        Effect::Table => {}
                        Effect::Routes => routes_stale = true,
                        Effect::Loss => { tracing::warn!("netlink messages were lost: reading all links and neighbours again"); resync = Instant::now() }
                    }
                    let at = Instant::now() + DEBOUNCE;
                    due = Some(due.unwrap_or(at));
                }
                Some(said) = heard.recv() => {
                    let is_backend = self.wanted.contains(&said.destination);
                    if is_backend && self.path_mtus.hear(&said, std::time::Instant::now()) {
                        tracing::warn!(backend = %said.destination, mtu = said.mtu, "a router on the path to the backend has a smaller MTU");
                        due = Some(Instant::now());
                    }
                }
                changed = desired.changed() => {
                    if changed.is_err() { return Ok(()); }
                    let new = desired.borrow_and_update().desired.clone();
                    let same = has_same_backends(&self.current, &new);
                    let wanted = if same { BTreeSet::new() } else { backend_addresses(&new) };
                    self.current = new;
                    if same || wanted == self.wanted { continue; }
                    self.set_wanted(&wanted).await;
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
                        // Routes flap: publish neighbours and links now, look up routes at `routes_at`.
                        due = Some(routes_at);
                    } else if routes_stale {
                        self.look_up_routes(&self.wanted.clone()).await;
                        (routes_at, routes_stale) = (Instant::now() + ROUTE_INTERVAL, false);
                    }
                    if now >= refresh {
                        refresh = now + REFRESH;
                        if !self.kernel.keeps_neighbours() { self.kept.clear(); }
                    }
                    self.keep_resolved().await;
                    self.publish(&paths).await;
                    if paths.is_closed() { return Ok(()); }
                }
            }
        }
    }

    /// Reads all links and neighbours.
    async fn resync(&mut self) -> Result<(), NeighbourError> {
        self.table.links = self.kernel.links().await?;
        self.table.neighbours = self.kernel.neighbours().await?;
        Ok(())
    }

    /// Sets the addresses to resolve: looks up routes of new ones, forgets removed ones.
    async fn set_wanted(&mut self, wanted: &BTreeSet<IpAddr>) {
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

    /// Asks the kernel to resolve the next hops, and to keep them resolved.
    async fn keep_resolved(&mut self) {
        let needed = self.table.needed();
        for &(ifindex, address) in self.kept.difference(&needed) {
            self.kernel.release(ifindex, address).await;
        }
        self.kept.retain(|k| needed.contains(k));
        for &(ifindex, address) in &needed {
            // A neighbour that was flushed, for example with its interface, is requested again.
            if self.kept.contains(&(ifindex, address))
                && self.table.neighbours.contains_key(&(ifindex, address))
            {
                continue;
            }
            match self.kernel.keep(ifindex, address).await {
                Ok(()) => {
                    self.kept.insert((ifindex, address));
                }
                Err(error) => {
                    tracing::debug!(ifindex, %address, %error, "cannot ask the kernel to resolve a neighbour")
                }
            }
        }
    }

    async fn publish(&mut self, paths: &mpsc::Sender<Paths>) {
        let (mut found, missing) = self.table.next_hops();
        let now = std::time::Instant::now();
        self.path_mtus.retain(|address| self.wanted.contains(address), now);
        self.path_mtus.apply(&mut found, now);
        let news: Vec<_> = missing.iter().filter(|(a, why)| self.unresolved.get(a) != Some(why)).collect();
        for (address, NoHop { why, is_unreachable }) in news.iter().take(MAX_LOGGED) {
            if *is_unreachable {
                // An event of the API tells of it too, and is in the log.
                tracing::debug!(%address, why, "next hop unresolved");
            } else {
                tracing::info!(
                    "next hop of {address} unresolved ({why}): each packet to it needs a kernel route lookup"
                );
            }
        }
        if news.len() > MAX_LOGGED {
            tracing::info!(
                backends = news.len() - MAX_LOGGED,
                "next hops of further backends are unresolved: `lbctl status` lists them"
            );
        }
        let resolved: Vec<_> = self.unresolved.keys().filter(|a| found.contains_key(*a)).collect();
        match resolved[..] {
            [] => {}
            [address] => tracing::info!(%address, "next hop resolved"),
            _ => tracing::info!(backends = resolved.len(), "next hops resolved"),
        }
        self.unresolved = missing;
        let unreachable = self.lost.update(&self.unresolved, Instant::now());
        let found = Paths { next_hops: found, unreachable, links: self.table.ethernet() };
        if self.published.as_ref() != Some(&found) {
            self.published = Some(found.clone());
            let _ = paths.send(found).await;
        }
    }
}

fn backend_addresses(desired: &Desired) -> BTreeSet<IpAddr> {
    desired.services.values().flat_map(|s| routed_addresses(s)).collect()
}

/// A service's backend addresses that need a next hop: none in mode local.
fn routed_addresses(service: &Service) -> impl Iterator<Item = IpAddr> {
    let backends = (service.mode != ForwardingMode::Local).then_some(&service.backends);
    backends.into_iter().flat_map(|all| all.values().map(|b| b.address))
}

/// Whether both states have the same backend addresses; cheap where services are shared.
fn has_same_backends(old: &Desired, new: &Desired) -> bool {
    let addresses = |s: &Arc<Service>| -> Vec<IpAddr> { routed_addresses(s).collect() };
    let same = |a: &Arc<Service>, b: &Arc<Service>| Arc::ptr_eq(a, b) || addresses(a) == addresses(b);
    old.services.len() == new.services.len()
        && old.services.iter().all(|(name, a)| new.services.get(name).is_some_and(|b| same(a, b)))
}
