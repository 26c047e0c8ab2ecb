//! What other hosts publish about their VIPs, and what this host publishes: the values `announce/HOST` of the store.
//!
//! Input: the store's published values and its connection. Output: [`Handover`]s by host. A host that is cut off from the
//! store knows no other host, and therefore withdraws nothing in favour of one.

use crate::{
    desired::store::{HostValues, Store, StoreLink},
    plan::policy::announce::Handover,
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// Prefix of the keys.
const KEY: &str = "announce/";

/// The other hosts that share this host's store.
pub struct Peers {
    host: String,
    store: Arc<dyn Store>,
    values: watch::Receiver<HostValues>,
    link: watch::Receiver<StoreLink>,
    known: BTreeMap<String, Handover>,
    told: Handover,
}

impl Peers {
    /// Starts to follow the other hosts.
    pub fn new(host: String, store: Arc<dyn Store>) -> Self {
        let (values, link) = (store.published(), store.link());
        let (known, told) = (BTreeMap::new(), Handover::default());
        let mut peers = Self { host, store, values, link, known, told };
        peers.refresh();
        peers
    }

    /// Name of this host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// What the others publish.
    pub fn known(&self) -> &BTreeMap<String, Handover> {
        &self.known
    }

    /// Reads the newest values; true if they differ from the known ones.
    fn refresh(&mut self) -> bool {
        let is_connected = self.link.borrow_and_update().connected;
        let values = self.values.borrow_and_update().clone();
        let of_others = values.iter().filter(|_| is_connected).filter_map(|(key, value)| {
            let host = key.strip_prefix(KEY).filter(|host| *host != self.host)?;
            Some((host.to_owned(), serde_json::from_slice(value).ok()?))
        });
        let known: BTreeMap<String, Handover> = of_others.collect();
        let is_new = known != self.known;
        self.known = known;
        is_new
    }

    /// Waits until what the others publish has changed.
    pub async fn changed(&mut self) {
        loop {
            let is_open = tokio::select! {
                changed = self.values.changed() => changed.is_ok(),
                changed = self.link.changed() => changed.is_ok(),
            };
            if !is_open {
                std::future::pending::<()>().await;
            }
            if self.refresh() {
                return;
            }
        }
    }

    /// Publishes this host's own state, if it has changed.
    pub fn publish(&mut self, handover: Handover) {
        if handover != self.told {
            let value = serde_json::to_vec(&handover).expect("addresses, texts and numbers have a JSON form");
            self.store.publish(&format!("{KEY}{}", self.host), Some(value));
            self.told = handover;
        }
    }
}
