//! Who owns which field of the desired state: the file that was loaded, or whoever changed it since.
//!
//! A file that is loaded again overwrites only what changed in the file since it was last loaded. So a reload keeps what
//! `lbctl` changed: a drain, a weight, a service. Pure; called when `lbd` loads its configuration file.

use crate::desired::model::Desired;
use serde_json::{Map, Value};

type JsonFields = Map<String, Value>;

/// Merges a file into a state. `before`: the file when it was last loaded. What is the same in the file as before is left
/// as it is in the state, with or without such a field; what differs is taken from the file.
///
/// # Errors
/// The merged state has contradicting fields.
pub fn merge(before: &Desired, file: &Desired, state: &Desired) -> Result<Desired, serde_json::Error> {
    let fields = |one: &Desired| serde_json::to_value(one).map(object);
    let (before, file, state) = (fields(before)?, fields(file)?, fields(state)?);
    let mut merged = JsonFields::new();
    for field in ["services", "regions"] {
        let of = |all: &JsonFields| object(all.get(field).cloned().unwrap_or_default());
        // Services, their fields, and the backends among those; their fields. Regions are taken as a whole.
        let levels = if field == "services" { SERVICES } else { 1 };
        merged.insert(field.to_owned(), merge_fields(&of(&before), &of(&file), &of(&state), levels).into());
    }
    // No file has them.
    merged.extend(state.get("guard").map(|guard| ("guard".to_owned(), guard.clone())));
    serde_json::from_value(Value::Object(merged))
}

/// Levels of maps below the services: names, fields, names of backends, fields of backends.
const SERVICES: u32 = 4;

fn object(value: Value) -> JsonFields {
    match value {
        Value::Object(fields) => fields,
        _ => JsonFields::new(),
    }
}

/// Merges maps whose values are merged for `levels` levels, and compared as a whole below.
fn merge_fields(before: &JsonFields, file: &JsonFields, state: &JsonFields, levels: u32) -> JsonFields {
    let mut merged = state.clone();
    for name in before.keys().chain(file.keys()) {
        let new = file.get(name);
        if before.get(name) == new {
            continue;
        }
        // Below the fields of a service, only its backends are maps of things with names.
        let goes_deeper = levels > 1 && (levels != 3 || name == "backends");
        match (new, state.get(name)) {
            (None, _) => {
                merged.remove(name);
            }
            (Some(Value::Object(new)), Some(Value::Object(state))) if goes_deeper => {
                let before = object(before.get(name).cloned().unwrap_or_default());
                merged.insert(name.clone(), merge_fields(&before, new, state, levels - 1).into());
            }
            (Some(new), _) => {
                merged.insert(name.clone(), new.clone());
            }
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::super::File;
    use super::*;
    use crate::desired::model::BackendState;

    fn state(text: &str) -> Desired {
        File::parse(text).expect("the test's text is right").desired.expect("it has services")
    }

    const FILE: &str = r#"
[[service]]
name = "web"
vip = "10.0.0.1"
port = 80
protocol = "tcp"
scheduler = "maglev"
[service.health]
kind = "http"
path = "/"
[[service.backend]]
name = "w1"
address = "10.1.0.1"
weight = 3
[[service.backend]]
name = "w2"
address = "10.1.0.2"
"#;

    /// What `lbctl` made of it.
    fn operated() -> Desired {
        let mut now = state(FILE);
        let name = "web".parse().expect("a name");
        let web = now.service_mut(&name).expect("it exists");
        let w1 = web.backends.get_mut(&"w1".parse().expect("a name")).expect("it exists");
        (w1.state, w1.weight) = (BackendState::Draining, 7);
        web.drain_s = 99;
        let copy = web.clone();
        now.services.insert("added".parse().expect("a name"), copy.into());
        now
    }

    #[test]
    fn an_unchanged_file_changes_nothing() {
        assert_eq!(merge(&state(FILE), &state(FILE), &operated()).expect("it fits"), operated());
        let without = state(&FILE[..FILE.find("[[service.backend]]\nname = \"w2\"").expect("it is there")]);
        assert_eq!(
            merge(&state(FILE), &state(FILE), &without).expect("it fits"),
            without,
            "removed by lbctl"
        );
    }

    #[test]
    fn only_what_changed_in_the_file_is_overwritten() {
        let changed = FILE.replace("weight = 3", "weight = 4").replace("path = \"/\"", "path = \"/live\"");
        let merged = merge(&state(FILE), &state(&changed), &operated()).expect("it fits");
        let web = &merged.services[&"web".parse().expect("a name")];
        let w1 = &web.backends[&"w1".parse().expect("a name")];
        assert_eq!((w1.weight, w1.state), (4, BackendState::Draining), "the weight is the file's again");
        assert_eq!(web.drain_s, 99);
        assert_eq!(web.health, state(&changed).services.values().next().expect("one").health);
        assert!(merged.services.contains_key(&"added".parse().expect("a name")));
    }

    #[test]
    fn what_the_file_adds_and_removes_is_added_and_removed() {
        let more = format!("{FILE}[[service.backend]]\nname = \"w3\"\naddress = \"10.1.0.3\"\n");
        let merged = merge(&state(FILE), &state(&more), &operated()).expect("it fits");
        assert_eq!(merged.services[&"web".parse().expect("a name")].backends.len(), 3);
        let merged = merge(&state(&more), &state(FILE), &merged).expect("it fits");
        assert_eq!(merged, operated());
        let none = state("service = []");
        let merged = merge(&state(FILE), &none, &operated()).expect("it fits");
        let left: Vec<&str> = merged.services.keys().map(|name| name.as_str()).collect();
        assert_eq!(left, ["added"], "the file never had it");
        // A kind of check is replaced with all its settings, those by lbctl included.
        let mut now = operated();
        let web = now.service_mut(&"web".parse().expect("a name")).expect("it exists");
        web.health =
            serde_json::from_str(r#"{"kind":"http","path":"/","host":"by.lbctl"}"#).expect("it is right");
        let tcp = FILE.replace("kind = \"http\"\npath = \"/\"", "kind = \"tcp\"");
        let merged = merge(&state(FILE), &state(&tcp), &now).expect("it fits");
        let health = &merged.services[&"web".parse().expect("a name")].health;
        assert_eq!(health.kind.label(), "tcp");
    }
}
