//! Requests to the API, made at random, each with what it should change.

use super::environment::Random;
use lb_userspace::desired::{model::Desired, store::delta};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Regions of the simulated fleet.
pub const REGIONS: [&str; 2] = ["eu", "us"];
/// Services that requests name.
const SERVICES: u64 = 6;
/// Backends of a service that requests name.
const BACKENDS: u64 = 5;

macro_rules! kinds {
    ($($name:ident $label:literal,)*) => {
        /// Kinds of operations: rows of the coverage table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $($name,)* }

        impl Kind {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }
        }
    };
}

kinds! {
    ServiceAdd "service add",
    ServiceSet "service set",
    ServiceRemove "service remove",
    BackendAdd "backend add",
    BackendSet "backend set",
    BackendRemove "backend remove",
    BackendDrain "backend drain",
    BackendUndrain "backend undrain",
    RegionAdd "region add",
    RegionRemove "region remove",
    RegionDrain "region drain",
    RegionUndrain "region undrain",
    GuardChange "guard change",
    ConfigApply "config apply",
    Rollback "rollback",
    Rollout "roll-out",
    Restore "restore",
    Operate "operator's work",
    Lock "lock",
    HostDrain "host drain",
    Read "reads",
    Invalid "invalid body",
    Reader "by a reader",
    DryRun "dry run",
    Cancelled "caller leaves",
}

/// What a request should change.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Nothing of the desired state.
    Nothing,
    /// Sets a value at a path, which must not be there (`is_new`), or merges a patch into it; none removes it.
    Merge { path: Vec<String>, patch: Option<Value>, is_new: bool },
    /// Declares a region, and with the first one those in use.
    Declare { region: String },
    /// Changes a guard list.
    Guard { list: &'static str, add: Vec<String>, remove: Vec<String> },
    /// Replaces all services.
    Config { config: Value },
    /// Changes only roll-outs.
    Rollout,
    /// Brings back an earlier state.
    Rollback { to: u64 },
}

/// A request.
#[derive(Clone, Debug)]
pub struct Operation {
    pub kind: Kind,
    pub method: &'static str,
    pub path: String,
    pub body: Value,
    pub effect: Effect,
    /// Whether readers may try it as a dry run.
    pub has_dry_run: bool,
}

impl Operation {
    fn new(kind: Kind, method: &'static str, path: String, body: Value, effect: Effect) -> Self {
        Self { kind, method, path, body, effect, has_dry_run: true }
    }
}

fn service_name(random: &mut Random) -> String {
    format!("s{}", random.below(SERVICES))
}

/// Makes requests.
pub struct Operations<'a> {
    pub random: &'a mut Random,
    /// The newest state that is known.
    pub head: &'a Desired,
    pub revision: u64,
    /// Whether services have region rules.
    pub is_regional: bool,
    /// A backup, and its newest revision.
    pub backup: Option<&'a (u64, Value)>,
}

impl Operations<'_> {
    /// A request of this kind.
    pub fn make(&mut self, kind: Kind) -> Operation {
        match kind {
            Kind::ServiceAdd => {
                let (name, body) = self.service();
                let effect = self.merge(&["services", &name], Some(body.clone()), true);
                Operation::new(kind, "POST", format!("/v1/services/{name}"), body, effect)
            }
            Kind::ServiceSet => {
                let (name, patch) = (self.any_service(), self.service_patch());
                let effect = self.merge(&["services", &name], Some(patch.clone()), false);
                Operation::new(kind, "PATCH", format!("/v1/services/{name}"), patch, effect)
            }
            Kind::ServiceRemove => {
                let name = self.any_service();
                let effect = self.merge(&["services", &name], None, false);
                Operation::new(kind, "DELETE", format!("/v1/services/{name}"), Value::Null, effect)
            }
            Kind::BackendAdd
            | Kind::BackendSet
            | Kind::BackendRemove
            | Kind::BackendDrain
            | Kind::BackendUndrain => self.backend_operation(kind),
            Kind::RegionAdd | Kind::RegionRemove | Kind::RegionDrain | Kind::RegionUndrain => {
                self.region_operation(kind)
            }
            Kind::GuardChange => self.guard_change(),
            Kind::ConfigApply => self.config_apply(),
            Kind::Rollback => {
                let to = self.random.below(self.revision.max(1)) + 1;
                let effect = Effect::Rollback { to };
                Operation::new(kind, "POST", "/v1/rollback".to_owned(), json!({"revision": to}), effect)
            }
            Kind::Rollout => self.rollout(),
            Kind::Restore => {
                let (to, body) = self.backup.cloned().unwrap_or_default();
                let effect = Effect::Rollback { to };
                let made = Operation::new(kind, "POST", "/v1/store/restore".to_owned(), body, effect);
                Operation { has_dry_run: false, ..made }
            }
            Kind::Operate => self.operate(),
            Kind::Lock => {
                let body = json!({"reason": "work", "ttl_s": 5 + self.random.below(20)});
                let path = format!("/v1/locks/l{}", self.random.below(2));
                let made = Operation::new(kind, "POST", path, body, Effect::Nothing);
                Operation { has_dry_run: false, ..made }
            }
            Kind::HostDrain => {
                let verb = self.random.one_of(&["drain", "undrain"]);
                let body = if verb == "drain" { json!({"reason": "work"}) } else { Value::Null };
                let made = Operation::new(kind, "POST", format!("/v1/host/{verb}"), body, Effect::Nothing);
                Operation { has_dry_run: false, ..made }
            }
            Kind::Read => {
                let path = self.random.one_of(&[
                    "/v1/status",
                    "/v1/services",
                    "/v1/backends",
                    "/v1/config",
                    "/v1/history",
                    "/v1/store",
                    "/v1/store/backup",
                    "/v1/hosts",
                    "/v1/host",
                    "/v1/policy",
                    "/v1/regions",
                    "/v1/guard",
                    "/v1/locks",
                    "/v1/stats",
                    "/v1/rollouts",
                    "/v1/residency",
                ]);
                Operation::new(kind, "GET", path.to_owned(), Value::Null, Effect::Nothing)
            }
            Kind::Invalid => self.invalid(),
            Kind::Reader | Kind::DryRun | Kind::Cancelled => {
                let write = self.random.one_of(&[
                    Kind::ServiceAdd,
                    Kind::ServiceSet,
                    Kind::ServiceRemove,
                    Kind::BackendAdd,
                    Kind::BackendSet,
                    Kind::BackendRemove,
                    Kind::BackendDrain,
                    Kind::RegionAdd,
                    Kind::RegionDrain,
                    Kind::ConfigApply,
                    Kind::Rollback,
                    Kind::Rollout,
                    Kind::Restore,
                    Kind::Operate,
                    Kind::Lock,
                    Kind::HostDrain,
                    Kind::GuardChange,
                ]);
                Operation { kind, ..self.make(write) }
            }
        }
    }

    fn merge(&self, path: &[&str], patch: Option<Value>, is_new: bool) -> Effect {
        Effect::Merge { path: path.iter().map(|part| (*part).to_owned()).collect(), patch, is_new }
    }

    /// A service, mostly one that is there.
    fn any_service(&mut self) -> String {
        let all: Vec<String> = self.head.services.keys().map(ToString::to_string).collect();
        if all.is_empty() || self.random.percent(5) {
            return service_name(self.random);
        }
        all[self.random.below(all.len() as u64) as usize].clone()
    }

    fn service(&mut self) -> (String, Value) {
        let number = self.random.below(SERVICES);
        let protocol = if number % 3 == 2 { "udp" } else { "tcp" };
        let port =
            if number.is_multiple_of(2) { json!(80) } else { self.random.one_of(&[443, 8_443]).into() };
        let mut service = json!({
            "vip": format!("10.99.0.{}", 1 + number / 2),
            "port": port,
            "protocol": protocol,
            "drain_s": self.random.one_of(&[5, 20, 60]),
            "health": self.health(),
            "backends": {},
        });
        for _ in 0..self.random.one_of(&[0, 2, 3, 3, 4]) {
            let (name, backend) = self.backend(number);
            service["backends"][name] = backend;
        }
        delta::merge(&mut service, self.service_patch());
        (format!("s{number}"), service)
    }

    fn health(&mut self) -> Value {
        if self.random.percent(20) {
            return json!({"kind": "none"});
        }
        let (interval_ms, timeout_ms) = (self.random.one_of(&[200, 500]), self.random.one_of(&[100, 200]));
        json!({"kind": "tcp", "interval_ms": interval_ms, "timeout_ms": timeout_ms, "rise": 1, "fall": 2})
    }

    /// Some settings of a service.
    fn service_patch(&mut self) -> Value {
        let mut patch = json!({});
        if self.random.percent(40) {
            patch["scheduler"] = self.random.one_of(&["maglev", "p2c", "rr", "lc", "random"]).into();
        }
        if self.random.percent(30) {
            patch["mode"] = self.random.one_of(&["ipip", "gue"]).into();
        }
        if self.random.percent(40) {
            // The larger sizes do not fit everywhere.
            patch["table_size"] = self.random.weighted(&[(251, 6), (1_021, 3), (4_093, 1)]).into();
        }
        if self.random.percent(20) {
            patch["drain_s"] = self.random.one_of(&[5, 20, 60]).into();
        }
        if self.random.percent(10) {
            patch["seed"] = self.random.below(5).into();
        }
        if self.random.percent(15) {
            patch["health"] = self.health();
        }
        if self.random.percent(10) {
            patch["new_flow_rate"] = json!("100/s");
        }
        if self.random.percent(40) {
            patch["replica"] = if self.random.percent(20) {
                Value::Null
            } else {
                json!({"kind": "stream", "interval_ms": 200, "timeout_ms": 200})
            };
        }
        if self.is_regional && self.random.percent(40) {
            patch["regions"] = match self.random.below(4) {
                0 => Value::Null,
                1 => json!({"policy": "active-active", "allowed": ["eu"]}),
                2 => json!({"policy": "active-passive", "allowed": ["us", "eu"]}),
                _ => json!({"policy": "weighted", "weights": {"eu": 70, "us": 30}}),
            };
        }
        patch
    }

    fn backend(&mut self, service: u64) -> (String, Value) {
        let number = self.random.below(BACKENDS);
        // Names and addresses do not go together, so that names come back with other addresses.
        let address = format!("10.1.{service}.{}", 1 + self.random.below(BACKENDS));
        let mut backend =
            json!({"address": address, "weight": self.random.one_of(&[0, 1, 1, 1, 2, 2, 5, 5])});
        if self.is_regional && self.random.percent(80) {
            backend["region"] = self.random.one_of(&REGIONS).into();
        }
        (format!("b{number}"), backend)
    }

    fn any_backend(&mut self) -> (String, String) {
        let service = self.any_service();
        let of = self.head.services.iter().find(|(name, _)| name.as_str() == service);
        let all: Vec<String> =
            of.iter().flat_map(|(_, s)| s.backends.keys().map(ToString::to_string)).collect();
        let backend = if all.is_empty() || self.random.percent(5) {
            format!("b{}", self.random.below(BACKENDS))
        } else {
            all[self.random.below(all.len() as u64) as usize].clone()
        };
        (service, backend)
    }

    fn backend_operation(&mut self, kind: Kind) -> Operation {
        let (service, backend) = self.any_backend();
        let path = |backend: &str| format!("/v1/services/{service}/backends/{backend}");
        let at = |backend: &str| {
            vec!["services".to_owned(), service.clone(), "backends".to_owned(), backend.to_owned()]
        };
        let (method, path, body, effect) = match kind {
            Kind::BackendAdd => {
                let number = service[1..].parse().unwrap_or(0);
                let (name, body) = self.backend(number);
                let effect = Effect::Merge { path: at(&name), patch: Some(body.clone()), is_new: true };
                ("POST", path(&name), body, effect)
            }
            Kind::BackendSet => {
                let body = match self.random.below(3) {
                    0 => json!({"weight": self.random.below(4)}),
                    1 => json!({"state": self.random.one_of(&["up", "draining", "down"])}),
                    _ => json!({"weight": 1 + self.random.below(3), "state": "up"}),
                };
                let effect = Effect::Merge { path: at(&backend), patch: Some(body.clone()), is_new: false };
                ("PATCH", path(&backend), body, effect)
            }
            Kind::BackendRemove => {
                let effect = Effect::Merge { path: at(&backend), patch: None, is_new: false };
                ("DELETE", path(&backend), Value::Null, effect)
            }
            _ => {
                let (verb, state) =
                    if kind == Kind::BackendDrain { ("drain", "draining") } else { ("undrain", "up") };
                let patch = Some(json!({"state": state}));
                let effect = Effect::Merge { path: at(&backend), patch, is_new: false };
                ("POST", format!("{}/{verb}", path(&backend)), Value::Null, effect)
            }
        };
        Operation::new(kind, method, path, body, effect)
    }

    fn region_operation(&mut self, kind: Kind) -> Operation {
        let region = self.random.one_of(&["eu", "us", "asia"]);
        let path = format!("/v1/regions/{region}");
        let at = |patch: Option<Value>| {
            let path = vec!["regions".to_owned(), region.to_owned()];
            Effect::Merge { path, patch, is_new: false }
        };
        let state = |state: &str| Some(json!({ "state": state }));
        let (method, path, effect) = match kind {
            Kind::RegionAdd => ("POST", path, Effect::Declare { region: region.to_owned() }),
            Kind::RegionRemove => ("DELETE", path, at(None)),
            Kind::RegionDrain => ("POST", format!("{path}/drain?force=true"), at(state("draining"))),
            _ => ("POST", format!("{path}/undrain"), at(state("up"))),
        };
        Operation::new(kind, method, path, Value::Null, effect)
    }

    fn guard_change(&mut self) -> Operation {
        let list = self.random.one_of(&["deny", "allow"]);
        let prefix = format!("192.0.{}.0/24", self.random.below(6));
        let (add, remove) =
            if self.random.percent(70) { (vec![prefix], Vec::new()) } else { (Vec::new(), vec![prefix]) };
        let body = json!({"add": add, "remove": remove});
        let effect = Effect::Guard { list, add, remove };
        let path = format!("/v1/guard/{list}");
        Operation { has_dry_run: false, ..Operation::new(Kind::GuardChange, "POST", path, body, effect) }
    }

    fn rollout(&mut self) -> Operation {
        let service = self.any_service();
        let (path, body) = match self.random.below(3) {
            0 => {
                let permille = self.random.below(1_000);
                let body = json!({"services": [service], "model": "m", "version": "2", "permille": permille});
                ("/v1/rollouts".to_owned(), body)
            }
            _ => {
                let verb = self.random.one_of(&["step", "promote", "abort", "clear"]);
                let mut body = json!({"model": "m", "service": service, "force": verb == "clear"});
                if verb == "step" {
                    body["permille"] = self.random.below(1_000).into();
                }
                (format!("/v1/rollouts/{verb}"), body)
            }
        };
        Operation::new(Kind::Rollout, "POST", path, body, Effect::Rollout)
    }

    /// Work that needs the right to write and changes nothing of the desired state.
    fn operate(&mut self) -> Operation {
        let (method, path, body) = match self.random.below(5) {
            0 => ("DELETE", format!("/v1/locks/l{}?force=true", self.random.below(2)), Value::Null),
            1 => (
                "DELETE",
                format!("/v1/hosts/{}", self.random.one_of(&["eu-2", "us-1", "none"])),
                Value::Null,
            ),
            2 => ("POST", "/v1/store/accept".to_owned(), json!({"revision": self.revision})),
            3 => ("POST", "/v1/store/unretire".to_owned(), Value::Null),
            // To a place that cannot be filled.
            _ => ("POST", "/v1/store/migrate".to_owned(), json!({"to": "file:///dev/null/none"})),
        };
        let made = Operation::new(Kind::Operate, method, path, body, Effect::Nothing);
        Operation { has_dry_run: false, ..made }
    }

    fn config_apply(&mut self) -> Operation {
        let mut services = BTreeMap::new();
        for (name, service) in &self.head.services {
            if self.random.percent(85) {
                services.insert(name.to_string(), serde_json::to_value(&**service).unwrap_or_default());
            }
        }
        if self.random.percent(50) {
            let (name, service) = self.service();
            services.insert(name, service);
        }
        let config = json!({ "services": services });
        let body = json!({ "desired": config });
        let effect = Effect::Config { config };
        Operation::new(Kind::ConfigApply, "PUT", "/v1/config".to_owned(), body, effect)
    }

    fn invalid(&mut self) -> Operation {
        let (service, backend) = self.any_backend();
        let at = format!("/v1/services/{service}");
        let (method, path, body) = match self.random.below(9) {
            0 => ("POST", "/v1/services/new".to_owned(), json!({"vip": "10.0.0.1", "prot": 80})),
            1 => (
                "POST",
                "/v1/services/-x".to_owned(),
                json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp"}),
            ),
            2 => ("PATCH", at, json!({"drain_s": -1})),
            3 => ("PATCH", at, json!({"table_size": 252})),
            4 => ("PATCH", format!("{at}/backends/{backend}"), json!({"weight": 70_000})),
            5 => ("POST", format!("{at}/backends/bad"), json!({"address": "none"})),
            6 => ("PUT", "/v1/config".to_owned(), json!({"desired": {"services": {"x": {"vip": 5}}}})),
            7 => ("POST", "/v1/rollback".to_owned(), json!({"revision": 1_000_000})),
            _ => ("PATCH", at, json!([1, 2])),
        };
        Operation::new(Kind::Invalid, method, path, body, Effect::Nothing)
    }
}
