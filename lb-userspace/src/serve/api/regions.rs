//! Regions, policy and roll-outs through the API.
//!
//! Input: requests, and what `regions` has decided. Output: JSON of its types. Called by `routes`. What drains a
//! region or brings a new version takes the lock `rollout` for it by itself, and refuses that lock to others until
//! it is over: two regions are never taken away at once, by whomever.
//!
//! Drains and roll-outs are desired state: a commit is compare-and-set, and a state with two draining regions is
//! invalid.

use super::{
    ApiError, Control,
    access::{Author, Trier},
    engine::Snapshot,
    routes::{Params, Reply, body, name},
    types::{Change, WriteQuery},
    view::{find_service, no_service},
};
use crate::{
    clock,
    desired::{
        model::{BackendId, Desired, Name, Region, RegionState, Rollout, RolloutState, nearest, region_list},
        store::{Claim, Lock, StoreError},
    },
    observed::regions::{Explained, RegionShown, RegionSnapshot, RolloutShown},
    plan::policy::audit::{Residency, Seen, audit},
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
/// How long it is held at most for one write.
const LOCK_TTL: Duration = Duration::from_secs(60);
/// How long a reader waits for a decision that is due.
const NEWS: Duration = Duration::from_secs(2);

/// `GET /v1/regions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Regions {
    /// Region of the host that answers.
    pub here: Name,
    /// Regions by name.
    pub regions: Vec<RegionShown>,
}

/// Body of `POST /v1/rollouts`: which version comes, to where, and how much of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRollout {
    /// Services; if none, all whose replicas report the model.
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
    /// Of this model; if none, the only one there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// On this service; if none, on all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// Why, for the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What goes on that holds the lock for as long as it does.
fn going_on(desired: &Desired) -> Option<String> {
    let draining = desired.regions.iter().find(|(_, r)| r.state == RegionState::Draining);
    if let Some((region, _)) = draining {
        return Some(format!("region {region} drains: `lbctl region undrain {region}` ends it"));
    }
    desired.services.iter().find_map(|(name, s)| {
        let rollout = s.rollout.as_ref().filter(|r| r.state == RolloutState::Running)?;
        let Rollout { model, version, .. } = rollout;
        Some(format!(
            "version {version} of {model} comes in on service {name}: `lbctl rollout promote` or `abort` ends it"
        ))
    })
}

impl Control {
    /// Says where decisions are to be seen.
    pub fn steer_by(&self, steered: watch::Receiver<Arc<RegionSnapshot>>) {
        // Said once, by the daemon.
        let _ = self.steered.set(steered);
    }

    /// What is decided; nothing where nobody decides.
    pub fn steered(&self) -> Arc<RegionSnapshot> {
        self.steered.get().map(|watch| watch.borrow().clone()).unwrap_or_default()
    }

    /// What is decided about the newest state known here; what was decided before where that takes too long.
    async fn decided(&self) -> Arc<RegionSnapshot> {
        if let Some(mut watch) = self.steered.get().cloned() {
            let newest = self.head().revision.number;
            let _ = tokio::time::timeout(NEWS, watch.wait_for(|steered| steered.revision >= newest)).await;
        }
        self.steered()
    }

    /// Every service's residency, and what is wrong with it.
    pub fn residency(&self) -> Vec<Residency> {
        let (head, snapshot) = (self.head(), self.engine.snapshot());
        residencies(&head.desired, &snapshot)
    }

    /// Refuses the lock while something goes on that holds it by itself. The newest state decides, not the newest that
    /// this host has heard of.
    pub(super) async fn refuse_while_going_on(&self) -> Result<(), ApiError> {
        let head = self.newest().await?;
        match going_on(&head) {
            Some(what) => Err(held(&what)),
            None => Ok(()),
        }
    }

    async fn newest(&self) -> Result<Arc<Desired>, ApiError> {
        let mut head = self.head();
        loop {
            match self.store.get(head.revision.number + 1).await {
                Ok(newer) => head = newer,
                Err(StoreError::NoRevision { .. }) => return Ok(head.desired),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Who holds a lock, for others.
    pub(super) fn holder(&self, author: &Author) -> String {
        match self.sharing.get() {
            Some(sharing) => format!("{} on {}", author.name, sharing.host),
            None => author.name.clone(),
        }
    }

    /// Changes the desired state while holding the lock: the caller's, if he has it.
    async fn write_locked(
        &self,
        author: &Author,
        query: &WriteQuery,
        reason: &str,
        change: impl FnMut(&mut Desired) -> Result<(), ApiError>,
    ) -> Result<Change, ApiError> {
        if query.dry_run {
            return self.write(author, query, change).await;
        }
        let (holder, held) = (self.holder(author), author.lock_token.clone());
        let is_held = held.is_some();
        let claim =
            Claim { name: LOCK.to_owned(), holder, reason: reason.to_owned(), ttl: LOCK_TTL, token: held };
        // With a token: whether the caller has the lock, which he keeps.
        let Lock { token, .. } = self.store.lock(claim).await?;
        if is_held {
            return self.write(author, query, change).await;
        }
        let result = self.write(author, query, change).await;
        if let Err(error) = self.store.unlock(LOCK.to_owned(), token).await {
            tracing::warn!(%error, "lock {LOCK} is not released; it runs out by itself");
        }
        result
    }

    /// Declares the regions in use, if none are yet: from then on others are mistakes.
    fn declare(&self, desired: &mut Desired) {
        if !desired.regions.is_empty() {
            return;
        }
        let rules = desired.services.values().filter_map(|s| s.regions.as_ref());
        let named = rules.flat_map(|r| r.allowed.iter().flatten().chain(r.weights.keys()));
        let backends = desired.services.values().flat_map(|s| s.backends.values());
        let used = named.chain(backends.filter_map(|b| b.region.as_ref()));
        let mut all: Vec<Name> = used.cloned().collect();
        all.extend(self.steered().regions.iter().map(|r| r.name.clone()));
        desired.regions = all.into_iter().map(|name| (name, Region::default())).collect();
    }

    async fn region_state(
        &self,
        author: &Author,
        query: &WriteQuery,
        region: Name,
        state: RegionState,
    ) -> Result<Change, ApiError> {
        let change = |desired: &mut Desired| {
            self.declare(desired);
            if state == RegionState::Draining
                && desired.regions.get(&region).is_none_or(|r| r.state != state)
                && let Some(what) = going_on(desired)
            {
                return Err(held(&what));
            }
            let Some(known) = desired.regions.get_mut(&region) else {
                return Err(no_region(&region, desired));
            };
            known.state = state;
            Ok(())
        };
        match state {
            RegionState::Up => self.write(author, query, change).await,
            RegionState::Draining => {
                self.write_locked(author, query, &format!("drain of region {region}"), change).await
            }
        }
    }

    /// Services whose replicas report a model.
    fn serving(&self, desired: &Desired, model: &str) -> Vec<Name> {
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
            let chosen =
                if services.is_empty() { self.serving(desired, &rollout.model) } else { services.clone() };
            if chosen.is_empty() {
                return Err(ApiError::not_found(format!(
                    "no service's replicas report model {}",
                    rollout.model
                ))
                .fix("`lbctl replica list` shows what they report; --service names the service anyway"));
            }
            if let Some(what) = going_on(desired) {
                return Err(held(&what));
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
            _ => return Err(ApiError::not_found(format!("there is no {verb}: promote, abort or clear"))),
        };
        let change = |desired: &mut Desired| {
            let is_meant = |name: &Name, r: &Rollout| {
                model.as_ref().is_none_or(|m| *m == r.model) && service.as_ref().is_none_or(|s| s == name)
            };
            let all = desired.services.iter().filter_map(|(name, s)| Some((name, s.rollout.as_ref()?)));
            let found: Vec<(Name, String)> = all
                .filter(|(name, r)| is_meant(name, r))
                .map(|(name, r)| (name.clone(), r.model.clone()))
                .collect();
            let Some((_, first)) = found.first() else {
                return Err(
                    ApiError::not_found("there is no such roll-out").fix("`lbctl rollout status` shows all")
                );
            };
            if let Some((_, other)) = found.iter().find(|(_, model)| model != first) {
                return Err(ApiError::bad_request(format!(
                    "roll-outs of {first} and {other} are there: give --model"
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

/// From the desired state and what is in the maps.
fn residencies(desired: &Desired, snapshot: &Snapshot) -> Vec<Residency> {
    let seen = |id: &BackendId| {
        let applied = snapshot.backends.get(id);
        Seen { ready: applied.is_some_and(|b| b.takes_flows), flows: applied.map_or(0, |b| b.tracked_flows) }
    };
    audit(desired, seen, |name| snapshot.services.get(name).map_or_else(Vec::new, |s| s.regions.clone()))
}

fn held(what: &str) -> ApiError {
    ApiError { code: "held", ..ApiError::exists(format!("not now: {what}")) }
}

fn no_region(region: &Name, desired: &Desired) -> ApiError {
    let error = ApiError::not_found(format!("there is no region {region}"));
    match nearest(region.as_str(), desired.regions.keys().map(Name::as_str)) {
        Some(near) => error.fix(format!("did you mean {near}?")),
        None => error.fix(format!("known: {}", region_list(desired.regions.keys()))),
    }
}

type Ctl = State<Arc<Control>>;

pub(super) async fn policies(State(control): Ctl) -> Reply<Vec<Explained>> {
    Ok(Json(control.decided().await.services.values().cloned().collect()))
}

pub(super) async fn policy(State(control): Ctl, Path(service): Path<String>) -> Reply<Explained> {
    let service = name(&service)?;
    let head = control.head();
    let wanted = find_service(&head, &service)?;
    let is_steered = wanted.is_regional() || wanted.rollout.is_some();
    let steered = if is_steered { control.decided().await } else { control.steered() };
    let found = steered.services.get(&service).cloned();
    let plain = || {
        ApiError::not_found(format!(
            "service {service} has neither regions nor a roll-out: all its backends are alike"
        ))
        .fix(format!("`lbctl backend set {service} NAME --region REGION` says where one is"))
    };
    Ok(Json(found.ok_or_else(plain)?))
}

pub(super) async fn residency(State(control): Ctl) -> Reply<Vec<Residency>> {
    Ok(Json(control.residency()))
}

pub(super) async fn regions(State(control): Ctl) -> Reply<Regions> {
    let steered = control.decided().await;
    let here = steered.regions.iter().find(|r| r.is_local).map(|r| r.name.clone());
    let here = here.ok_or_else(|| ApiError::not_found("this lbd knows of no regions yet"))?;
    Ok(Json(Regions { here, regions: steered.regions.clone() }))
}

pub(super) async fn region_add(
    State(control): Ctl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Trier(author): Trier,
) -> Reply<Change> {
    let region = name(&region)?;
    let change = |desired: &mut Desired| {
        control.declare(desired);
        desired.regions.entry(region.clone()).or_default();
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn region_remove(
    State(control): Ctl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Trier(author): Trier,
) -> Reply<Change> {
    let region = name(&region)?;
    let change = |desired: &mut Desired| match desired.regions.remove(&region) {
        Some(_) => Ok(()),
        None => Err(no_region(&region, desired)),
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn region_drain(
    State(control): Ctl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Trier(author): Trier,
) -> Reply<Change> {
    Ok(Json(control.region_state(&author, &query, name(&region)?, RegionState::Draining).await?))
}

pub(super) async fn region_undrain(
    State(control): Ctl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Trier(author): Trier,
) -> Reply<Change> {
    Ok(Json(control.region_state(&author, &query, name(&region)?, RegionState::Up).await?))
}

pub(super) async fn rollouts(State(control): Ctl) -> Reply<Vec<RolloutShown>> {
    Ok(Json(control.decided().await.services.values().filter_map(|e| e.rollout.clone()).collect()))
}

pub(super) async fn rollout_start(
    State(control): Ctl,
    Params(query): Params<WriteQuery>,
    Trier(author): Trier,
    bytes: Bytes,
) -> Reply<Change> {
    let start: StartRollout = body(&bytes)?;
    Ok(Json(control.start_rollout(&author, &query, start).await?))
}

pub(super) async fn rollout_change(
    State(control): Ctl,
    Path(verb): Path<String>,
    Params(query): Params<WriteQuery>,
    Trier(author): Trier,
    bytes: Bytes,
) -> Reply<Change> {
    let which: WhichRollout = body(&bytes)?;
    Ok(Json(control.change_rollout(&author, &query, &verb, which).await?))
}
