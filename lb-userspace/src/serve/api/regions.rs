//! API of regions, policy and roll-outs.
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
    routes::{Params, Reply, body, name},
    types::{Change, WriteQuery},
    view::{backend_id, find_service, no_service},
};
use crate::{
    clock,
    desired::{
        model::{BackendId, Desired, Name, Region, RegionState, Rollout, RolloutState, nearest, region_list},
        store::{Claim, Lock, StoreError},
    },
    observed::regions::{Explained, RegionShown, RegionSnapshot, RolloutShown},
    plan::policy::audit::{BackendUse, Residency, audit},
    printable,
};
use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
};
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

/// Body of `POST /v1/rollouts`: the version to roll out, the services, and the share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRollout {
    /// Services; if empty, all whose replicas report the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Name>,
    /// The roll-out.
    #[serde(flatten)]
    pub rollout: Rollout,
}

/// Body of `POST /v1/rollouts/VERB`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WhichRollout {
    /// Model of the roll-out; if none, the only model with a roll-out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Service of the roll-out; if none, all services.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// Why, for the record.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "printable::optional_reason"
    )]
    pub reason: Option<String>,
}

/// The operation in progress that holds the lock, with the command that ends it.
pub(super) fn operation_in_progress(desired: &Desired) -> Option<String> {
    let draining = desired.regions.iter().find(|(_, r)| r.state == RegionState::Draining);
    if let Some((region, _)) = draining {
        return Some(format!("region {region} drains: `lbctl region undrain {region}` ends the drain"));
    }
    desired.services.iter().find_map(|(name, s)| {
        let rollout = s.rollout.as_ref().filter(|r| r.state == RolloutState::Running)?;
        let Rollout { model, version, .. } = rollout;
        Some(format!(
            "version {version} of {model} is being rolled out on service {name}: `lbctl rollout promote` or `lbctl rollout abort` ends it"
        ))
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
    async fn wait_region_snapshot(&self) -> Arc<RegionSnapshot> {
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
            Some(what) => Err(operation_error(&what)),
            None => Ok(()),
        }
    }

    async fn newest_desired(&self) -> Result<Arc<Desired>, ApiError> {
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
        desired.regions = all.into_iter().map(|name| (name, Region::default())).collect();
    }

    /// Services whose replicas report a model.
    fn services_of_model(&self, desired: &Desired, model: &str) -> Vec<Name> {
        let reports = |service: &Name| {
            self.replicas.read(|all| {
                let of = all.iter().filter(|(id, _)| id.service == *service);
                of.filter_map(|(_, e)| e.report.as_ref()).any(|r| r.model.as_deref() == Some(model))
            })
        };
        desired.services.keys().filter(|name| reports(name)).cloned().collect()
    }

    async fn start_rollout(
        &self,
        author: &Author,
        query: &WriteQuery,
        start: StartRollout,
    ) -> Result<Change, ApiError> {
        let StartRollout { services, rollout } = start;
        let rollout = Rollout {
            state: RolloutState::Running,
            since_ms: clock::unix_ms(),
            reason: String::new(),
            ..rollout
        };
        let what = format!("version {} of {}", rollout.version, rollout.model);
        let change = |desired: &mut Desired| {
            let chosen = if services.is_empty() {
                self.services_of_model(desired, &rollout.model)
            } else {
                services.clone()
            };
            if chosen.is_empty() {
                return Err(ApiError::not_found(format!(
                    "no service's replicas report model {}",
                    rollout.model
                ))
                .fix("`lbctl replica list` shows the reported models; choose the service with --service"));
            }
            if let Some(what) = operation_in_progress(desired) {
                return Err(operation_error(&what));
            }
            for name in &chosen {
                let known: Vec<Name> = desired.services.keys().cloned().collect();
                let service = desired.service_mut(name).ok_or_else(|| no_service(name, known.iter()))?;
                service.rollout = Some(rollout.clone());
            }
            Ok(())
        };
        self.write_locked(author, query, &format!("roll-out of {what}"), change).await
    }

    async fn change_rollout(
        &self,
        author: &Author,
        query: &WriteQuery,
        verb: &str,
        which: WhichRollout,
    ) -> Result<Change, ApiError> {
        let WhichRollout { model, service, reason } = which;
        let state = match verb {
            "promote" => Some(RolloutState::Promoted),
            "abort" => Some(RolloutState::Aborted),
            "clear" => None,
            _ => {
                return Err(ApiError::not_found(format!(
                    "{verb:?} is not a roll-out command: use promote, abort or clear"
                )));
            }
        };
        let change = |desired: &mut Desired| {
            let matches = |name: &Name, r: &Rollout| {
                model.as_ref().is_none_or(|m| *m == r.model) && service.as_ref().is_none_or(|s| s == name)
            };
            let all = desired.services.iter().filter_map(|(name, s)| Some((name, s.rollout.as_ref()?)));
            let found: Vec<(Name, String)> = all
                .filter(|(name, r)| matches(name, r))
                .map(|(name, r)| (name.clone(), r.model.clone()))
                .collect();
            let Some((_, first)) = found.first() else {
                return Err(ApiError::not_found("no roll-out matches")
                    .fix("`lbctl rollout status` lists all roll-outs"));
            };
            if let Some((_, other)) = found.iter().find(|(_, model)| model != first) {
                return Err(ApiError::bad_request(format!(
                    "both {first} and {other} have roll-outs: choose one with --model"
                )));
            }
            for (name, _) in &found {
                let Some(service) = desired.service_mut(name) else { continue };
                match (state, &mut service.rollout) {
                    (None, rollout) => *rollout = None,
                    (Some(state), Some(rollout)) => {
                        rollout.state = state;
                        rollout.reason = reason.clone().unwrap_or_else(|| format!("by {}", author.name));
                    }
                    (Some(_), None) => {}
                }
            }
            Ok(())
        };
        self.write(author, query, change).await
    }
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

pub(super) fn operation_error(what: &str) -> ApiError {
    ApiError { code: "held", ..ApiError::exists(format!("not possible now: {what}")) }
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
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn region_remove(
    State(control): SharedControl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
) -> Reply<Change> {
    let region = name(&region)?;
    let change = |desired: &mut Desired| match desired.regions.remove(&region) {
        Some(_) => Ok(()),
        None => Err(unknown_region(&region, desired)),
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn rollouts(State(control): SharedControl) -> Reply<Vec<RolloutShown>> {
    Ok(Json(
        control.wait_region_snapshot().await.services.values().filter_map(|e| e.rollout.clone()).collect(),
    ))
}

pub(super) async fn rollout_start(
    State(control): SharedControl,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let start: StartRollout = body(&bytes)?;
    Ok(Json(control.start_rollout(&author, &query, start).await?))
}

pub(super) async fn rollout_change(
    State(control): SharedControl,
    Path(verb): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let which: WhichRollout = body(&bytes)?;
    Ok(Json(control.change_rollout(&author, &query, &verb, which).await?))
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
