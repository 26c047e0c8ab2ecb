//! Rules for a desired state.
//!
//! Input: a [`Desired`]. Output: every violated rule, so that an operator can fix a file in one go.
//! Called before anything is stored, by the API and by `lbctl config check`.

use super::{Desired, Name, Ports, Protocol, RegionState, Service, guard::Guard, nearest, region_list};
use lb_common::limits::RANGES_PER_VIP;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

/// A violated rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Two services would take the same packets.
    #[error(
        "services {first} and {second} overlap: both take {vip} {protocol} port {port}; change one of the ports or remove one"
    )]
    Overlap {
        /// One of the services.
        first: Name,
        /// The other service.
        second: Name,
        /// Their VIP.
        vip: IpAddr,
        /// Their protocol.
        protocol: Protocol,
        /// Ports of the second service.
        port: Ports,
    },
    /// A setting is out of its range or contradicts another.
    #[error("service {service}: {what}")]
    Setting {
        /// Name of the service.
        service: Name,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// The deny or allow list is invalid.
    #[error("{what}")]
    Guard {
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A setting of a backend is out of its range or contradicts another.
    #[error("backend {service}/{backend}: {what}")]
    Backend {
        /// Service.
        service: Name,
        /// Backend.
        backend: Name,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A region is set in a way that is not allowed.
    #[error("region {region}: {what}")]
    Region {
        /// Region.
        region: Name,
        /// What is wrong, and what would be right.
        what: String,
    },
}

/// Subject of a violated rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    /// A service; of an overlap, the second one.
    Service(&'a Name),
    /// A backend of a service.
    Backend(&'a Name, &'a Name),
    /// A region.
    Region(&'a Name),
    /// The deny and allow lists.
    Lists,
}

impl Invalid {
    /// Subject of the rule.
    pub fn subject(&self) -> Subject<'_> {
        match self {
            Self::Overlap { second, .. } => Subject::Service(second),
            Self::Setting { service, .. } => Subject::Service(service),
            Self::Backend { service, backend, .. } => Subject::Backend(service, backend),
            Self::Region { region, .. } => Subject::Region(region),
            Self::Guard { .. } => Subject::Lists,
        }
    }
}

impl Desired {
    /// Checks all rules: overlaps first, then by service name; empty if the state is valid.
    pub fn check(&self) -> Vec<Invalid> {
        let mut found = Vec::new();
        self.check_ports(&mut found);
        for (name, service) in &self.services {
            service.check(name, &mut found);
            self.check_names(name, service, &mut found);
        }
        self.check_drains(&mut found);
        found.extend(self.guard.problem(&Guard::default()).map(|what| Invalid::Guard { what }));
        found
    }

    /// Checks the differences to `old`, which is known to be valid, so that a change of one service among
    /// thousands costs only that one.
    pub fn check_change(&self, old: &Self) -> Vec<Invalid> {
        let changed = || self.services.iter().filter(|(name, s)| old.services.get(*name) != Some(s));
        let mut found = Vec::new();
        let place = |s: &Service| (s.vip, s.protocol, s.port);
        if changed().any(|(name, s)| old.services.get(name).map(|s| place(s)) != Some(place(s))) {
            self.check_ports(&mut found);
        }
        for (name, service) in changed() {
            service.check(name, &mut found);
        }
        let other_regions = self.regions.keys().ne(old.regions.keys());
        for (name, service) in &self.services {
            if other_regions || old.services.get(name) != Some(service) {
                self.check_names(name, service, &mut found);
            }
        }
        if self.regions != old.regions {
            self.check_drains(&mut found);
        }
        found.extend(self.guard.problem(&old.guard).map(|what| Invalid::Guard { what }));
        found
    }

    /// Only one region may drain at a time: two might be all there are.
    fn check_drains(&self, found: &mut Vec<Invalid>) {
        let mut draining = self.regions.iter().filter(|(_, r)| r.state == RegionState::Draining);
        let Some((first, _)) = draining.next() else { return };
        for (region, _) in draining {
            let what = format!(
                "it cannot drain while {first} drains, because both might be gone at once: run `lbctl region undrain {first}` first"
            );
            found.push(Invalid::Region { region: region.clone(), what });
        }
    }

    /// Once regions are declared, every region that is used must be declared.
    fn check_names(&self, name: &Name, service: &Service, found: &mut Vec<Invalid>) {
        if self.regions.is_empty() {
            return;
        }
        let unknown = |region: &Name| -> Option<String> {
            if self.regions.contains_key(region) {
                return None;
            }
            let hint = match nearest(region.as_str(), self.regions.keys().map(Name::as_str)) {
                Some(near) => format!("did you mean {near}? `lbctl region add {region}` declares it"),
                None => format!(
                    "known regions: {}; add it with [[region]] or `lbctl region add {region}`",
                    region_list(self.regions.keys())
                ),
            };
            Some(format!("region {region} is not declared; {hint}"))
        };
        let rules = service.regions.iter();
        let named = rules.flat_map(|rules| rules.allowed.iter().flatten().chain(rules.weights.keys()));
        let named = named.chain(service.rollout.iter().flat_map(|rollout| &rollout.regions));
        let mut seen = BTreeSet::new();
        for what in named.filter(|region| seen.insert(*region)).filter_map(unknown) {
            found.push(Invalid::Setting { service: name.clone(), what });
        }
        for (backend, b) in &service.backends {
            if let Some(what) = b.region.as_ref().and_then(unknown) {
                found.push(Invalid::Backend { service: name.clone(), backend: backend.clone(), what });
            }
        }
    }

    /// Finds overlaps by sorting each VIP's ports: O(n log n) in the number of services.
    fn check_ports(&self, found: &mut Vec<Invalid>) {
        let mut exact: HashMap<(IpAddr, Protocol, Ports), &Name> = HashMap::new();
        let mut ranges: BTreeMap<(IpAddr, Protocol), Vec<(u16, u16, &Name)>> = BTreeMap::new();
        let mut per_vip: BTreeMap<IpAddr, usize> = BTreeMap::new();
        let mut overlap = |first: &Name, second: &Name, s: &Service| {
            let (first, second) = (first.clone(), second.clone());
            found.push(Invalid::Overlap { first, second, vip: s.vip, protocol: s.protocol, port: s.port });
        };
        for (name, s) in &self.services {
            if let Ports::Range(low, high) = s.port {
                ranges.entry((s.vip, s.protocol)).or_default().push((low, high, name));
                *per_vip.entry(s.vip).or_default() += 1;
            } else if let Some(first) = exact.insert((s.vip, s.protocol, s.port), name) {
                overlap(first, name, s);
            }
        }
        for list in ranges.values_mut() {
            list.sort();
            // The range so far that ends last: a range that overlaps any earlier one overlaps it.
            let mut widest: Option<(u16, &Name)> = None;
            for &(low, high, name) in list.iter() {
                if let Some((end, first)) = widest
                    && low <= end
                {
                    let (first, second) = if first < name { (first, name) } else { (name, first) };
                    overlap(first, second, &self.services[second]);
                }
                if widest.is_none_or(|(end, _)| high > end) {
                    widest = Some((high, name));
                }
            }
        }
        for ((vip, _), list) in &ranges {
            if let Some(count) = per_vip.remove(vip).filter(|&n| n > RANGES_PER_VIP) {
                let what = format!(
                    "VIP {vip} has {count} port ranges, at most {RANGES_PER_VIP} are possible: join some, or use any"
                );
                found.push(Invalid::Setting { service: list[list.len() - 1].2.clone(), what });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn service(json: &str) -> Service {
        serde_json::from_str(json).unwrap()
    }

    fn desired(services: &[(&str, &str)]) -> Desired {
        Desired {
            services: services.iter().map(|(n, s)| (n.parse().unwrap(), service(s).into())).collect(),
            ..Desired::default()
        }
    }

    fn errors(services: &[(&str, &str)]) -> Vec<String> {
        desired(services).check().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_rule_names_the_thing_and_the_fix() {
        let cases: &[(&str, &str)] = &[
            (r#"{"vip":"0.0.0.0","port":80,"protocol":"tcp"}"#, "vip 0.0.0.0 is not a unicast address"),
            (r#"{"vip":"::ffff:10.0.0.1","port":80,"protocol":"tcp"}"#, "write 10.0.0.1"),
            (r#"{"vip":"127.0.0.1","port":80,"protocol":"tcp"}"#, "loopback"),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","table_size":100}"#,
                "table_size 100 is not one of [251,",
            ),
            (r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","panic_percent":101}"#, "101 is above 100"),
            (r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","udp_stateless":true}"#, "UDP services only"),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"udp","udp_stateless":true,"scheduler":"p2c"}"#,
                "which scheduler p2c needs: use maglev or source-hash",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","load_cap":5}"#,
                "for scheduler source-hash only",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","load_cap":0,"scheduler":"source-hash"}"#,
                "load_cap is out of range: 1 to",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","second_chance":true}"#,
                "second_chance needs mode gue",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","second_chance":true,"mode":"gue","scheduler":"rr"}"#,
                "when scheduler rr may place it on any backend",
            ),
            (
                r#"{"vip":"10.0.0.1","port":"any","protocol":"tcp","health":{"kind":"tcp"}}"#,
                "health needs a port",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","health":{"kind":"http","path":"x"}}"#,
                "must start with '/'",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","health":{"kind":"http","host":"a\r\nX: y"}}"#,
                "is not a valid host name",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","health":{"kind":"http","status":[300,200]}}"#,
                "not a valid range within",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","backends":{"a":{"address":"10.0.0.2","weight":0}}}"#,
                "all weights are 0",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","backends":{"a":{"address":"10.0.0.1"}}}"#,
                "backend s/a: address 10.0.0.1 is the service's own VIP",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","backends":{"a":{"address":"10.0.0.2","weight":65536}}}"#,
                "weight 65536 is above 65535",
            ),
            (
                r#"{"vip":"fd00::1","port":80,"protocol":"tcp","backends":{"a":{"address":"10.0.0.2"}}}"#,
                "not carried in IPv4: give an IPv6 address",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","mode":"nat",
                    "backends":{"a":{"address":"fd00::2"}}}"#,
                "mode nat does not translate between them: give an IPv4 address",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","backends":{"a":{"address":"10.0.0.2","port":8080}}}"#,
                "port is for mode nat only",
            ),
            (
                r#"{"vip":"10.0.0.1","port":"1-9","protocol":"tcp","mode":"nat",
                    "backends":{"a":{"address":"10.0.0.2","port":8080}}}"#,
                "port needs a service with exactly one port, but the service has 1-9",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","mode":"local",
                    "backends":{"a":{"address":"10.0.0.2"},"b":{"address":"127.0.0.1"}}}"#,
                "at most one backend",
            ),
            (
                r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp",
                    "backends":{"a":{"address":"10.0.0.2"},"b":{"address":"10.0.0.2"}}}"#,
                "backend s/b: address 10.0.0.2 is already that of backend a",
            ),
        ];
        for (json, expected) in cases {
            let found = errors(&[("s", json)]);
            assert!(found.len() == 1 && found[0].contains(expected), "{json}: {found:?}");
        }
    }

    #[test]
    fn a_change_is_checked_where_it_differs() {
        let good = r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp"}"#;
        let old = desired(&[("a", good), ("b", r#"{"vip":"10.0.0.2","port":80,"protocol":"tcp"}"#)]);
        for (services, count) in [
            (vec![("a", good)], 0),
            (vec![("a", good), ("b", r#"{"vip":"10.0.0.2","port":80,"protocol":"tcp","table_size":3}"#)], 1),
            (vec![("a", good), ("b", r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp"}"#)], 1),
            (vec![("a", good), ("b", r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","table_size":3}"#)], 2),
            (
                vec![
                    ("a", good),
                    ("c", good),
                    ("d", r#"{"vip":"10.0.0.3","port":80,"protocol":"tcp","seed":1}"#),
                ],
                1,
            ),
        ] {
            let new = desired(&services);
            assert_eq!(new.check_change(&old), new.check(), "{services:?}");
            assert_eq!(new.check().len(), count, "{services:?}");
        }
    }

    #[test]
    fn a_v4_service_may_have_v6_backends() {
        let json = r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp","backends":{"a":{"address":"fd00::2"}}}"#;
        assert_eq!(errors(&[("s", json)]), [""; 0]);
    }

    #[test]
    fn overlaps_are_found_only_at_the_same_exactness() {
        let of = |port: &str| format!(r#"{{"vip":"10.0.0.1","port":"{port}","protocol":"tcp"}}"#);
        let check = |ports: &[&str]| {
            let all: Vec<_> = ports.iter().enumerate().map(|(i, p)| (format!("s{i:02}"), of(p))).collect();
            errors(&all.iter().map(|(n, s)| (n.as_str(), s.as_str())).collect::<Vec<_>>())
        };
        assert!(check(&["80", "1-100", "any"]).is_empty());
        assert!(check(&["1-100", "101-200"]).is_empty());
        assert_eq!(check(&["80", "80"]).len(), 1);
        assert_eq!(check(&["any", "any"]).len(), 1);
        assert!(check(&["50-150", "1-100"])[0].starts_with("services s00 and s01 overlap"));
        // A range nested in a wide one that does not precede it directly.
        assert!(check(&["1-1000", "2-3", "500-600"]).len() == 2);
        let many: Vec<String> = (0..17).map(|i| format!("{}-{}", i * 10 + 1, i * 10 + 5)).collect();
        let found = check(&many.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(found.len() == 1 && found[0].contains("17 port ranges, at most 16"), "{found:?}");
    }

    #[test]
    fn thousands_of_services_are_checked_in_no_time() {
        let one = service(r#"{"vip":"10.0.0.1","port":1,"protocol":"tcp"}"#);
        let services = (0..20_000u32).map(|i| {
            let vip = IpAddr::from((0x0a00_0000 + i / 100 + 1).to_be_bytes());
            let port = Ports::One((i % 100 + 1) as u16);
            (format!("s{i}").parse().unwrap(), Service { vip, port, ..one.clone() }.into())
        });
        let desired = Desired { services: services.collect(), ..Desired::default() };
        let start = Instant::now();
        assert!(desired.check().is_empty());
        // A quadratic check takes minutes here, unoptimised.
        assert!(start.elapsed().as_secs() < 5);
    }
}
