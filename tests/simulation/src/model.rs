//! What a request should make of a state: an account of the API's writes that shares nothing with their handlers.

use super::operations::{Effect, Operation};
use lb_userspace::desired::{
    model::{Desired, guard::ListName},
    store::delta,
};
use serde_json::{Value, json};
use std::sync::Arc;

/// Removes what the daemon chooses by itself: seats and sizes.
pub fn without_choices(desired: &Desired) -> Desired {
    let mut plain = desired.clone();
    for service in plain.services.values_mut() {
        let service = Arc::make_mut(service);
        service.seating.clear();
        service.table_size = None;
        service.backends.values_mut().for_each(|b| b.seat = None);
    }
    plain
}

/// Checks that `next` is what the operation makes of `before`. `earlier` reads revisions.
pub fn check(
    operation: &Operation,
    before: &Desired,
    next: &Desired,
    earlier: impl FnOnce(u64) -> Option<Arc<Desired>>,
) -> Result<(), String> {
    let Some(mut expected) = expected(operation, before, next, earlier)? else { return Ok(()) };
    if !matches!(operation.effect, Effect::Rollback { .. }) {
        // What new services get is in the model's own tests.
        expected.assign_defaults(before);
    }
    let (expected, found) = (without_choices(&expected), without_choices(next));
    if expected == found {
        return Ok(());
    }
    let text = delta::diff(&expected, &found).map_or_else(|e| e.to_string(), |d| d.to_string());
    Err(format!("differs from what was asked for by {text}"))
}

/// The state that the operation makes; none if it cannot be told any more.
fn expected(
    operation: &Operation,
    before: &Desired,
    next: &Desired,
    earlier: impl FnOnce(u64) -> Option<Arc<Desired>>,
) -> Result<Option<Desired>, String> {
    let mut state = before.clone();
    match &operation.effect {
        Effect::Nothing => return Err("it should change nothing".to_owned()),
        Effect::Rollout => {
            let mut found = next.clone();
            for (name, service) in &mut found.services {
                Arc::make_mut(service).rollout = before.services.get(name).and_then(|s| s.rollout.clone());
            }
            if before.regions.is_empty() {
                found.regions.clear();
            }
            return if without_choices(&found) == without_choices(before) {
                Ok(None)
            } else {
                Err("more than roll-outs has changed".to_owned())
            };
        }
        Effect::Rollback { to } => return Ok(earlier(*to).map(|found| (*found).clone())),
        Effect::Declare { region } => {
            let name = region.parse().map_err(|_| "the region's name is not valid")?;
            state.regions.entry(name).or_default();
            declare_others(&mut state, before, next);
        }
        Effect::Guard { list, add, remove } => {
            let list = if *list == "deny" { ListName::Deny } else { ListName::Allow };
            let parts = state.guard.list_mut(list);
            for prefix in remove.iter().filter_map(|text| text.parse().ok()) {
                parts.remove(prefix);
            }
            for prefix in add.iter().filter_map(|text| text.parse().ok()) {
                parts.insert(prefix, 0);
            }
        }
        Effect::Config { config } => {
            let wanted: Desired = serde_json::from_value(config.clone()).map_err(|e| e.to_string())?;
            state.services = wanted.services;
            // Files usually omit roll-outs, which stay where the service has replicas that report.
            for (name, service) in &mut state.services {
                let running = before.services.get(name).and_then(|s| s.rollout.clone());
                if service.rollout.is_none() && service.replica.is_some() {
                    Arc::make_mut(service).rollout = running;
                }
            }
        }
        Effect::Merge { path, patch, is_new } => {
            let mut value = serde_json::to_value(before).map_err(|e| e.to_string())?;
            merge_at(&mut value, path, patch.clone(), *is_new)?;
            state = serde_json::from_value(value).map_err(|e| e.to_string())?;
            if path[0] == "regions" {
                declare_others(&mut state, before, next);
            }
        }
    }
    Ok(Some(state))
}

/// With the first region, those in use are declared.
fn declare_others(state: &mut Desired, before: &Desired, next: &Desired) {
    if before.regions.is_empty() {
        for (name, region) in &next.regions {
            state.regions.entry(name.clone()).or_insert(*region);
        }
    }
}

fn merge_at(value: &mut Value, path: &[String], patch: Option<Value>, is_new: bool) -> Result<(), String> {
    let Some((last, above)) = path.split_last() else { return Err("no path".to_owned()) };
    let mut place = value;
    for part in above {
        if place.get(part).is_none() {
            place[part] = json!({});
        }
        place = &mut place[part];
    }
    let was_there = place.get(last).is_some();
    let Some(mut patch) = patch else {
        return match place.as_object_mut().and_then(|map| map.remove(last)) {
            Some(_) => Ok(()),
            None => Err(format!("{last} was not there to be removed")),
        };
    };
    if was_there == is_new && path[0] == "services" {
        return Err(format!("{last} was {}there", if was_there { "already " } else { "not " }));
    }
    // Weights of regions go with the policy that they are for.
    if let Some(regions) = patch.get_mut("regions").filter(|r| r.is_object())
        && regions["policy"] != "weighted"
        && !is_new
    {
        regions["weights"] = Value::Null;
    }
    if is_new {
        place[last] = patch;
    } else {
        let mut current = place.get(last).cloned().unwrap_or_else(|| json!({}));
        delta::merge(&mut current, patch);
        place[last] = current;
    }
    Ok(())
}
