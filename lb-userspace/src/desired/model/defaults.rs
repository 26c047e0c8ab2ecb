//! Defaults of new services that would change what existing ones do, written into the state when it is changed.
//!
//! A service that names no health check gets one, and a panic threshold above 0, when it is created: [`api::Control`]
//! writes both into the state, as an operator would, so that every host and version reads the same. Services that an
//! earlier version stored without them keep what they have, also when a file that does not name them is applied again.
//! Pure.
//!
//! [`api::Control`]: crate::serve::api::Control

use super::{Desired, ForwardingMode, HealthCheck, HealthKind, Ports, Protocol, Service, Via};
use std::sync::Arc;

/// Panic threshold of a new service that names none, in percent. It is low: a few dead workers of ten are dead, but if
/// nearly all fail at once, the check or this host is more likely wrong than they are.
pub const PANIC_PERCENT: u8 = 10;

impl ForwardingMode {
    /// Whether probes can take the path of traffic by a tunnel of their own.
    pub fn has_probe_tunnel(self) -> bool {
        matches!(self, Self::Ipip | Self::Gue | Self::L2)
    }
}

impl Service {
    /// The check of a new service that names none: a TCP connection, where one can be made to the service's own port.
    /// Replica state is a check of its own.
    fn default_check(&self) -> HealthKind {
        let can = self.protocol == Protocol::Tcp
            && matches!(self.port, Ports::One(_))
            && self.mode != ForwardingMode::Local
            && self.replica.is_none();
        if can { HealthKind::Tcp } else { HealthKind::None }
    }

    /// The path of a new check that names none: that of traffic, if it asks the port that traffic goes to.
    fn default_via(&self) -> Via {
        let own = if let Ports::One(port) = self.port { Some(port) } else { None };
        let is_own = self.protocol == Protocol::Tcp && self.health.port.is_none_or(|port| Some(port) == own);
        if self.mode.has_probe_tunnel() && is_own { Via::Tunnel } else { Via::Unset }
    }

    /// Fills in what was not named. `before` is the service of this name in the state that is changed.
    fn fill_in(&mut self, before: Option<&Self>) {
        if self.panic_percent.is_none() {
            let had_none = before.is_some_and(|before| before.panic_threshold() == 0);
            self.panic_percent = Some(if had_none { 0 } else { PANIC_PERCENT });
        }
        if self.health.is_unset() {
            self.health = match before.map(|before| &before.health).filter(|health| health.kind.is_none()) {
                Some(none) => HealthCheck { kind: HealthKind::None, ..none.clone() },
                None => HealthCheck { kind: self.default_check(), ..HealthCheck::default() },
            };
        }
        if self.health.kind.is_none() {
            return;
        }
        let checked = before.filter(|before| !before.health.kind.is_none());
        let via_before = checked.map(|before| before.health.via);
        self.health.via = match (self.health.via, via_before) {
            // Written by an earlier version, or said to be direct: both mean the same.
            (Via::Unset | Via::Direct, Some(Via::Unset)) => Via::Unset,
            (Via::Unset, Some(Via::Direct)) => Via::Direct,
            (Via::Unset, _) => self.default_via(),
            // The mode has changed to one in which direct probes take the path of traffic.
            (Via::Tunnel, Some(Via::Tunnel)) if !self.mode.has_probe_tunnel() => Via::Unset,
            (named, _) => named,
        };
    }
}

impl Desired {
    /// Fills in what new and changed services do not name.
    pub fn assign_defaults(&mut self, old: &Self) {
        for (name, service) in &mut self.services {
            let before = old.services.get(name);
            if before.is_some_and(|before| Arc::ptr_eq(before, service)) {
                continue;
            }
            let mut filled = (**service).clone();
            filled.fill_in(before.map(|before| &**before));
            if filled != **service {
                *service = Arc::new(filled);
            }
        }
    }

    /// Names what follows from its absence, for a file: where it is applied, a new service would get other defaults.
    pub fn name_defaults(&mut self) {
        for service in self.services.values_mut() {
            let mut named = (**service).clone();
            named.panic_percent = Some(named.panic_threshold());
            if named.health.is_unset() {
                named.health.kind = HealthKind::None;
            }
            if !named.health.kind.is_none()
                && named.health.via == Via::Unset
                && named.default_via() == Via::Tunnel
            {
                named.health.via = Via::Direct;
            }
            if named != **service {
                *service = Arc::new(named);
            }
        }
    }

    /// Forgets what an earlier version wrote for settings that `file` does not name: it named none of them either.
    pub fn forget_unnamed(&mut self, file: &Self) {
        for (name, service) in &mut self.services {
            let Some(of_file) = file.services.get(name) else { continue };
            let mut named = (**service).clone();
            if of_file.panic_percent.is_none() && named.panic_percent == Some(0) {
                named.panic_percent = None;
            }
            if of_file.health.is_unset() && named.health == HealthCheck::default() {
                named.health = HealthCheck::unset();
            }
            if named != **service {
                *service = Arc::new(named);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::model::Name;

    fn name() -> Name {
        "s".parse().expect("a name")
    }

    fn state(more: &str) -> Desired {
        let json = format!(r#"{{"services":{{"s":{{"vip":"10.0.0.1","port":80,"protocol":"tcp"{more}}}}}}}"#);
        serde_json::from_str(&json).expect("a state")
    }

    /// Kind, path and panic threshold after a change from `old` to `new`, as they are stored.
    fn stored(old: Option<&str>, new: &str) -> (String, Option<String>, u64) {
        let old = old.map(state).unwrap_or_default();
        let mut new = state(new);
        new.assign_defaults(&old);
        let json = serde_json::to_value(&*new.services[&name()]).expect("plain data");
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let kind = text(&json["health"]["kind"]).expect("every stored service has a kind");
        (kind, text(&json["health"]["via"]), json["panic_percent"].as_u64().expect("a threshold"))
    }

    fn expect(kind: &str, via: Option<&str>, panic: u64) -> (String, Option<String>, u64) {
        (kind.to_owned(), via.map(str::to_owned), panic)
    }

    #[test]
    fn a_new_service_is_checked_through_its_tunnel() {
        for (new, expected) in [
            ("", expect("tcp", Some("tunnel"), 10)),
            (r#","mode":"nat""#, expect("tcp", None, 10)),
            (r#","mode":"local""#, expect("none", None, 10)),
            (r#","replica":{"kind":"stream"}"#, expect("none", None, 10)),
            (r#","panic_percent":0,"health":{"kind":"none"}"#, expect("none", None, 0)),
            (r#","health":{"kind":"http"}"#, expect("http", Some("tunnel"), 10)),
            (r#","health":{"kind":"http","via":"direct"}"#, expect("http", Some("direct"), 10)),
            (r#","health":{"kind":"http","port":8080}"#, expect("http", None, 10)),
            (r#","health":{"kind":"http","port":80}"#, expect("http", Some("tunnel"), 10)),
        ] {
            assert_eq!(stored(None, new), expected, "{new}");
        }
        let mut udp = state("");
        let service = Service { protocol: Protocol::Udp, ..(*udp.services[&name()]).clone() };
        udp.services.insert(name(), service.into());
        udp.assign_defaults(&Desired::default());
        assert!(udp.services[&name()].health.kind.is_none());
    }

    /// What versions before the defaults stored: no key is left out but `via`, if it is direct.
    #[test]
    fn a_service_that_an_earlier_version_stored_keeps_what_it_does() {
        let none = r#","panic_percent":0,"health":{"kind":"none"}"#;
        let http = r#","panic_percent":0,"health":{"kind":"http"}"#;
        for (old, new, expected) in [
            // The same file again, a changed one, and a change by lbctl.
            (none, "", expect("none", None, 0)),
            (none, r#","drain_s":5"#, expect("none", None, 0)),
            (none, none, expect("none", None, 0)),
            (http, r#","health":{"kind":"http"}"#, expect("http", None, 0)),
            (http, r#","health":{"kind":"http","via":"direct"}"#, expect("http", None, 0)),
            // A check that is new is made as a new service's.
            (none, r#","health":{"kind":"tcp"}"#, expect("tcp", Some("tunnel"), 0)),
            (http, r#","panic_percent":30,"health":{"kind":"none"}"#, expect("none", None, 30)),
            // A check that a file no longer names.
            (http, "", expect("tcp", None, 0)),
        ] {
            assert_eq!(stored(Some(old), new), expected, "{old} then {new}");
        }
        let new = r#","panic_percent":10,"health":{"kind":"tcp","via":"tunnel"}"#;
        assert_eq!(stored(Some(new), ""), expect("tcp", Some("tunnel"), 10));
        assert_eq!(stored(Some(new), &format!(r#","mode":"nat"{new}"#)), expect("tcp", None, 10));
        assert_eq!(
            stored(Some(new), r#","health":{"kind":"tcp","via":"direct"}"#),
            expect("tcp", Some("direct"), 10)
        );
    }

    #[test]
    fn what_is_exported_stays_the_same_where_it_is_applied() {
        for old in [
            r#","panic_percent":0,"health":{"kind":"none"}"#,
            r#","panic_percent":0,"health":{"kind":"http"}"#,
            r#","panic_percent":10,"health":{"kind":"tcp","via":"tunnel"}"#,
        ] {
            let mut exported = state(old);
            exported.name_defaults();
            let mut applied = exported.clone();
            applied.assign_defaults(&Desired::default());
            assert_eq!(applied, exported, "{old}");
            let mut again = exported.clone();
            again.assign_defaults(&state(old));
            assert_eq!(again, state(old), "applied where it came from, it changes nothing");
        }
    }

    #[test]
    fn a_file_from_before_the_defaults_is_unchanged_if_its_text_is() {
        let mut before = state(r#","panic_percent":0,"health":{"kind":"none"}"#);
        before.forget_unnamed(&state(""));
        assert_eq!(before, state(""));
        let mut before = state(r#","panic_percent":0,"health":{"kind":"none"}"#);
        let file = state(r#","panic_percent":0,"health":{"kind":"none"}"#);
        before.forget_unnamed(&file);
        assert_eq!(before, file);
    }
}
