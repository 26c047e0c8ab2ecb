//! Differences between two desired states as JSON, so that a change of one backend among thousands takes
//! a few bytes.
//!
//! Input: two states, or a state and a difference. Output: the difference (RFC 7396, JSON Merge Patch), or the
//! other state. Pure. Called by the etcd store and by backups.
//!
//! No field can be forgotten: services and lists are stored one by one, and everything else of a state by `rest`,
//! which takes [`Desired`] apart without `..`.

use crate::desired::model::{
    Desired, Name, Service,
    guard::{List, ListName, Part},
};
use ipnet::IpNet;
use serde_json::{Map, Value};
use std::{collections::BTreeMap, sync::Arc};

/// Key of the services, which are compared one by one.
const SERVICES: &str = "services";
/// Key of the deny and allow lists, which are compared part by part.
const GUARD: &str = "guard";

/// Computes the difference that turns `old` into `new`.
///
/// # Errors
/// A state has no JSON form, which does not happen.
pub fn diff(old: &Desired, new: &Desired) -> serde_json::Result<Value> {
    let mut delta = match patch(&rest(old)?.into(), &rest(new)?.into()) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let mut services = Map::new();
    for (name, service) in &new.services {
        let before = old.services.get(name);
        // An unchanged service is usually the same allocation.
        if before.is_some_and(|b| std::sync::Arc::ptr_eq(b, service) || b == service) {
            continue;
        }
        let after = serde_json::to_value(&**service)?;
        let change = match before {
            Some(before) => patch(&serde_json::to_value(&**before)?, &after),
            None => Some(after),
        };
        if let Some(change) = change {
            services.insert(name.to_string(), change);
        }
    }
    for name in old.services.keys().filter(|name| !new.services.contains_key(*name)) {
        services.insert(name.to_string(), Value::Null);
    }
    if !services.is_empty() {
        delta.insert(SERVICES.to_owned(), Value::Object(services));
    }
    let mut guard = Map::new();
    for name in ListName::ALL {
        let parts = list_diff(old.guard.list(name), new.guard.list(name));
        if !parts.is_empty() {
            guard.insert(name.label().to_owned(), Value::Object(parts));
        }
    }
    if !guard.is_empty() {
        delta.insert(GUARD.to_owned(), Value::Object(guard));
    }
    Ok(Value::Object(delta))
}

/// Applies a difference to `old`; unchanged services are shared.
///
/// # Errors
/// The difference is invalid, or does not fit this state.
pub fn apply(old: &Desired, delta: &Value) -> serde_json::Result<Desired> {
    let mut delta = delta.clone();
    let services = delta.as_object_mut().and_then(|map| map.remove(SERVICES));
    let guard = delta.as_object_mut().and_then(|map| map.remove(GUARD));
    let mut new = if delta.as_object().is_some_and(Map::is_empty) {
        old.clone()
    } else {
        let mut value = rest(old)?.into();
        merge(&mut value, delta);
        let mut new: Desired = serde_json::from_value(value)?;
        new.services.clone_from(&old.services);
        new.guard.clone_from(&old.guard);
        new
    };
    if let Some(guard) = guard {
        let lists: BTreeMap<ListName, ListParts> = serde_json::from_value(guard)?;
        for (name, parts) in lists {
            list_apply(new.guard.list_mut(name), parts);
        }
    }
    let Some(services) = services else { return Ok(new) };
    let services: std::collections::BTreeMap<Name, Value> = serde_json::from_value(services)?;
    for (name, change) in services {
        if change.is_null() {
            new.services.remove(&name);
            continue;
        }
        let mut value = match new.services.get(&name) {
            Some(service) => serde_json::to_value(&**service)?,
            None => Value::Object(Map::new()),
        };
        merge(&mut value, change);
        let service: Service = serde_json::from_value(value)?;
        new.services.insert(name, service.into());
    }
    Ok(new)
}

/// Parts of a list: of each the entries that are set, or removed if none; the whole part is removed if none.
type ListParts = BTreeMap<String, Option<BTreeMap<IpNet, Option<u64>>>>;

/// Computes the difference between two lists.
fn list_diff(old: &List, new: &List) -> Map<String, Value> {
    let none = Part::new();
    let mut parts = Map::new();
    for (name, after) in &new.0 {
        let before = match old.0.get(name) {
            Some(before) if Arc::ptr_eq(before, after) => continue,
            Some(before) => before,
            None => &none,
        };
        let gone = before.keys().filter(|net| !after.contains_key(*net)).map(|net| (net, Value::Null));
        let set = after.iter().filter(|(net, until)| before.get(*net) != Some(*until));
        let entries: Map<String, Value> = gone
            .chain(set.map(|(net, until)| (net, (*until).into())))
            .map(|(n, v)| (n.to_string(), v))
            .collect();
        if !entries.is_empty() {
            parts.insert(name.clone(), Value::Object(entries));
        }
    }
    for name in old.0.keys().filter(|name| !new.0.contains_key(*name)) {
        parts.insert(name.clone(), Value::Null);
    }
    parts
}

fn list_apply(list: &mut List, parts: ListParts) {
    for (name, entries) in parts {
        let Some(entries) = entries else {
            list.0.remove(&name);
            continue;
        };
        let part = Arc::make_mut(list.0.entry(name.clone()).or_default());
        for (net, until) in entries {
            match until {
                Some(until) => part.insert(net, until),
                None => part.remove(&net),
            };
        }
        if part.is_empty() {
            list.0.remove(&name);
        }
    }
}

/// A state without its services and lists, which stores write in one piece.
///
/// # Errors
/// The state has no JSON form, which does not happen.
pub fn rest(desired: &Desired) -> serde_json::Result<Map<String, Value>> {
    // A new field must not compile before it is decided here how it is stored.
    let Desired { services: _, regions, guard: _ } = desired;
    let without = Desired {
        services: BTreeMap::new(),
        regions: regions.clone(),
        guard: crate::desired::model::Guard::default(),
    };
    let mut map: Map<String, Value> = serde_json::from_value(serde_json::to_value(without)?)?;
    map.remove(SERVICES);
    map.remove(GUARD);
    Ok(map)
}

/// Computes the merge patch that turns `old` into `new`; none if they are equal.
fn patch(old: &Value, new: &Value) -> Option<Value> {
    if old == new {
        return None;
    }
    let (Value::Object(old), Value::Object(new)) = (old, new) else { return Some(new.clone()) };
    let mut map = Map::new();
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        map.insert(key.clone(), Value::Null);
    }
    for (key, value) in new {
        let change = match old.get(key) {
            Some(before) => patch(before, value),
            None => Some(value.clone()),
        };
        map.extend(change.map(|change| (key.clone(), change)));
    }
    Some(Value::Object(map))
}

/// Merges a patch (RFC 7396): null removes, objects merge, anything else replaces.
pub fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (key, value) in patch {
            if value.is_null() {
                target.remove(&key);
            } else {
                merge(target.entry(key).or_insert(Value::Null), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::model::generate::desired;
    use proptest::prelude::*;
    use serde_json::json;

    fn state(backends: u8) -> Desired {
        let backend = |b| (format!("b{b}"), json!({"address": format!("10.0.0.{b}"), "weight": 1}));
        let backends: Map<_, _> = (0..backends).map(backend).collect();
        let service = json!({"vip": "10.9.9.9", "port": 80, "protocol": "tcp", "backends": backends});
        serde_json::from_value(json!({ "services": {"s1": service} })).unwrap()
    }

    proptest! {
        #[test]
        fn a_difference_merged_in_gives_the_other_state(a in desired(), b in desired()) {
            let delta = diff(&a, &b).unwrap();
            prop_assert_eq!(apply(&a, &delta).unwrap(), b.clone());
            prop_assert_eq!(delta == json!({}), a == b);
            // One field of the state at a time, so that none can hide behind another.
            let Desired { services, regions, guard } = b;
            for one in [
                Desired { services, ..a.clone() },
                Desired { regions, ..a.clone() },
                Desired { guard, ..a.clone() },
            ] {
                let delta = diff(&a, &one).unwrap();
                prop_assert_eq!(apply(&a, &delta).unwrap(), one.clone());
                prop_assert_eq!(delta == json!({}), a == one);
            }
        }
    }

    #[test]
    fn one_weight_is_a_few_bytes() {
        let (mut a, b) = (state(200), Desired::default());
        assert_eq!(diff(&a, &b).unwrap(), json!({"services": {"s1": null}}));
        let old = a.clone();
        let name: Name = "s1".parse().unwrap();
        a.service_mut(&name).unwrap().backends.values_mut().next().unwrap().weight = 9;
        let delta = diff(&old, &a).unwrap();
        assert_eq!(delta, json!({"services": {"s1": {"backends": {"b0": {"weight": 9}}}}}));
    }
}
