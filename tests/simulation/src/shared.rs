//! A store that several hosts share: one log, as etcd keeps it, which each host follows with a lag, and from which it can
//! be cut off. Records are differences, made and applied by the code of the etcd store.

use super::environment;
use futures_util::future::BoxFuture;
use lb_userspace::{
    clock,
    desired::{
        model::{Desired, Name},
        store::{
            About, Claim, Commit, HOSTS, HostValues, Lock, MEMBERS, Retire, Revision, ServiceHistory, Store,
            StoreError, StoreLink, Stored, delta,
        },
    },
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};
use tokio::{sync::watch, time::sleep};

/// How long values outlive a host that stops renewing them.
const LEASE: Duration = Duration::from_secs(10);
/// Interval at which a host asks for news.
const POLL: Duration = Duration::from_millis(20);

/// What the members of the cluster hold.
#[derive(Default)]
pub struct Log {
    records: BTreeMap<u64, (Revision, Value)>,
    /// State before the oldest record.
    base: Arc<Desired>,
    head: Arc<Desired>,
    number: u64,
    values: BTreeMap<String, (Vec<u8>, Option<u64>)>,
    /// End of each host's lease, by the time since boot.
    leases: BTreeMap<u64, Duration>,
    locks: BTreeMap<String, (Lock, Duration)>,
    retired: Option<Retire>,
    /// Counts changes of values, so that followers notice them.
    version: u64,
    sessions: u64,
}

impl Log {
    /// Forgets all but the newest `keep` revisions.
    pub fn compact(&mut self, keep: u64) {
        while let Some((&oldest, _)) = self.records.first_key_value()
            && oldest + keep <= self.number
        {
            if let Some((_, record)) = self.records.remove(&oldest) {
                self.base =
                    Arc::new(delta::apply(&self.base, &record).expect("it was written by this version"));
            }
        }
    }

    fn expire(&mut self) {
        let now = environment::now();
        let (leases, before) = (&mut self.leases, self.values.len());
        leases.retain(|_, until| *until > now);
        self.values.retain(|_, (_, session)| session.is_none_or(|s| leases.contains_key(&s)));
        self.locks.retain(|_, (_, until)| *until > now);
        if self.values.len() != before {
            self.version += 1;
        }
    }

    fn state(&self, number: u64) -> Option<Arc<Desired>> {
        let first = self.records.first_key_value().map_or(self.number + 1, |(n, _)| *n);
        if number + 1 < first || number > self.number {
            return None;
        }
        let mut state = self.base.clone();
        for (_, record) in self.records.range(..=number).map(|(_, r)| r) {
            state = Arc::new(delta::apply(&state, record).expect("it was written by this version"));
        }
        Some(state)
    }

    pub fn stored(&self, number: u64) -> Option<Stored> {
        let revision = match self.records.get(&number) {
            Some((revision, _)) => revision.clone(),
            None if number == 0 && self.state(0).is_some() => empty().revision,
            None => return None,
        };
        let desired = if number == self.number { self.head.clone() } else { self.state(number)? };
        Some(Stored { revision, desired })
    }
}

fn empty() -> Stored {
    let revision =
        Revision { number: 0, author: String::new(), time_ms: 0, message: String::new(), summary: None };
    Stored { revision, desired: Arc::default() }
}

/// The connection of one host to the cluster.
#[derive(Clone, Default)]
pub struct Link(Arc<Mutex<LinkState>>);

#[derive(Clone, Copy)]
pub struct LinkState {
    pub is_cut: bool,
    pub delay: Duration,
}

impl Default for LinkState {
    fn default() -> Self {
        Self { is_cut: false, delay: Duration::from_millis(2) }
    }
}

impl Link {
    pub fn get(&self) -> LinkState {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, state: LinkState) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    pub fn is_good(&self) -> bool {
        let state = self.get();
        !state.is_cut && state.delay <= LinkState::default().delay
    }
}

/// The cluster.
pub type Cluster = Arc<Mutex<Log>>;

/// The state that a host has seen last, which outlives its daemon.
pub type LastKnown = Arc<Mutex<Option<Stored>>>;

/// One host's view of the cluster.
pub struct SharedStore {
    cluster: Cluster,
    link: Link,
    known: LastKnown,
    session: u64,
    head: watch::Sender<Stored>,
    state: watch::Sender<StoreLink>,
    values: watch::Sender<HostValues>,
    own: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl SharedStore {
    /// Joins the cluster; must be called in the host's runtime. `known` is the state that the host has seen last.
    pub fn open(cluster: Cluster, link: Link, known: LastKnown) -> Arc<Self> {
        let session = {
            let mut log = lock(&cluster);
            log.sessions += 1;
            log.sessions
        };
        let head = known.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_else(empty);
        let now_ms = clock::unix_ms();
        let state = StoreLink {
            engine: "etcd".to_owned(),
            place: "simulated".to_owned(),
            connected: !link.get().is_cut,
            since_ms: now_ms,
            contact_ms: now_ms,
            ..StoreLink::default()
        };
        let store = Arc::new(Self {
            cluster,
            link,
            known,
            session,
            head: watch::Sender::new(head),
            state: watch::Sender::new(state),
            values: watch::Sender::default(),
            own: Mutex::default(),
        });
        store.look();
        let follower = Arc::downgrade(&store);
        tokio::spawn(async move {
            loop {
                let Some(store) = follower.upgrade() else { return };
                let delay = store.link.get().delay;
                drop(store);
                sleep(POLL + delay).await;
                let Some(store) = follower.upgrade() else { return };
                store.look();
            }
        });
        store
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.cluster)
    }

    /// Takes over what is new.
    fn look(&self) {
        let is_connected = !self.link.get().is_cut;
        self.state.send_if_modified(|state| {
            let changed = state.connected != is_connected;
            if changed {
                (state.connected, state.since_ms) = (is_connected, clock::unix_ms());
                state.problem = (!is_connected).then(|| "no member answers".to_owned());
            }
            changed
        });
        if !is_connected {
            return;
        }
        let mut log = self.log();
        log.expire();
        log.leases.insert(self.session, environment::now() + LEASE);
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (key, value) in own {
            let entry = (value, (!key.starts_with(MEMBERS)).then_some(self.session));
            if log.values.get(&key) != Some(&entry) {
                log.values.insert(key, entry);
                log.version += 1;
            }
        }
        if log.number > self.head.borrow().revision.number
            && let Some(stored) = log.stored(log.number)
        {
            *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(stored.clone());
            self.head.send_replace(stored);
        }
        let now: BTreeMap<String, Vec<u8>> =
            log.values.iter().map(|(k, (v, _))| (k.clone(), v.clone())).collect();
        self.values.send_if_modified(|values| {
            let changed = **values != now;
            if changed {
                *values = Arc::new(now);
            }
            changed
        });
    }

    /// Sends a request: it takes the link's time, and fails while the host is cut off.
    async fn send(&self) -> Result<(), StoreError> {
        sleep(self.link.get().delay).await;
        if !self.link.get().is_cut {
            return Ok(());
        }
        sleep(Duration::from_secs(1)).await;
        Err(StoreError::CutOff {
            store: "simulated".to_owned(),
            for_s: 1,
            what: "no member answers".to_owned(),
            revision: self.head.borrow().revision.number,
        })
    }

    /// Receives the answer to a write.
    async fn receive(&self) -> Result<(), StoreError> {
        sleep(self.link.get().delay).await;
        if !self.link.get().is_cut {
            return Ok(());
        }
        sleep(Duration::from_secs(1)).await;
        Err(StoreError::Unsure { store: "simulated".to_owned(), what: "no answer".to_owned() })
    }

    async fn change<T>(
        &self,
        change: impl FnOnce(&mut Log) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.send().await?;
        let done = {
            let mut log = self.log();
            log.expire();
            change(&mut log)?
        };
        self.receive().await?;
        Ok(done)
    }
}

fn lock(cluster: &Cluster) -> MutexGuard<'_, Log> {
    cluster.lock().unwrap_or_else(PoisonError::into_inner)
}

fn append(log: &mut Log, commit: Commit) -> Result<Stored, StoreError> {
    match &log.retired {
        Some(Retire::Moved(to)) => {
            return Err(StoreError::Moved { store: "simulated".to_owned(), to: to.clone() });
        }
        Some(Retire::Moving(to)) => {
            return Err(StoreError::Moving { store: "simulated".to_owned(), to: to.clone() });
        }
        _ => {}
    }
    if log.number != commit.expected {
        return Err(StoreError::Conflict { expected: commit.expected, found: log.number });
    }
    let time_ms = commit.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let Commit { author, message, summary, .. } = commit;
    let revision = Revision { number: log.number + 1, author, time_ms, message, summary };
    let record = delta::diff(&log.head, &commit.desired).expect("states have a JSON form");
    // As a host that reads the record would see it.
    let desired = Arc::new(delta::apply(&log.head, &record).expect("it was written by this version"));
    log.number += 1;
    log.records.insert(log.number, (revision.clone(), record));
    log.head = desired.clone();
    Ok(Stored { revision, desired })
}

impl Store for SharedStore {
    fn watch(&self) -> watch::Receiver<Stored> {
        self.head.subscribe()
    }
    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<Stored, StoreError>> {
        Box::pin(async move {
            let stored = match self.change(|log| append(log, commit)).await {
                Err(error @ StoreError::Conflict { .. }) => {
                    // A client that repeats the change must see the one that was first.
                    self.look();
                    return Err(error);
                }
                other => other?,
            };
            self.look();
            Ok(stored)
        })
    }
    fn get(&self, number: u64) -> BoxFuture<'_, Result<Stored, StoreError>> {
        Box::pin(async move {
            self.send().await?;
            let log = self.log();
            let oldest = log.records.first_key_value().map_or(log.number, |(n, _)| *n);
            log.stored(number).ok_or(StoreError::NoRevision { number, oldest, newest: log.number })
        })
    }
    fn history(&self, before: Option<u64>, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>> {
        Box::pin(async move {
            self.send().await?;
            let log = self.log();
            let range = log.records.range(..before.unwrap_or(u64::MAX));
            Ok(range.rev().take(limit).map(|(_, (revision, _))| revision.clone()).collect())
        })
    }
    fn history_of(
        &self,
        service: Name,
        before: Option<u64>,
        scan: usize,
    ) -> BoxFuture<'_, Result<ServiceHistory, StoreError>> {
        Box::pin(async move {
            self.send().await?;
            let log = self.log();
            let mut range = log.records.range(..before.unwrap_or(u64::MAX)).rev();
            let page: Vec<_> = range.by_ref().take(scan).collect();
            let end = page.last().filter(|_| range.next().is_some()).map(|(number, _)| **number);
            let changes = |record: &Value| record["services"].get(service.as_str()).is_some();
            let found = page.into_iter().filter(|(_, (_, record))| changes(record));
            Ok((found.map(|(_, (revision, _))| revision.clone()).collect(), end))
        })
    }
    fn link(&self) -> watch::Receiver<StoreLink> {
        self.state.subscribe()
    }
    fn about(&self) -> BoxFuture<'_, About> {
        let id = "0123456789abcdef".to_owned();
        Box::pin(async {
            About { engine: "etcd".to_owned(), place: "simulated".to_owned(), id, members: Vec::new() }
        })
    }
    fn import(&self, _: Option<String>, _: Vec<Stored>) -> BoxFuture<'_, Result<(), StoreError>> {
        let count = self.head.borrow().revision.number;
        Box::pin(async move { Err(StoreError::NotEmpty { store: "simulated".to_owned(), count }) })
    }
    fn retire(&self, how: Retire) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.change(|log| {
            if how == Retire::Back && log.retired.is_none() {
                return Err(StoreError::NotMoved { store: "simulated".to_owned() });
            }
            log.retired = (how != Retire::Back).then_some(how);
            Ok(())
        }))
    }
    fn accept(&self, _: u64) -> Result<(), StoreError> {
        Err(StoreError::NothingToAccept { why: "the data are accepted".to_owned() })
    }
    fn publish(&self, key: &str, value: Option<Vec<u8>>) {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        match value {
            Some(value) => drop(own.insert(key.to_owned(), value)),
            None => {
                own.remove(key);
                let mut log = self.log();
                log.values.remove(key);
                log.version += 1;
            }
        }
    }
    fn join(&self, _: &str, _: &str) {}
    fn keep_member(&self, name: &str, value: Vec<u8>) {
        self.publish(&format!("{MEMBERS}{name}"), Some(value));
    }
    fn forget_member(&self, name: String) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.change(move |log| {
            if log.values.contains_key(&format!("{HOSTS}{name}")) {
                return Err(StoreError::MemberLives { name });
            }
            log.values.remove(&format!("{MEMBERS}{name}")).map(drop).ok_or(StoreError::NoMember { name })
        }))
    }
    fn published(&self) -> watch::Receiver<HostValues> {
        self.values.subscribe()
    }
    fn lock(&self, claim: Claim) -> BoxFuture<'_, Result<Lock, StoreError>> {
        Box::pin(self.change(move |log| {
            let (name, now) = (claim.name.clone(), environment::now());
            let token = match (log.locks.get(&name), &claim.token) {
                (Some((held, _)), Some(token)) if held.token.as_ref() == Some(token) => token.clone(),
                (_, Some(_)) => return Err(StoreError::NotHeld { name }),
                (Some((held, until)), None) => {
                    let left_s = until.saturating_sub(now).as_secs();
                    let (holder, reason) = (held.holder.clone(), held.reason.clone());
                    return Err(StoreError::Held { name, holder, reason, left_s });
                }
                (None, None) => format!("{:016x}", now.as_nanos()),
            };
            let (left_s, since_ms) = (claim.ttl.as_secs(), clock::unix_ms());
            let (holder, reason) = (claim.holder, claim.reason);
            let lock = Lock { name: name.clone(), holder, reason, since_ms, left_s, token: Some(token) };
            log.locks.insert(name, (lock.clone(), now + claim.ttl));
            Ok(lock)
        }))
    }
    fn unlock(&self, name: String, token: Option<String>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.change(move |log| match log.locks.get(&name) {
            Some((held, _)) if token.is_none() || held.token == token => {
                log.locks.remove(&name);
                Ok(())
            }
            _ => Err(StoreError::NotHeld { name }),
        }))
    }
    fn locks(&self) -> BoxFuture<'_, Result<Vec<Lock>, StoreError>> {
        Box::pin(async move {
            self.send().await?;
            Ok(self.log().locks.values().map(|(lock, _)| Lock { token: None, ..lock.clone() }).collect())
        })
    }
}
