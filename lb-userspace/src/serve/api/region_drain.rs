//! API of draining a region, which is refused without `force` where it would leave a service without a place to run.
//!
//! Input: requests, and the newest desired state. Output: a change of it. Called by `routes`. What counts is where the
//! operator lets a service run, not what is healthy now: a drain must not depend on the moment.

use super::{
    ApiError, Control,
    access::{Author, Caller},
    control::SharedControl,
    regions::{note_declared, operation_error, operation_in_progress, unknown_region},
    routes::{Params, Reply, name},
    types::{Change, WriteQuery},
};
use crate::{
    desired::model::{BackendState, Desired, Name, RegionState},
    printable,
};
use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use serde::{Deserialize, Serialize};

/// Number of services that an error names.
const NAMED: usize = 10;

/// Query of `POST /v1/regions/NAME/drain`: that of every write, and `force`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionDrain {
    /// Only report what would change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Refuse the write unless this is the newest revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<u64>,
    /// Message for the history; generated from the change if none.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "printable::message")]
    pub message: Option<String>,
    /// Drain the region although this leaves services without a backend that takes new flows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

impl RegionDrain {
    /// The drain that a write asks for.
    pub fn new(write: WriteQuery, force: bool) -> Self {
        let WriteQuery { dry_run, expected, message, force: _ } = write;
        Self { dry_run, expected, message, force }
    }
}

/// Services that may run somewhere now, and nowhere once `region` drains as well. A backend without a region is in that
/// of the host, `here`.
fn left_without_backend(desired: &Desired, region: &Name, here: Option<&Name>) -> Vec<Name> {
    let drains = |name: &Name| desired.regions.get(name).is_some_and(|r| r.state == RegionState::Draining);
    let is_left = |(name, service): (&Name, &std::sync::Arc<crate::desired::model::Service>)| {
        let usable = service.backends.values().filter(|b| b.state == BackendState::Up && service.allows(b));
        let mut places =
            usable.map(|b| b.region.as_ref().or(here)).filter(|place| !place.is_some_and(drains));
        let first = places.next()?;
        let all_drain = first == Some(region) && places.all(|place| place == Some(region));
        all_drain.then(|| name.clone())
    };
    desired.services.iter().filter_map(is_left).collect()
}

fn refuse_drain(region: &Name, services: &[Name]) -> ApiError {
    let names: Vec<&str> = services.iter().take(NAMED).map(Name::as_str).collect();
    let more = match services.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let what = if services.len() == 1 { "service" } else { "services" };
    ApiError {
        status: StatusCode::CONFLICT,
        code: "no_place",
        ..ApiError::bad_request(format!(
            "draining region {region} leaves {what} {}{more} without any backend that takes new flows",
            names.join(", ")
        ))
        .fix(
            "give them backends in another region that they may use, or drain with --force (API: force=true): established \
             flows then continue, and new ones are dropped",
        )
    }
}

impl Control {
    /// Region of this host.
    pub(super) fn own_region(&self) -> Option<Name> {
        self.fleet_member.get().and_then(|member| member.region.parse().ok())
    }

    async fn drain_region(
        &self,
        author: &Author,
        drain: RegionDrain,
        region: Name,
    ) -> Result<Change, ApiError> {
        let RegionDrain { dry_run, expected, message, force } = drain;
        let query = WriteQuery { dry_run, expected, message, force: false };
        let here = self.own_region();
        let change = |desired: &mut Desired| {
            self.declare_regions(desired);
            let Some(known) = desired.regions.get(&region) else {
                return Err(unknown_region(&region, desired));
            };
            if known.state != RegionState::Draining
                && let Some(operation) = operation_in_progress(desired)
            {
                return Err(operation_error(&operation));
            }
            let left = left_without_backend(desired, &region, here.as_ref());
            if !force && !left.is_empty() {
                return Err(refuse_drain(&region, &left));
            }
            desired.regions.entry(region.clone()).or_default().state = RegionState::Draining;
            Ok(())
        };
        let done = self.write_locked(author, &query, &format!("drain of region {region}"), change).await?;
        Ok(note_declared(done, &region))
    }

    async fn undrain_region(
        &self,
        author: &Author,
        query: &WriteQuery,
        region: Name,
    ) -> Result<Change, ApiError> {
        let change = |desired: &mut Desired| {
            self.declare_regions(desired);
            let Some(known) = desired.regions.get_mut(&region) else {
                return Err(unknown_region(&region, desired));
            };
            known.state = RegionState::Up;
            Ok(())
        };
        Ok(note_declared(self.write(author, query, change).await?, &region))
    }
}

pub(super) async fn region_drain(
    State(control): SharedControl,
    Path(region): Path<String>,
    Params(query): Params<RegionDrain>,
    Caller(author): Caller,
) -> Reply<Change> {
    Ok(Json(control.drain_region(&author, query, name(&region)?).await?))
}

pub(super) async fn region_undrain(
    State(control): SharedControl,
    Path(region): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
) -> Reply<Change> {
    Ok(Json(control.undrain_region(&author, &query, name(&region)?).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_service_is_named_if_the_drain_takes_its_last_place() {
        let service = |port: u16, rules: serde_json::Value, backends: serde_json::Value| json!({"vip": "10.0.0.1", "port": port, "protocol": "tcp", "regions": rules, "backends": backends});
        let at = |region: &str, n: u8| json!({"address": format!("10.1.0.{n}"), "region": region});
        let off =
            |region: &str, state: &str| json!({"address": "10.1.0.9", "region": region, "state": state});
        let both = json!({"a": at("east", 1), "b": at("west", 2)});
        let desired: Desired = serde_json::from_value(json!({
            "regions": {"east": {}, "west": {}, "north": {"state": "draining"}},
            "services": {
                "both": service(1, json!(null), both.clone()),
                "bound": service(2, json!({"allowed": ["east"]}), both),
                "east-only": service(3, json!(null), json!({"a": at("east", 1)})),
                "rest-is-off": service(4, json!(null), json!({
                    "a": at("east", 1), "b": off("west", "draining"), "c": off("west", "down")})),
                "rest-drains": service(5, json!(null), json!({"a": at("east", 1), "n": at("north", 3)})),
                "nowhere-now": service(6, json!(null), json!({"n": at("north", 3)})),
                "here": service(7, json!(null), json!({"a": {"address": "10.1.0.1"}})),
                "empty": service(8, json!(null), json!({})),
            }
        }))
        .unwrap();
        let (east, west) = ("east".parse().unwrap(), "west".parse().unwrap());
        let left = |region: &Name, here: &Name| {
            let left = left_without_backend(&desired, region, Some(here));
            left.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(left(&east, &west), ["bound", "east-only", "rest-drains", "rest-is-off"]);
        assert_eq!(left(&east, &east), ["bound", "east-only", "here", "rest-drains", "rest-is-off"]);
        assert_eq!(left(&west, &east), Vec::<String>::new());
        let many: Vec<Name> = (0..12).map(|i| format!("s{i}").parse().unwrap()).collect();
        assert!(refuse_drain(&east, &many).message.contains("s9 and 2 more without"));
    }
}
