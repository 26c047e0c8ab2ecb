//! API of regions and policy, and the lock that drains and roll-outs hold.
//!
//! Input: requests, and the decisions of `observed::regions`. Output: JSON of its types. Called by `routes`. Draining
//! a region and rolling out a version take the lock `rollout`, and refuse it to others until they are over: two
//! regions are never drained at the same time.
//!
//! Drains and roll-outs are desired state: a commit is compare-and-set, and a state with two draining regions is
//! invalid.

use super::{
    ApiError, Control,
    access::{Author, Caller},
    control::SharedControl,
    engine::Snapshot,
    find::find_service,
    locks::HeldLock,
    routes::{Params, Reply, name},
    types::{Change, WriteQuery},
    view::backend_id,
};
use crate::{
    desired::{
        model::{
            BackendId, Desired, Difference, Name, Region, RegionState, RolloutState, Service, nearest,
            region_list,
        },
        store::{Claim, Lock, StoreError},
    },
    observed::regions::{CommitDesired, Explained, RegionShown, RegionSnapshot},
    plan::policy::audit::{BackendUse, Residency, audit},
};
use axum::{
    Json,
    extract::{Path, State},
};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// The lock that lets one roll-out at a time touch the regions.
pub(super) const LOCK: &str = "rollout";
/// Longest time that the lock is held for one write.
const LOCK_TTL: Duration = Duration::from_secs(60);
/// How long a reader waits for the decision on the newest revision.
const DECISION_TIMEOUT: Duration = Duration::from_secs(2);

/// `GET /v1/regions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regions {
    /// Region of the answering host.
    pub here: Name,
    /// Regions by name.
    pub regions: Vec<RegionShown>,
}

/// An operation that holds the lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    /// What is in progress.
    what: String,
    /// Command that ends it.
    ends_by: String,
    since_ms: u64,
}

impl Operation {
    /// The operation as holder of the lock.
    pub(super) fn as_lock(&self) -> HeldLock {
        let Self { what, ends_by, since_ms } = self;
        let lock = Lock {
            name: LOCK.to_owned(),
            holder: what.clone(),
            reason: format!("until {ends_by}"),
            since_ms: *since_ms,
            left_s: 0,
            token: None,
        };
        HeldLock { lock, is_operation: true }
    }
}

/// The operation in progress that holds the lock.
pub(super) fn operation_in_progress(desired: &Desired) -> Option<Operation> {
    let draining = desired.regions.iter().find(|(_, r)| r.state == RegionState::Draining);
    if let Some((region, _)) = draining {
        return Some(Operation {
            what: format!("drain of region {region}"),
            ends_by: format!("`lbctl region undrain {region}`"),
            since_ms: 0,
        });
    }
    let running = |s: &Service| s.rollout.clone().filter(|r| r.state == RolloutState::Running);
    let (name, rollout) = desired.services.iter().find_map(|(name, s)| Some((name, running(s)?)))?;
    Some(Operation {
        what: format!("roll-out of {} on service {name}", rollout.title()),
        ends_by: "`lbctl rollout promote` or `lbctl rollout abort`".to_owned(),
        since_ms: rollout.since_ms,
    })
}

impl Control {
    /// Sets the watch of the decisions about regions. The daemon calls it once.
    pub fn set_region_decisions(&self, decisions: watch::Receiver<Arc<RegionSnapshot>>) {
        let _ = self.region_decisions.set(decisions);
    }

    /// The latest decisions about regions; empty without a region controller.
    pub fn region_snapshot(&self) -> Arc<RegionSnapshot> {
        self.region_decisions.get().map(|watch| watch.borrow().clone()).unwrap_or_default()
    }

    /// Waits for the decisions on the newest known state; after [`DECISION_TIMEOUT`], returns the previous ones.
    pub(super) async fn wait_region_snapshot(&self) -> Arc<RegionSnapshot> {
        if let Some(mut watch) = self.region_decisions.get().cloned() {
            let newest = self.head().revision.number;
            let _ =
                tokio::time::timeout(DECISION_TIMEOUT, watch.wait_for(|decided| decided.revision >= newest))
                    .await;
        }
        self.region_snapshot()
    }

    /// The residency of every service, with its violations.
    pub fn residency(&self) -> Vec<Residency> {
        let (head, snapshot) = (self.head(), self.engine.snapshot());
        audit_residency(&head.desired, &snapshot)
    }

    /// Refuses the lock while a drain or roll-out holds it. Reads the newest state from the store, since this host
    /// may not have received it yet.
    pub(super) async fn refuse_during_operation(&self) -> Result<(), ApiError> {
        let head = self.newest_desired().await?;
        match operation_in_progress(&head) {
            Some(operation) => Err(operation_error(&operation)),
            None => Ok(()),
        }
    }

    pub(super) async fn newest_desired(&self) -> Result<Arc<Desired>, ApiError> {
        let mut head = self.head();
        loop {
            match self.store.get(head.revision.number + 1).await {
                Ok(newer) => head = newer,
                Err(StoreError::NoRevision { .. }) => return Ok(head.desired),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Name of an author as holder of a lock, shown to others.
    pub(super) fn lock_holder(&self, author: &Author) -> String {
        match self.fleet_member.get() {
            Some(member) => format!("{} on {}", author.name, member.host),
            None => author.name.clone(),
        }
    }

    /// Changes the desired state while holding the lock: the caller's lock, if the caller holds it.
    pub(super) async fn write_locked(
        &self,
        author: &Author,
        query: &WriteQuery,
        reason: &str,
        change: impl FnMut(&mut Desired) -> Result<(), ApiError>,
    ) -> Result<Change, ApiError> {
        if query.dry_run {
            return self.write(author, query, change).await;
        }
        let (holder, held) = (self.lock_holder(author), author.lock_token.clone());
        let is_held = held.is_some();
        let claim =
            Claim { name: LOCK.to_owned(), holder, reason: reason.to_owned(), ttl: LOCK_TTL, token: held };
        // With a token this verifies that the caller holds the lock, and the caller keeps it.
        let Lock { token, .. } = self.store.lock(claim).await?;
        if is_held {
            return self.write(author, query, change).await;
        }
        let result = self.write(author, query, change).await;
        if let Err(error) = self.store.unlock(LOCK.to_owned(), token).await {
            tracing::warn!(%error, "cannot release lock {LOCK}; it expires by itself");
        }
        result
    }

    fn add_plain_backends(&self, regions: &mut [RegionShown], here: &Name) {
        add_plain_backends(regions, here, &self.head().desired, &self.engine.snapshot());
    }

    /// Declares all regions in use, if none is declared yet: afterwards, undeclared regions are errors.
    pub(super) fn declare_regions(&self, desired: &mut Desired) {
        if !desired.regions.is_empty() {
            return;
        }
        let rules = desired.services.values().filter_map(|s| s.regions.as_ref());
        let named = rules.flat_map(|r| r.allowed.iter().flatten().chain(r.weights.keys()));
        let backends = desired.services.values().flat_map(|s| s.backends.values());
        let used = named.chain(backends.filter_map(|b| b.region.as_ref()));
        let mut all: Vec<Name> = used.cloned().collect();
        all.extend(self.region_snapshot().regions.iter().map(|r| r.name.clone()));
        all.extend(self.hosts().iter().filter_map(|host| host.record.region.parse().ok()));
        desired.regions = all.into_iter().map(|name| (name, Region::default())).collect();
    }
}

/// Notes which regions were declared besides the one that was asked for.
pub(super) fn note_declared(mut change: Change, asked: &Name) -> Change {
    let declared = |d: &Difference| match d {
        Difference::Region { region, from: serde_json::Value::Null, .. } => Some(region.clone()),
        _ => None,
    };
    let all: Vec<Name> = change.differences.iter().filter_map(declared).collect();
    let others = || all.iter().filter(|name| *name != asked);
    if others().next().is_some() {
        change.notes.push(format!(
            "no region was declared before, so those in use are declared with it: {}; from now on, others are refused",
            region_list(others())
        ));
    }
    change
}

/// Audits residency: compares the desired state with what is in the maps.
fn audit_residency(desired: &Desired, snapshot: &Snapshot) -> Vec<Residency> {
    let seen = |id: &BackendId| {
        let applied = snapshot.backends.get(id);
        BackendUse {
            ready: applied.is_some_and(|b| b.takes_flows),
            flows: applied.map_or(0, |b| b.tracked_flows),
        }
    };
    audit(desired, seen, |name| snapshot.services.get(name).map_or_else(Vec::new, |s| s.regions.clone()))
}

pub(super) fn operation_error(operation: &Operation) -> ApiError {
    let Operation { what, ends_by, .. } = operation;
    let text = format!("not possible now: the {what} holds the lock {LOCK}");
    ApiError { code: "held", ..ApiError::exists(text) }.fix(format!("{ends_by} ends it"))
}

pub(super) fn unknown_region(region: &Name, desired: &Desired) -> ApiError {
    let error = ApiError::not_found(format!("there is no region {region}"));
    match nearest(region.as_str(), desired.regions.keys().map(Name::as_str)) {
        Some(near) => error.fix(format!("did you mean {near}?")),
        None => error.fix(format!("known: {}", region_list(desired.regions.keys()))),
    }
}

pub(super) async fn policies(State(control): SharedControl) -> Reply<Vec<Explained>> {
    Ok(Json(control.wait_region_snapshot().await.services.values().cloned().collect()))
}

pub(super) async fn policy(State(control): SharedControl, Path(service): Path<String>) -> Reply<Explained> {
    let service = name(&service)?;
    let head = control.head();
    let wanted = find_service(&head, &service)?;
    let is_decided = wanted.is_regional() || wanted.rollout.is_some();
    let decided = if is_decided { control.wait_region_snapshot().await } else { control.region_snapshot() };
    let found = decided.services.get(&service).cloned();
    let plain = || {
        ApiError::not_found(format!(
            "service {service} has neither regions nor a roll-out: no policy distinguishes its backends"
        ))
        .fix(format!("`lbctl backend set {service} NAME --region REGION` sets a backend's region"))
    };
    Ok(Json(found.ok_or_else(plain)?))
}

pub(super) async fn residency(State(control): SharedControl) -> Reply<Vec<Residency>> {
    Ok(Json(control.residency()))
}

pub(super) async fn regions(State(control): SharedControl) -> Reply<Regions> {
    let decided = control.wait_region_snapshot().await;
    let here = decided.regions.iter().find(|r| r.is_local).map(|r| r.name.clone());
    let here = here.ok_or_else(|| ApiError::not_found("this lbd does not know any regions yet"))?;
    let mut regions = decided.regions.clone();
    control.add_plain_backends(&mut regions, &here);
    Ok(Json(Regions { here, regions }))
}

/// Adds the backends of services whose backends no policy distinguishes: the controller counts those of the others.
fn add_plain_backends(regions: &mut [RegionShown], here: &Name, desired: &Desired, snapshot: &Snapshot) {
    let plain = desired.services.iter().filter(|(_, s)| !s.is_regional() && s.rollout.is_none());
    for (service, name, backend) in
        plain.flat_map(|(service, s)| s.backends.iter().map(move |(n, b)| (service, n, b)))
    {
        let region = backend.region.as_ref().unwrap_or(here);
        if let Some(region) = regions.iter_mut().find(|r| r.name == *region) {
            region.backends += 1;
            let applied = snapshot.backends.get(&backend_id(service, name));
            region.ready += usize::from(applied.is_some_and(|b| b.takes_flows));
        }
    }
}

pub(super) async fn region_add(
    State(control): SharedControl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
) -> Reply<Change> {
    let region = name(&region)?;
    let change = |desired: &mut Desired| {
        control.declare_regions(desired);
        desired.regions.entry(region.clone()).or_default();
        Ok(())
    };
    let done = control.write(&author, &query, change).await?;
    Ok(Json(note_declared(done, &region)))
}

/// What names a region: a backend, a rule, or a roll-out.
fn region_user(desired: &Desired, region: &Name) -> Option<String> {
    desired.services.iter().find_map(|(name, s)| {
        let backend = s.backends.iter().find(|(_, b)| b.region.as_ref() == Some(region));
        let by_rules = s.regions.as_ref().is_some_and(|rules| {
            rules.weights.contains_key(region) || rules.allowed.iter().flatten().any(|name| name == region)
        });
        let by_rollout = s.rollout.as_ref().is_some_and(|r| r.regions.contains(region));
        match backend {
            Some((backend, _)) => Some(format!("backend {name}/{backend}")),
            None if by_rules => Some(format!("the region rules of service {name}")),
            None if by_rollout => Some(format!("the roll-out on service {name}")),
            None => None,
        }
    })
}

pub(super) async fn region_remove(
    State(control): SharedControl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
) -> Reply<Change> {
    let region = name(&region)?;
    let change = |desired: &mut Desired| {
        if !desired.regions.contains_key(&region) {
            return Err(unknown_region(&region, desired));
        }
        // Without the last declaration, names are not checked.
        if desired.regions.len() > 1
            && let Some(user) = region_user(desired, &region)
        {
            return Err(ApiError::exists(format!("region {region} is in use by {user}"))
                .fix(format!("remove it, or give it another region, before `lbctl region rm {region}`")));
        }
        desired.regions.remove(&region);
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

impl CommitDesired for Control {
    fn commit_as_daemon(
        self: Arc<Self>,
        message: String,
        mut change: Box<dyn FnMut(&mut Desired) + Send>,
    ) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async move {
            let query = WriteQuery { message: Some(message), ..WriteQuery::default() };
            let write = |desired: &mut Desired| {
                change(desired);
                Ok(())
            };
            self.write(&Author::daemon(), &query, write).await.map(drop).map_err(|e| e.to_string())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::api::engine::AppliedBackend;
    use serde_json::json;

    #[test]
    fn backends_of_services_without_a_policy_count_too() {
        let shown = |name: &str| -> RegionShown {
            serde_json::from_value(json!({
                "name": name, "is_local": name == "eu", "is_declared": true, "state": "up", "agreed": "up",
                "votes": [], "hosts": 1, "backends": 0, "ready": 0,
            }))
            .unwrap()
        };
        let service = |more: serde_json::Value| {
            let mut service = json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "backends": {
                "a": {"address": "10.1.0.1"}, "b": {"address": "10.1.0.2"}}});
            service.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            service
        };
        let regional = json!({"port": 81, "regions": {"policy": "active-active"}});
        let desired: Desired = serde_json::from_value(json!({"services": {
            "plain": service(json!({})), "regional": service(regional)}}))
        .unwrap();
        let id = backend_id(&"plain".parse().unwrap(), &"a".parse().unwrap());
        let mut snapshot = Snapshot::default();
        snapshot.backends.insert(id, AppliedBackend { takes_flows: true, ..AppliedBackend::default() });
        let mut regions = vec![shown("us"), shown("eu")];
        add_plain_backends(&mut regions, &"eu".parse().unwrap(), &desired, &snapshot);
        assert_eq!([regions[1].backends, regions[1].ready], [2, 1], "no region: that of the host");
        assert_eq!([regions[0].backends, regions[0].ready], [0, 0]);
    }
}
