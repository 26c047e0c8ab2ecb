//! API of roll-outs: start, step, promote, abort and clear.
//!
//! Input: requests, the newest desired state, and what replicas report. Output: changes of the desired state. Called by
//! `routes`. A roll-out holds the lock `rollout` from its start until it is promoted, aborted or cleared. A change that
//! would send flows to a version that was aborted, or to more of it than the roll-out did, needs `force`.

use super::{
    ApiError, Control,
    access::{Author, Caller},
    control::SharedControl,
    find::no_service,
    regions::{operation_error, operation_in_progress},
    routes::{Params, Reply, body},
    types::{Change, WriteQuery},
};
use crate::{
    clock,
    desired::model::{
        BackendState, Desired, Locality, Name, Rollout, RolloutState, Service, WHOLE, percent, region_list,
    },
    observed::regions::{RolloutShown, rollouts::runs_new},
    printable,
};
use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

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
    /// `step`: share of the new flows, in thousandths; unchanged if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permille: Option<u16>,
    /// `step`: regions that the roll-out includes, all if empty; unchanged if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<Vec<Name>>,
    /// `promote` and `clear`: also if that sends flows to a version that did not get them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// A command that changes a roll-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RolloutVerb {
    Step,
    Promote,
    Abort,
    Clear,
}

impl RolloutVerb {
    fn parse(text: &str) -> Result<Self, ApiError> {
        match text {
            "step" => Ok(Self::Step),
            "promote" => Ok(Self::Promote),
            "abort" => Ok(Self::Abort),
            "clear" => Ok(Self::Clear),
            _ => Err(ApiError::not_found(format!(
                "{text:?} is not a roll-out command: use step, promote, abort or clear"
            ))),
        }
    }
}

/// A region's part in what clearing a roll-out changes.
#[derive(Debug, Default)]
struct VersionInRegion<'a> {
    /// Weights of the replicas of the new version, and of all.
    weights: (u64, u64),
    /// Replicas of the new version.
    new: Vec<&'a Name>,
}

/// What clearing a roll-out changes: the shares of the new version by region, now and by weight. None if nothing.
fn cleared(
    service: &Service,
    rollout: &Rollout,
    here: &Name,
    runs_new: impl Fn(&Name) -> bool,
) -> Option<String> {
    let mut parts: BTreeMap<&Name, VersionInRegion<'_>> = BTreeMap::new();
    let usable = service
        .backends
        .iter()
        .filter(|(_, b)| b.state == BackendState::Up && b.weight > 0 && service.allows(b));
    for (name, backend) in usable {
        let part = parts.entry(backend.region.as_ref().unwrap_or(here)).or_default();
        part.weights.1 += u64::from(backend.weight);
        if runs_new(name) {
            part.weights.0 += u64::from(backend.weight);
            part.new.push(name);
        }
    }
    let has_old = parts.values().any(|part| part.weights.0 < part.weights.1);
    let change = |(region, part): (&&Name, &VersionInRegion<'_>)| {
        let by_weight = (part.weights.0 * u64::from(WHOLE) / part.weights.1) as u16;
        let now = match by_weight {
            0 => 0,
            // Its other flows go to the old version elsewhere, if there is any.
            WHOLE if !has_old => WHOLE,
            _ => rollout.share_in(region),
        };
        (now != by_weight).then(|| {
            let (by_weight, now) = (percent(by_weight), percent(now));
            format!(
                "{by_weight} in region {region} ({}) instead of {now}",
                region_list(part.new.iter().copied())
            )
        })
    };
    let changes: Vec<String> = parts.iter().filter_map(change).collect();
    (!changes.is_empty()).then(|| changes.join(", "))
}

impl Control {
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

    /// Adds where the new version runs, as far as an operator may not expect it.
    async fn note_coverage(&self, mut change: Change, services: &BTreeSet<Name>) -> Change {
        if change.dry_run {
            return change;
        }
        let decided = self.wait_region_snapshot().await;
        let shown = services.iter().filter_map(|name| decided.services.get(name)?.rollout.as_ref());
        let is_partial =
            |r: &&RolloutShown| r.coverage.with < r.coverage.of || r.coverage.is_incomplete(&r.rollout);
        change
            .notes
            .extend(shown.filter(is_partial).map(|r| format!("service {}: {}", r.service, r.coverage.text)));
        change
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
        let (here, mut started) = (self.own_region_or_default(), BTreeSet::new());
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
            if let Some(operation) = operation_in_progress(desired) {
                return Err(operation_error(&operation));
            }
            for name in &chosen {
                let known: Vec<Name> = desired.services.keys().cloned().collect();
                let service = desired.service_mut(name).ok_or_else(|| no_service(name, known.iter()))?;
                service.rollout = Some(rollout.clone());
            }
            started = chosen.into_iter().collect();
            check_regions(desired, &started, &rollout.regions, &here)
        };
        let done =
            self.write_locked(author, query, &format!("roll-out of {}", rollout.title()), change).await?;
        Ok(self.note_coverage(done, &started).await)
    }

    fn own_region_or_default(&self) -> Name {
        self.own_region().unwrap_or_else(|| Locality::default().region)
    }

    /// Services with the roll-outs that a request means.
    fn matching(desired: &Desired, which: &WhichRollout) -> Result<BTreeSet<Name>, ApiError> {
        let matches = |name: &Name, r: &Rollout| {
            which.model.as_ref().is_none_or(|m| *m == r.model)
                && which.service.as_ref().is_none_or(|s| s == name)
        };
        let all = desired.services.iter().filter_map(|(name, s)| Some((name, s.rollout.as_ref()?)));
        let found: Vec<(&Name, &Rollout)> = all.filter(|(name, r)| matches(name, r)).collect();
        let Some((_, first)) = found.first() else {
            return Err(
                ApiError::not_found("no roll-out matches").fix("`lbctl rollout status` lists all roll-outs")
            );
        };
        if let Some((_, other)) = found.iter().find(|(_, r)| r.model != first.model) {
            return Err(ApiError::bad_request(format!(
                "both {} and {} have roll-outs: choose one with --model",
                first.model, other.model
            )));
        }
        Ok(found.into_iter().map(|(name, _)| name.clone()).collect())
    }

    /// What clearing the roll-out of a service changes, in words.
    fn clearing(&self, name: &Name, service: &Service) -> Option<String> {
        let rollout = service.rollout.as_ref()?;
        let new = self.replicas.read(|all| -> BTreeSet<Name> {
            let of = all.iter().filter(|(id, _)| id.service == *name);
            let runs = |e: &crate::observed::replica::ReplicaEntry| {
                e.report.as_ref().is_some_and(|report| runs_new(report, rollout))
            };
            of.filter(|(_, e)| runs(e)).map(|(id, _)| id.backend.clone()).collect()
        });
        let changes =
            cleared(service, rollout, &self.own_region_or_default(), |backend| new.contains(backend))?;
        let was = match rollout.state {
            RolloutState::Aborted if rollout.reason.is_empty() => ", which was aborted".to_owned(),
            RolloutState::Aborted => format!(", which was aborted ({})", rollout.reason),
            _ => String::new(),
        };
        let version = &rollout.version;
        Some(format!(
            "without the roll-out of {version} on service {name}{was}, new flows go by weight again: {version} gets {changes}"
        ))
    }

    async fn change_rollout(
        &self,
        author: &Author,
        query: &WriteQuery,
        verb: RolloutVerb,
        which: WhichRollout,
    ) -> Result<Change, ApiError> {
        if verb != RolloutVerb::Step && (which.permille.is_some() || which.regions.is_some()) {
            return Err(ApiError::bad_request("permille and regions are for step only"));
        }
        let here = self.own_region_or_default();
        let (mut changed, mut notes) = (BTreeSet::new(), Vec::new());
        let change = |desired: &mut Desired| {
            let found = Self::matching(desired, &which)?;
            notes.clear();
            for name in &found {
                let clearing =
                    (verb == RolloutVerb::Clear).then(|| self.clearing(name, &desired.services[name]));
                notes.extend(clearing.flatten());
                let Some(service) = desired.service_mut(name) else { continue };
                let Some(rollout) = &mut service.rollout else { continue };
                match verb {
                    RolloutVerb::Clear => service.rollout = None,
                    _ => change_one(rollout, verb, &which, author)?,
                }
            }
            if !notes.is_empty() && !which.force {
                return Err(ApiError::needs_force(notes.join("; ")).fix(
                    "stop these replicas or give them the other version first, or clear with --force (API: force=true)",
                    ));
            }
            if let Some(regions) = &which.regions {
                check_regions(desired, &found, regions, &here)?;
            }
            changed = found;
            Ok(())
        };
        let mut done = self.write(author, query, change).await?;
        done.notes.append(&mut notes);
        Ok(if verb == RolloutVerb::Abort { done } else { self.note_coverage(done, &changed).await })
    }
}

/// Changes one roll-out as the verb says.
fn change_one(
    rollout: &mut Rollout,
    verb: RolloutVerb,
    which: &WhichRollout,
    author: &Author,
) -> Result<(), ApiError> {
    match verb {
        RolloutVerb::Step if rollout.state != RolloutState::Running => {
            return Err(ApiError::exists(format!(
                "the roll-out of {} is {}, so it has no further steps",
                rollout.title(),
                rollout.state.label()
            ))
            .fix("`lbctl rollout start` begins another"));
        }
        RolloutVerb::Step if which.permille.is_none() && which.regions.is_none() => {
            return Err(ApiError::bad_request("a step needs a share (--to) or regions (--regions)"));
        }
        RolloutVerb::Step => {
            rollout.permille = which.permille.unwrap_or(rollout.permille);
            if let Some(regions) = &which.regions {
                rollout.regions.clone_from(regions);
            }
            return Ok(());
        }
        RolloutVerb::Promote if rollout.state == RolloutState::Aborted && !which.force => {
            return Err(ApiError::needs_force(format!(
                "the roll-out of {} was aborted: {}",
                rollout.title(),
                rollout.reason
            ))
            .fix("start another one with a small share, or promote with --force (API: force=true)"));
        }
        RolloutVerb::Promote if !rollout.regions.is_empty() && !which.force => {
            return Err(ApiError::needs_force(format!(
                    "the roll-out of {} is limited to {}, and promoting it sends all flows of all regions to it",
                    rollout.title(),
                    region_list(&rollout.regions)
                ))
                .fix("widen it first (`lbctl rollout step --all-regions`), or promote with --force (API: force=true)"));
        }
        RolloutVerb::Promote => {
            rollout.state = RolloutState::Promoted;
            rollout.regions.clear();
        }
        RolloutVerb::Abort => rollout.state = RolloutState::Aborted,
        RolloutVerb::Clear => {}
    }
    rollout.reason = which.reason.clone().unwrap_or_else(|| format!("by {}", author.name));
    Ok(())
}

/// Refuses regions in which none of the services has a backend: most likely a typing error.
fn check_regions(
    desired: &Desired,
    services: &BTreeSet<Name>,
    regions: &[Name],
    here: &Name,
) -> Result<(), ApiError> {
    let of = services.iter().filter_map(|name| desired.services.get(name));
    let used: BTreeSet<&Name> =
        of.flat_map(|s| s.backends.values()).map(|b| b.region.as_ref().unwrap_or(here)).collect();
    match regions.iter().find(|region| !used.contains(region)) {
        None => Ok(()),
        Some(region) => Err(ApiError::bad_request(format!(
            "no backend of {} is in region {region}",
            region_list(services)
        ))
        .fix(format!("regions with backends: {}", region_list(used)))),
    }
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
    Ok(Json(control.change_rollout(&author, &query, RolloutVerb::parse(&verb)?, which).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Replicas a and b in east, c in west, d in north; those named run the new version.
    fn clearing(rollout: Value, new: &[&str], weights: [u32; 4]) -> Option<String> {
        let mut all = json!({"model": "m", "version": "v2", "permille": 50});
        all.as_object_mut().unwrap().extend(rollout.as_object().unwrap().clone());
        let mut service = json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "backends": {}});
        for (at, (name, region)) in
            [("a", "east"), ("b", "east"), ("c", "west"), ("d", "north")].into_iter().enumerate()
        {
            service["backends"][name] =
                json!({"address": format!("10.1.0.{at}"), "region": region, "weight": weights[at]});
        }
        let service: Service = serde_json::from_value(service).unwrap();
        let rollout: Rollout = serde_json::from_value(all).unwrap();
        cleared(&service, &rollout, &"east".parse().unwrap(), |name| new.contains(&name.as_str()))
    }

    #[test]
    fn clearing_says_where_the_version_gets_flows_again() {
        let aborted = json!({"state": "aborted"});
        let all = [1, 1, 1, 1];
        assert_eq!(clearing(aborted.clone(), &[], all), None, "its replicas are gone");
        assert_eq!(
            clearing(aborted.clone(), &["b", "c"], all).unwrap(),
            "50 % in region east (b) instead of 0 %, 100 % in region west (c) instead of 0 %"
        );
        assert_eq!(
            clearing(aborted.clone(), &["b"], [3, 1, 1, 1]).unwrap(),
            "25 % in region east (b) instead of 0 %"
        );
        assert_eq!(clearing(aborted, &["b"], [3, 0, 1, 1]), None, "it takes no flows by weight");
        assert_eq!(
            clearing(json!({}), &["b"], all).unwrap(),
            "50 % in region east (b) instead of 5 %",
            "a running one is watched"
        );
        let promoted = json!({"state": "promoted"});
        assert_eq!(clearing(promoted.clone(), &["a", "b", "c", "d"], all), None, "nothing changes");
        assert_eq!(
            clearing(promoted.clone(), &["a", "b", "c"], all),
            None,
            "north serves the old one as before"
        );
        assert_eq!(
            clearing(promoted, &["b"], all).unwrap(),
            "50 % in region east (b) instead of 100 %",
            "the old version gets flows again"
        );
        let limited = json!({"regions": ["west"], "permille": 1_000});
        assert_eq!(clearing(limited, &["b", "c"], all).unwrap(), "50 % in region east (b) instead of 0 %");
    }
}
