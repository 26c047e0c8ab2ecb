//! Exports a desired state as a configuration file, which [`super::File::parse`] reads back as the same state.

use crate::desired::model::{Backend, Desired, Region, RegionRules, Service, by_need};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Writes `[[region]]` and `[[service]]` tables in name order. Settings at their defaults are left out. Deny and allow
/// lists are not part of files: they may have a million entries, and `lbctl guard` changes and prints them.
pub fn export(desired: &Desired) -> String {
    export_with(desired, true)
}

/// As [`export`], without the positions that lbd gives backends in the tables: applied to the same state, the file
/// changes nothing; on another host the tables are dealt anew.
pub fn export_without_seats(desired: &Desired) -> String {
    export_with(desired, false)
}

fn export_with(desired: &Desired, with_seats: bool) -> String {
    let Desired { services, regions, guard: _ } = desired;
    let mut out = String::new();
    if services.is_empty() && !regions.is_empty() {
        // A file with regions only is refused, because it seems to leave the services out by mistake.
        line(&mut out, "service", &json!([]));
    }
    for (name, region) in regions {
        let separator = if out.is_empty() { "" } else { "\n" };
        let _ = writeln!(out, "{separator}[[region]]");
        line(&mut out, "name", &json!(name));
        changed(&mut out, object(region), &defaults::<Region>(json!({})));
    }
    for (name, service) in services {
        let separator = if out.is_empty() { "" } else { "\n" };
        let _ = writeln!(out, "{separator}[[service]]");
        line(&mut out, "name", &json!(name));
        let mut fields = object(service);
        fields.remove("backends");
        let fresh = Service { seating: Vec::new(), ..(**service).clone() };
        if !with_seats || service.seating == fresh.seating() {
            fields.remove("seating");
        }
        // A file without a size gets the size for its number of backends.
        if service.table_size == Some(by_need(service.backends.len())) {
            fields.remove("table_size");
        }
        let health = fields.remove("health");
        let replica = fields.remove("replica");
        let (regions, rollout) = (fields.remove("regions"), fields.remove("rollout"));
        let bare = json!({"vip": service.vip, "port": service.port, "protocol": service.protocol});
        let defaults = defaults::<Service>(bare);
        for key in ["vip", "port", "protocol"] {
            if let Some(value) = fields.remove(key) {
                line(&mut out, key, &value);
            }
        }
        changed(&mut out, fields, &defaults);
        if let Some(Value::Object(mut health)) = health
            && defaults.get("health") != Some(&Value::Object(health.clone()))
        {
            let _ = writeln!(out, "\n[service.health]");
            let kind = health.remove("kind").unwrap_or_default();
            line(&mut out, "kind", &kind);
            let defaults = self::defaults::<crate::desired::model::HealthCheck>(json!({ "kind": kind }));
            changed(&mut out, health, &defaults);
        }
        if let Some(Value::Object(mut replica)) = replica {
            let _ = writeln!(out, "\n[service.replica]");
            let kind = replica.remove("kind").unwrap_or_default();
            line(&mut out, "kind", &kind);
            let defaults = self::defaults::<crate::desired::model::ReplicaSource>(json!({ "kind": kind }));
            changed(&mut out, replica, &defaults);
        }
        if let Some(Value::Object(regions)) = regions {
            let _ = writeln!(out, "\n[service.regions]");
            changed(&mut out, regions, &self::defaults::<RegionRules>(json!({})));
        }
        if let Some(Value::Object(rollout)) = rollout {
            let _ = writeln!(out, "\n[service.rollout]");
            changed(&mut out, rollout, &Map::new());
        }
        for (name, backend) in &service.backends {
            let _ = writeln!(out, "\n[[service.backend]]");
            line(&mut out, "name", &json!(name));
            line(&mut out, "address", &json!(backend.address));
            let mut fields = object(backend);
            if !with_seats {
                fields.remove("seat");
            }
            changed(&mut out, fields, &defaults_of_backend(backend));
        }
    }
    out
}

fn defaults_of_backend(backend: &Backend) -> Map<String, Value> {
    defaults::<Backend>(json!({ "address": backend.address }))
}

/// Fields of `T` when only `bare` is given.
fn defaults<T: Serialize + DeserializeOwned>(bare: Value) -> Map<String, Value> {
    object(&serde_json::from_value::<T>(bare).expect("the required fields are given, and were valid"))
}

fn object(thing: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(thing) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn changed(out: &mut String, fields: Map<String, Value>, defaults: &Map<String, Value>) {
    for (key, value) in fields {
        if defaults.get(&key) != Some(&value) {
            line(out, &key, &value);
        }
    }
}

fn line(out: &mut String, key: &str, value: &Value) {
    // Model values are text, numbers, booleans, arrays of numbers and tables of text, which are all TOML values.
    if let Ok(value) = toml::Value::try_from(value) {
        let _ = writeln!(out, "{key} = {value}");
    }
}
