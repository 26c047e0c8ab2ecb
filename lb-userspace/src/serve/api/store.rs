//! The store through the API: how it is, where it goes, its backups, and its locks.
//!
//! Input: requests, and what all hosts tell about themselves. Output: JSON of the types below.
//! Called by `routes`; the host's own report by the daemon.

use super::{
    ApiError, Control,
    access::{Author, Writer},
    routes::{Params, Reply, body, name},
    types::{Change, WriteQuery},
};
use crate::{
    clock,
    desired::{
        model::Name,
        store::{
            About, Address, Claim, Link, Lock, Opener, Retire, Revision, Store, StoreError, backup,
            backup::Backup,
        },
    },
};
use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

/// Keys of the hosts' reports begin with this.
const HOSTS: &str = "hosts/";
/// Shortest and longest time that a lock may be asked for.
const LOCK_TTL_S: (u64, u64) = (5, 86_400);

/// This host among the others, and how to get at other stores.
pub struct FleetMember {
    /// Name.
    pub host: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Opens stores.
    pub opener: Opener,
}

/// What a host tells the others about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Name.
    pub host: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Version of its lbd.
    pub version: String,
    /// Revision that its maps show.
    pub revision: u64,
    /// Hash of its tables, hexadecimal: hosts that send new flows to the same backends have the same.
    pub table_hash: String,
    /// When this was so, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// VIPs that it announces; none if it never does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vips: Option<Vec<IpAddr>>,
    /// It is being taken out of service.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// From a change's commit to its maps.
    pub lag: Lag,
}

/// Time from a change's commit (by the committing host's clock) to a host's maps (by its own), over the
/// last changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// Changes counted.
    pub changes: u64,
    /// Of the last, in milliseconds.
    pub last_ms: u64,
    /// Mean, in milliseconds.
    pub mean_ms: u64,
    /// Longest, in milliseconds.
    pub max_ms: u64,
}

/// All hosts of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionLag {
    /// Name.
    pub region: String,
    /// How many hosts it has.
    pub hosts: usize,
    /// Revisions that the last of them has still to apply.
    pub behind: u64,
    /// Of all changes on all its hosts; `last_ms` is that of the slowest host.
    pub lag: Lag,
}

/// `GET /v1/store`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreInfo {
    /// Engine, place, id and members.
    pub about: About,
    /// Whether this host is connected to it.
    pub link: Link,
    /// Newest revision that this host knows.
    pub revision: Revision,
    /// Regions, by name.
    pub regions: Vec<RegionLag>,
    /// Hosts, by region and name.
    pub hosts: Vec<HostReport>,
    /// Services that this host's maps have served since before lbd started, and of which the store, which is empty,
    /// says nothing: they are forwarded as before until `accept` or a first change.
    #[serde(default, skip_serializing_if = "is_none")]
    pub orphaned_services: usize,
}

fn is_none(count: &usize) -> bool {
    *count == 0
}

/// Body of `POST /v1/store/accept`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accept {
    /// Revision that the store was shown to hold. Another by now is not accepted.
    pub revision: u64,
}

/// Body of `POST /v1/store/migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Address of the store to fill.
    pub to: String,
}

/// What became of a migration, or of a restoration into an empty store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Filled {
    /// Where the data are now.
    pub store: String,
    /// Revisions written.
    pub revisions: usize,
    /// The newest.
    pub revision: u64,
    /// What changed here; nothing by a migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Box<Change>>,
}

/// Body of `POST /v1/locks/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockRequest {
    /// What for.
    pub reason: String,
    /// So many seconds without renewal, and it is free again.
    pub ttl_s: u64,
    /// Of a renewal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// Query of `DELETE /v1/locks/NAME`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unlock {
    /// Of the holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Whoever holds it.
    #[serde(default)]
    pub force: bool,
}

/// Regions of these hosts, by name, when `newest` is the newest revision.
fn regions(hosts: &[HostReport], newest: u64) -> Vec<RegionLag> {
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
    /// How the store is.
    pub async fn store_info(&self) -> StoreInfo {
        let about = self.store.about().await;
        let told = self.store.published().borrow().clone();
        let reports = told.iter().filter(|(key, _)| key.starts_with(HOSTS));
        let mut hosts: Vec<HostReport> =
            reports.filter_map(|(_, value)| serde_json::from_slice(value).ok()).collect();
        hosts.sort_by(|a, b| (&a.region, &a.host).cmp(&(&b.region, &b.host)));
        let revision = self.store.head().revision;
        let regions = regions(&hosts, revision.number);
        let orphaned_services = self.orphaned();
        StoreInfo {
            about,
            link: self.store.link().borrow().clone(),
            revision,
            regions,
            hosts,
            orphaned_services,
        }
    }

    /// Tells the others about this host.
    pub fn tell(&self, report: HostReport) {
        let value = serde_json::to_vec(&report).expect("texts and numbers have a JSON form");
        self.store.publish(&format!("{HOSTS}{}", report.host), Some(value));
        self.report.send_replace(report);
    }

    /// Copies all revisions to another store, which is empty; then this one takes no more changes.
    ///
    /// Cut short anywhere, it leaves this store in use: the other one is filled in one step, and this one is retired
    /// last. If it was cut short between the two, another attempt finds the copy, and goes on from there.
    ///
    /// # Errors
    /// The address is not valid, the other store is not empty, or cannot be written; then all is as it was.
    pub async fn migrate(&self, author: &Author, to: &str) -> Result<Filled, ApiError> {
        let address: Address = to.parse()?;
        let to = address.to_string();
        let opener =
            &self.sharing.get().ok_or_else(|| ApiError::bad_request("this lbd cannot migrate"))?.opener;
        let _still = self.changing.write().await;
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
                tracing::warn!(author, to, revisions, "migrated: this store takes no more changes");
                Ok(Filled { store: to, revisions, revision, change: None })
            }
            Err(error) => {
                if let Err(also) = self.store.retire(Retire::Back).await {
                    tracing::error!(error = %also, "the store does not take changes yet after a migration that failed");
                }
                Err(error)
            }
        }
    }

    /// Copies all revisions, unless an earlier attempt has done so; how many there are.
    async fn copy_to(&self, other: &dyn Store, to: &str) -> Result<usize, ApiError> {
        let id = self.store.about().await.id;
        let all = backup::revisions(&*self.store).await?;
        let count = all.len();
        if count > 0 && other.head() == self.store.head() && other.about().await.id == id {
            // It may be this very store under another address, whose mark then says so; or it was itself migrated here.
            match other.retire(Retire::Moving(to.to_owned())).await {
                Ok(()) | Err(StoreError::Moved { .. }) => other.retire(Retire::Back).await?,
                Err(StoreError::Moving { .. }) => {
                    return Err(ApiError::bad_request(format!("{to} is the store that is in use already")));
                }
                Err(error) => return Err(error.into()),
            }
            tracing::info!(to, "the revisions are there already, from a migration that was cut short");
            return Ok(count);
        }
        match other.import(Some(id), all).await {
            Ok(()) => Ok(count),
            Err(error @ StoreError::NotEmpty { .. }) => Err(ApiError::from(error).fix(
                "if nobody uses them, remove them (the directory, or the keys under the prefix), and migrate again",
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes changes again in a store that was migrated elsewhere.
    ///
    /// # Errors
    /// It was not, a migration is going on, or writing failed.
    pub async fn unretire(&self, author: &Author) -> Result<(), ApiError> {
        let Ok(_still) = self.changing.try_write() else {
            return Err(
                ApiError::busy("a change or a migration is going on").fix("wait for its end, and try again")
            );
        };
        self.store.retire(Retire::Back).await?;
        tracing::warn!(author = author.name, "this store takes changes again");
        Ok(())
    }

    /// Takes what the store holds, at the revision that the author was shown: an empty store over maps that serve, or
    /// one that was set back.
    ///
    /// # Errors
    /// There is nothing to accept, or it is at another revision by now; or applying it failed.
    pub async fn accept(&self, author: &Author, revision: u64) -> Result<(), ApiError> {
        if self.adopt_empty(revision)? {
            tracing::warn!(author = author.name, "the empty store is accepted: the services in the maps go");
            return self.applied(0).await.map(drop);
        }
        self.store.accept(revision)?;
        tracing::warn!(author = author.name, revision, "what the store holds is accepted, older or not");
        let mut link = self.store.link();
        // What comes of it is in the answer, either way.
        let _ = tokio::time::timeout(Duration::from_secs(5), link.wait_for(|link| link.connected)).await;
        Ok(())
    }

    /// Fills an empty store with a backup; otherwise makes its newest state the newest revision.
    ///
    /// # Errors
    /// It is not sound, or as [`Control::write`].
    pub async fn restore(
        &self,
        author: &Author,
        query: &WriteQuery,
        from: &Backup,
    ) -> Result<Filled, ApiError> {
        let all = from.stored("the backup")?;
        let Some(last) = all.last().cloned() else {
            return Err(ApiError::bad_request("the backup has no revision"));
        };
        let (revisions, store) = (all.len(), self.store.link().borrow().place.clone());
        if self.store.head().revision.number == 0 && !query.dry_run {
            let _still = self.changing.write().await;
            self.engine.check(last.desired.clone()).await?;
            self.store.import(None, all).await?;
            tracing::warn!(author = author.name, revisions, "an empty store was filled from a backup");
            let revision = last.revision.number;
            self.applied(revision).await?;
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

pub(super) async fn locks(State(control): State<Arc<Control>>) -> Reply<Vec<Lock>> {
    Ok(Json(control.store.locks().await?))
}

pub(super) async fn lock(
    State(control): State<Arc<Control>>,
    Path(path): Path<String>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<Lock> {
    let (name, request): (Name, LockRequest) = (name(&path)?, body(&bytes)?);
    if !(LOCK_TTL_S.0..=LOCK_TTL_S.1).contains(&request.ttl_s) {
        let (least, most) = LOCK_TTL_S;
        return Err(ApiError::bad_request(format!(
            "ttl_s: {least} to {most} seconds, not {}",
            request.ttl_s
        )));
    }
    let holder = control.holder(&author);
    let ttl = Duration::from_secs(request.ttl_s);
    let is_new = request.token.is_none();
    let claim = Claim { name: name.to_string(), holder, reason: request.reason, ttl, token: request.token };
    let lock = control.store.lock(claim).await?;
    // Looked at with the lock in hand: who drains a region holds it while he says so.
    if is_new
        && name.as_str() == super::regions::LOCK
        && let Err(refused) = control.refuse_while_going_on().await
    {
        control.store.unlock(name.to_string(), lock.token).await?;
        return Err(refused);
    }
    Ok(Json(lock))
}

pub(super) async fn unlock(
    State(control): State<Arc<Control>>,
    Path(path): Path<String>,
    Params(query): Params<Unlock>,
    Writer(author): Writer,
) -> Reply<Vec<Lock>> {
    let name: Name = name(&path)?;
    if query.token.is_none() && !query.force {
        return Err(ApiError::bad_request("whose lock is it? give its token, or force"));
    }
    if query.force {
        tracing::warn!(author = author.name, %name, "a lock is released by force");
    }
    control.store.unlock(name.to_string(), query.token.filter(|_| !query.force)).await?;
    Ok(Json(control.store.locks().await?))
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
        let found = regions(&hosts, 9);
        assert_eq!(found.len(), 2);
        let lag = Lag { changes: 40, last_ms: 40, mean_ms: 35, max_ms: 90 };
        assert_eq!(found[0], RegionLag { region: "eu".into(), hosts: 2, behind: 2, lag });
        assert_eq!((found[1].behind, found[1].lag.mean_ms), (0, 0));
    }
}
