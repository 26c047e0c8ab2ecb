//! API of the store: status, migration and backups.
//!
//! Input: requests, and the reports of all hosts. Output: JSON of the types below.
//! Called by `routes`; the host's own report by the daemon.

use super::{
    ApiError, Control,
    access::{Author, Writer},
    members::HostMember,
    routes::{Params, Reply, body},
    types::{Change, WriteQuery},
};
use crate::{
    clock,
    desired::store::{
        About, Address, HOSTS, Opener, Retire, Revision, Store, StoreError, StoreLink, backup, backup::Backup,
    },
};
use axum::{Json, body::Bytes, extract::State};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

/// This host's identity in the fleet, and the opener of other stores.
pub struct FleetMember {
    /// Name of the host.
    pub host: String,
    /// Region of the host.
    pub region: String,
    /// Zone of the host.
    pub zone: String,
    /// Opens stores.
    pub opener: Opener,
}

/// What a host reports to the others about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Name.
    pub host: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Version of the host's lbd.
    pub version: String,
    /// Revision that is in the host's maps.
    pub revision: u64,
    /// Hash of the host's tables, in hexadecimal: equal on hosts that send new flows to the same backends.
    pub table_hash: String,
    /// Time of the report, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// VIPs that the host announces; none if it does not announce.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vips: Option<Vec<IpAddr>>,
    /// Whether the host drains.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Time from a change's commit to the host's maps.
    pub lag: Lag,
}

/// Time from a change's commit (by the committing host's clock) to a host's maps (by its own), over the
/// last changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// Number of changes measured.
    pub changes: u64,
    /// Lag of the last change, in milliseconds.
    pub last_ms: u64,
    /// Mean lag, in milliseconds.
    pub mean_ms: u64,
    /// Longest lag, in milliseconds.
    pub max_ms: u64,
}

/// Lag of all hosts of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionLag {
    /// Name.
    pub region: String,
    /// Number of hosts in the region.
    pub hosts: usize,
    /// Revisions that the slowest host has still to apply.
    pub behind: u64,
    /// Lag over all changes on all hosts of the region; `last_ms` is the slowest host's.
    pub lag: Lag,
}

/// `GET /v1/store`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreInfo {
    /// Engine, place, id and members.
    pub about: About,
    /// This host's connection to the store.
    pub link: StoreLink,
    /// Newest revision that this host knows.
    pub revision: Revision,
    /// Regions, by name.
    pub regions: Vec<RegionLag>,
    /// Hosts, by region and name.
    pub hosts: Vec<HostReport>,
    /// Hosts that are known, but do not report now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<HostMember>,
    /// Services in this host's maps although the store is empty: lbd keeps forwarding for them until `accept` or a
    /// first change.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub orphaned_services: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// Body of `POST /v1/store/accept`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accept {
    /// Revision of the store that the author has seen; the request fails if the store is at another one.
    pub revision: u64,
}

/// Body of `POST /v1/store/migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Address of the store to fill.
    pub to: String,
}

/// Result of a migration, or of a restore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Filled {
    /// Store that holds the data now.
    pub store: String,
    /// Revisions written.
    pub revisions: usize,
    /// Newest revision.
    pub revision: u64,
    /// What changed on this host; none for a migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Box<Change>>,
}

/// Sums up the hosts' lag by region; `newest` is the newest revision.
fn lag_by_region(hosts: &[HostReport], newest: u64) -> Vec<RegionLag> {
    let mut regions: BTreeMap<&str, (RegionLag, u64)> = BTreeMap::new();
    for host in hosts {
        let (region, total) = regions.entry(&host.region).or_default();
        region.region.clone_from(&host.region);
        region.hosts += 1;
        region.behind = region.behind.max(newest.saturating_sub(host.revision));
        *total += host.lag.mean_ms * host.lag.changes;
        let lag = &mut region.lag;
        lag.changes += host.lag.changes;
        lag.last_ms = lag.last_ms.max(host.lag.last_ms);
        lag.max_ms = lag.max_ms.max(host.lag.max_ms);
    }
    let finished = regions.into_values().map(|(mut region, total)| {
        region.lag.mean_ms = total.checked_div(region.lag.changes).unwrap_or(0);
        region
    });
    finished.collect()
}

impl Control {
    /// `GET /v1/store`.
    pub async fn store_info(&self) -> StoreInfo {
        let about = self.store.about().await;
        let values = self.store.published().borrow().clone();
        let reports = values.iter().filter(|(key, _)| key.starts_with(HOSTS));
        let mut hosts: Vec<HostReport> =
            reports.filter_map(|(_, value)| serde_json::from_slice(value).ok()).collect();
        hosts.sort_by(|a, b| (&a.region, &a.host).cmp(&(&b.region, &b.host)));
        let revision = self.store.head().revision;
        let regions = lag_by_region(&hosts, revision.number);
        let orphaned_services = self.orphaned();
        StoreInfo {
            about,
            link: self.store.link().borrow().clone(),
            revision,
            regions,
            hosts,
            gone: self.hosts().into_iter().filter(|h| !h.is_live).collect(),
            orphaned_services,
        }
    }

    /// Publishes this host's report to the other hosts.
    pub fn publish_report(&self, report: HostReport) {
        let value = serde_json::to_vec(&report).expect("texts and numbers have a JSON form");
        self.store.publish(&format!("{HOSTS}{}", report.host), Some(value));
        self.report.send_replace(report);
    }

    /// Copies all revisions to another, empty store; then this store no longer accepts changes.
    ///
    /// An interruption at any point leaves this store in use: the other store is filled in one step, and this one is
    /// retired last. After an interruption between the two, another attempt finds the copy and continues from there.
    ///
    /// # Errors
    /// The address is not valid, or the other store is not empty or cannot be written; then nothing has changed.
    pub async fn migrate(&self, author: &Author, to: &str) -> Result<Filled, ApiError> {
        let address: Address = to.parse()?;
        let to = address.to_string();
        let opener = &self
            .fleet_member
            .get()
            .ok_or_else(|| ApiError::bad_request("this lbd cannot open other stores, so it cannot migrate"))?
            .opener;
        let _guard = self.commit_lock.write().await;
        let other = opener.open_other(&address).await?;
        self.store.retire(Retire::Moving(to.clone())).await?;
        let result = match self.copy_to(&*other, &to).await {
            Ok(revisions) => {
                self.store.retire(Retire::Moved(to.clone())).await.map(|()| revisions).map_err(ApiError::from)
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(revisions) => {
                let (revision, author) = (other.head().revision.number, &author.name);
                tracing::warn!(author, to, revisions, "migrated: this store no longer accepts changes");
                Ok(Filled { store: to, revisions, revision, change: None })
            }
            Err(error) => {
                if let Err(also) = self.store.retire(Retire::Back).await {
                    tracing::error!(error = %also, "the migration failed, and the store still refuses changes: use `lbctl store unretire --yes`");
                }
                Err(error)
            }
        }
    }

    /// Copies all revisions, unless an earlier attempt has done so; returns their number.
    async fn copy_to(&self, other: &dyn Store, to: &str) -> Result<usize, ApiError> {
        let id = self.store.about().await.id;
        let all = backup::revisions(&*self.store).await?;
        let count = all.len();
        if count > 0 && other.head() == self.store.head() && other.about().await.id == id {
            // If this is the same store under another address, it is already marked as moving. A store that was
            // itself migrated here may be used again.
            match other.retire(Retire::Moving(to.to_owned())).await {
                Ok(()) | Err(StoreError::Moved { .. }) => other.retire(Retire::Back).await?,
                Err(StoreError::Moving { .. }) => {
                    return Err(ApiError::bad_request(format!("{to} is the store that is already in use")));
                }
                Err(error) => return Err(error.into()),
            }
            tracing::info!(to, "an interrupted migration has already copied the revisions");
            return Ok(count);
        }
        match other.import(Some(id), all).await {
            Ok(()) => Ok(count),
            Err(error @ StoreError::NotEmpty { .. }) => Err(ApiError::from(error).fix(
                "if the data are unused, remove them (the directory, or the keys under the prefix) and migrate again",
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets a store that was migrated elsewhere accept changes again.
    ///
    /// # Errors
    /// The store was not migrated, a migration is in progress, or writing failed.
    pub async fn unretire(&self, author: &Author) -> Result<(), ApiError> {
        let Ok(_guard) = self.commit_lock.try_write() else {
            return Err(
                ApiError::busy("a change or a migration is in progress").fix("wait until it ends, and retry")
            );
        };
        self.store.retire(Retire::Back).await?;
        tracing::warn!(author = author.name, "this store accepts changes again");
        Ok(())
    }

    /// Accepts the store's state at the revision that the author has seen: an empty store while the maps hold
    /// services, or a store that was set back.
    ///
    /// # Errors
    /// There is nothing to accept, the store is at another revision, or applying the state failed.
    pub async fn accept(&self, author: &Author, revision: u64) -> Result<(), ApiError> {
        if self.accept_empty(revision)? {
            tracing::warn!(
                author = author.name,
                "the empty store was accepted: removing the services in the maps"
            );
            return self.wait_applied(0).await.map(drop);
        }
        self.store.accept(revision)?;
        tracing::warn!(author = author.name, revision, "the state in the store was accepted");
        let mut link = self.store.link();
        // The answer contains the link's state, whether or not it connects in time.
        let _ = tokio::time::timeout(Duration::from_secs(5), link.wait_for(|link| link.connected)).await;
        Ok(())
    }

    /// Fills an empty store with a backup; otherwise makes the backup's newest state the newest revision.
    ///
    /// # Errors
    /// The backup is not valid, or as [`Control::write`].
    pub async fn restore(
        &self,
        author: &Author,
        query: &WriteQuery,
        from: &Backup,
    ) -> Result<Filled, ApiError> {
        let all = from.stored("the backup")?;
        let Some(last) = all.last().cloned() else {
            return Err(ApiError::bad_request("the backup contains no revisions"));
        };
        let (revisions, store) = (all.len(), self.store.link().borrow().place.clone());
        if self.store.head().revision.number == 0 && !query.dry_run {
            let _guard = self.commit_lock.write().await;
            self.engine.check(last.desired.clone()).await?;
            self.store.import(None, all).await?;
            tracing::warn!(author = author.name, revisions, "an empty store was filled from a backup");
            let revision = last.revision.number;
            self.wait_applied(revision).await?;
            return Ok(Filled { store, revisions, revision, change: None });
        }
        let message = format!("restore of revision {} of store {}", last.revision.number, from.store);
        let query = WriteQuery { message: Some(query.message.clone().unwrap_or(message)), ..query.clone() };
        let change = self.bring_back(author, &query, &last.desired).await?;
        Ok(Filled { store, revisions: 1, revision: change.revision, change: Some(Box::new(change)) })
    }
}

pub(super) async fn status(State(control): State<Arc<Control>>) -> Reply<StoreInfo> {
    Ok(Json(control.store_info().await))
}

pub(super) async fn migrate(
    State(control): State<Arc<Control>>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<Filled> {
    let Migrate { to } = body(&bytes)?;
    Ok(Json(control.migrate(&author, &to).await?))
}

pub(super) async fn backup(State(control): State<Arc<Control>>) -> Reply<Backup> {
    Ok(Json(Backup::of(&*control.store, clock::unix_ms()).await?))
}

pub(super) async fn restore(
    State(control): State<Arc<Control>>,
    Params(query): Params<WriteQuery>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<Filled> {
    let from: Backup = body(&bytes)?;
    Ok(Json(control.restore(&author, &query, &from).await?))
}

pub(super) async fn accept(
    State(control): State<Arc<Control>>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<StoreInfo> {
    let Accept { revision } = body(&bytes)?;
    control.accept(&author, revision).await?;
    Ok(Json(control.store_info().await))
}

pub(super) async fn unretire(
    State(control): State<Arc<Control>>,
    Writer(author): Writer,
) -> Reply<StoreInfo> {
    control.unretire(&author).await?;
    Ok(Json(control.store_info().await))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regions_lag_is_that_of_all_its_hosts() {
        let host = |region: &str, revision, changes, mean_ms, max_ms| HostReport {
            region: region.to_owned(),
            revision,
            lag: Lag { changes, last_ms: mean_ms, mean_ms, max_ms },
            ..HostReport::default()
        };
        let hosts = [host("eu", 9, 10, 20, 50), host("eu", 7, 30, 40, 90), host("us", 9, 0, 0, 0)];
        let found = lag_by_region(&hosts, 9);
        assert_eq!(found.len(), 2);
        let lag = Lag { changes: 40, last_ms: 40, mean_ms: 35, max_ms: 90 };
        assert_eq!(found[0], RegionLag { region: "eu".into(), hosts: 2, behind: 2, lag });
        assert_eq!((found[1].behind, found[1].lag.mean_ms), (0, 0));
    }
}
