//! Differences between two desired states, field by field.
//!
//! Pure. Called by the API (`--dry-run`, history) and by `lbctl config diff`; `render` prints them.

use super::{Desired, ListName, Name, Rollout, Service};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, fmt};

/// One difference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "lowercase")]
pub enum Difference {
    /// A service, or a backend of a remaining service, is new.
    Add {
        /// Name of the service.
        service: Name,
        /// Name of the backend, if it is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backend: Option<Name>,
        /// The complete new value.
        to: Value,
    },
    /// A service, or a backend of a remaining service, is removed.
    Remove {
        /// Service.
        service: Name,
        /// Backend, if it is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backend: Option<Name>,
        /// The complete old value.
        from: Value,
    },
    /// A setting differs.
    Set {
        /// Service.
        service: Name,
        /// Name of the backend, if it is a setting of one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        backend: Option<Name>,
        /// Setting, dotted (`health.interval_ms`); `rollout` as a whole.
        field: String,
        /// Old value, null if it was not set.
        from: Value,
        /// New value, null if it is no longer set.
        to: Value,
    },
    /// A region is new, removed or changed.
    Region {
        /// Name of the region.
        region: Name,
        /// Old value, null if the region is new.
        from: Value,
        /// New value, null if the region is removed.
        to: Value,
    },
    /// Entries of the deny or the allow list differ.
    List {
        /// Name of the list.
        list: ListName,
        /// Number of added entries.
        added: usize,
        /// Number of removed entries.
        removed: usize,
        /// Number of entries with another expiry time.
        changed: usize,
        /// First of these entries.
        first: Vec<String>,
    },
}

/// Number of a list's entries that are printed.
const FIRST: usize = 10;

impl fmt::Display for Difference {
    /// Prints `+ service web`, `- backend web/a` or `web/b: weight 1 → 5`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thing = |service: &Name, backend: &Option<Name>| match backend {
            Some(backend) => format!("backend {service}/{backend}"),
            None => format!("service {service}"),
        };
        match self {
            Self::Region { region, from: Value::Null, .. } => write!(f, "+ region {region}"),
            Self::Region { region, to: Value::Null, .. } => write!(f, "- region {region}"),
            Self::Region { region, from, to } => {
                let state = |v: &Value| v["state"].as_str().unwrap_or_default().to_owned();
                write!(f, "region {region}: state {} → {}", state(from), state(to))
            }
            Self::Add { service, backend, .. } => write!(f, "+ {}", thing(service, backend)),
            Self::Remove { service, backend, .. } => write!(f, "- {}", thing(service, backend)),
            Self::Set { service, backend: None, field, from, to } if field == "rollout" => {
                write!(f, "{service}: {}", rollout_change(from, to))
            }
            Self::Set { service, backend, field, from, to } => {
                let text = |v: &Value| match v {
                    Value::Null => "unset".to_owned(),
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                let backend = backend.as_ref().map(|b| format!("/{b}")).unwrap_or_default();
                write!(f, "{service}{backend}: {field} {} → {}", text(from), text(to))
            }
            Self::List { list, added, removed, changed, first } => {
                let all = added + removed + changed;
                let more = if all > first.len() { ", ..." } else { "" };
                let counts = [(*added, "added"), (*removed, "removed"), (*changed, "with another expiry")];
                let counts: Vec<String> =
                    counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
                write!(f, "{} list: {} ({}{more})", list.label(), counts.join(", "), first.join(", "))
            }
        }
    }
}

/// A change of a roll-out, in words.
fn rollout_change(from: &Value, to: &Value) -> String {
    let rollout = |value: &Value| serde_json::from_value::<Rollout>(value.clone()).ok();
    match (rollout(from), rollout(to)) {
        (None, Some(new)) => format!("roll-out of {} at {}", new.title(), new.scope()),
        (Some(old), None) => format!("roll-out of {} cleared", old.title()),
        (Some(old), Some(new)) => new.changes(&old),
        // Written by another version of lbd.
        (None, None) => format!("rollout {from} → {to}"),
    }
}

/// All differences, in name order; empty if the states are equal.
pub fn differences(old: &Desired, new: &Desired) -> Vec<Difference> {
    // A new field must not compile before its differences are reported.
    let Desired { services: _, regions: _, guard: _ } = new;
    let mut found = Vec::new();
    for (name, from) in &old.services {
        match new.services.get(name) {
            None => {
                found.push(Difference::Remove { service: name.clone(), backend: None, from: value(from) });
            }
            Some(to) if to != from => service_differences(name, from, to, &mut found),
            Some(_) => {}
        }
    }
    for (name, to) in &new.services {
        if !old.services.contains_key(name) {
            found.push(Difference::Add { service: name.clone(), backend: None, to: value(to) });
        }
    }
    for name in old.regions.keys().chain(new.regions.keys().filter(|name| !old.regions.contains_key(*name))) {
        let of = |state: &Desired| state.regions.get(name).map_or(Value::Null, value);
        let (from, to) = (of(old), of(new));
        if from != to {
            found.push(Difference::Region { region: name.clone(), from, to });
        }
    }
    for list in ListName::ALL {
        let changes = new.guard.list(list).changes(old.guard.list(list));
        if changes.is_empty() {
            continue;
        }
        let count = |what: fn(bool, bool) -> bool| {
            changes.iter().filter(|(_, from, to)| what(from.is_some(), to.is_some())).count()
        };
        let sign = |from: Option<u64>, to: Option<u64>| match (from, to) {
            (None, _) => "+",
            (_, None) => "-",
            _ => "~",
        };
        found.push(Difference::List {
            list,
            added: count(|from, _| !from),
            removed: count(|_, to| !to),
            changed: count(|from, to| from && to),
            first: changes
                .iter()
                .take(FIRST)
                .map(|(n, from, to)| format!("{}{n}", sign(*from, *to)))
                .collect(),
        });
    }
    found
}

fn value(thing: &impl Serialize) -> Value {
    let mut value = whole(thing);
    // The seating follows from the changes of backends.
    if let Value::Object(fields) = &mut value {
        fields.remove("seating");
    }
    value
}

fn whole(thing: &impl Serialize) -> Value {
    serde_json::to_value(thing).expect("model types have text keys and no failing serialisers")
}

/// A service's own settings, flattened to dotted names.
fn settings(service: &Service) -> BTreeMap<String, Value> {
    let Value::Object(mut all) = value(service) else { return BTreeMap::new() };
    all.remove("backends");
    let parts = ["health", "replica", "regions"].map(|part| (part, all.remove(part)));
    let mut flat: BTreeMap<String, Value> = all.into_iter().collect();
    for (part, fields) in parts {
        if let Some(Value::Object(fields)) = fields {
            flat.extend(fields.into_iter().map(|(k, v)| (format!("{part}.{k}"), v)));
        }
    }
    flat
}

fn service_differences(name: &Name, old: &Service, new: &Service, found: &mut Vec<Difference>) {
    let before = found.len();
    set_differences(name, None, settings(old), settings(new), found);
    for (backend, from) in &old.backends {
        let id = Some(backend.clone());
        match new.backends.get(backend) {
            None => found.push(Difference::Remove { service: name.clone(), backend: id, from: value(from) }),
            Some(to) if to != from => {
                let fields = |v| match v {
                    Value::Object(map) => map.into_iter().collect(),
                    _ => BTreeMap::new(),
                };
                set_differences(name, Some(backend), fields(value(from)), fields(value(to)), found);
            }
            Some(_) => {}
        }
    }
    for (backend, to) in &new.backends {
        if !old.backends.contains_key(backend) {
            found.push(Difference::Add {
                service: name.clone(),
                backend: Some(backend.clone()),
                to: value(to),
            });
        }
    }
    // No change that the seating follows from, so an operator set it.
    if found.len() == before {
        let (from, to) = (whole(&old.seating), whole(&new.seating));
        let (service, field) = (name.clone(), "seating".to_owned());
        found.push(Difference::Set { service, backend: None, field, from, to });
    }
}

fn set_differences(
    service: &Name,
    backend: Option<&Name>,
    mut old: BTreeMap<String, Value>,
    new: BTreeMap<String, Value>,
    found: &mut Vec<Difference>,
) {
    let mut set = |field, from, to| {
        if from != to {
            found.push(Difference::Set {
                service: service.clone(),
                backend: backend.cloned(),
                field,
                from,
                to,
            });
        }
    };
    for (field, to) in new {
        let from = old.remove(&field).unwrap_or(Value::Null);
        set(field, from, to);
    }
    for (field, from) in old {
        set(field, from, Value::Null);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::model::generate::desired;
    use serde_json::json;

    fn state(v: Value) -> Desired {
        serde_json::from_value(json!({ "services": v })).unwrap()
    }

    proptest::proptest! {
        #[test]
        fn states_that_differ_in_anything_have_a_difference(a in desired(), b in desired(), at in 0..6u8) {
            proptest::prop_assert_eq!(differences(&a, &b).is_empty(), a == b);
            let Desired { services, regions, guard } = b;
            for one in [
                Desired { services, ..a.clone() },
                Desired { regions, ..a.clone() },
                Desired { guard, ..a.clone() },
            ] {
                proptest::prop_assert_eq!(differences(&a, &one).is_empty(), a == one);
            }
            let mut seated = a.clone();
            if let Some(service) = seated.service_mut(&format!("s{at}").parse().unwrap()) {
                service.seating.push((99, 1));
                let text: Vec<String> = differences(&a, &seated).iter().map(ToString::to_string).collect();
                proptest::prop_assert_eq!(text.len(), 1);
                proptest::prop_assert!(text[0].contains(": seating "), "{:?}", text);
            }
        }
    }

    #[test]
    fn reports_added_removed_and_set() {
        let old = state(json!({
            "gone": {"vip": "10.0.0.9", "port": 1, "protocol": "udp"},
            "web": {"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "table_size": 251,
                "health": {"kind": "none"},
                "backends": {"a": {"address": "10.1.0.1"}, "b": {"address": "10.1.0.2"}}},
        }));
        let new = state(json!({
            "new": {"vip": "10.0.0.8", "port": "any", "protocol": "tcp"},
            "web": {"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "health": {"kind": "http"},
                "backends": {"a": {"address": "10.1.0.1", "weight": 5}, "c": {"address": "10.1.0.3"}}},
        }));
        let found = differences(&old, &new);
        let text: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "- service gone",
                "web: health.kind none → http",
                "web: health.path unset → /",
                "web: health.status unset → [200,299]",
                "web: table_size 251 → unset",
                "web/a: weight 1 → 5",
                "- backend web/b",
                "+ backend web/c",
                "+ service new",
            ]
        );
        assert!(differences(&new, &new).is_empty());
        let back: Vec<Difference> = serde_json::from_value(value(&found)).unwrap();
        assert_eq!(back, found);
    }

    #[test]
    fn a_roll_out_is_one_readable_line() {
        let with = |rollout: Value| {
            state(json!({"chat": {"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "rollout": rollout}}))
        };
        let rollout = |more: Value| {
            let mut all = json!({"model": "m", "version": "v2", "permille": 50, "since_ms": 1});
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            with(all)
        };
        let line = |old: &Desired, new: &Desired| {
            let found = differences(old, new);
            assert_eq!(found.len(), 1, "{found:?}");
            found[0].to_string()
        };
        let (none, start) = (with(Value::Null), rollout(json!({})));
        assert_eq!(line(&none, &start), "chat: roll-out of v2 of m at 5 %");
        let east = rollout(json!({"regions": ["east"]}));
        assert_eq!(line(&none, &east), "chat: roll-out of v2 of m at 5 % in east");
        let wider = rollout(json!({"regions": ["east", "west"], "permille": 200}));
        assert_eq!(line(&east, &wider), "chat: roll-out of v2 of m: 5 % in east → 20 % in east, west");
        let aborted = rollout(json!({"state": "aborted", "reason": "slow"}));
        assert_eq!(line(&start, &aborted), "chat: roll-out of v2 of m: aborted (slow)");
        assert_eq!(line(&aborted, &none), "chat: roll-out of v2 of m cleared");
        let judged = rollout(json!({"least_requests": 7}));
        assert_eq!(line(&start, &judged), "chat: roll-out of v2 of m: least_requests 20 → 7");
        let next = rollout(json!({"version": "v3"}));
        assert_eq!(line(&start, &next), "chat: roll-out of v3 of m at 5 % replaces that of v2 of m");
    }
}
