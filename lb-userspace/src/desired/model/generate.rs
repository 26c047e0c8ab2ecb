//! Desired states for tests, in which every field is set.
//!
//! Tests that store, export, compare or back up states take them from here, so that they fail for a field that the
//! tested code forgets. Structs are written out in full: a new field must not compile before it is generated too, and a
//! test below fails if it always has its default. Only with the feature `test-support`.

use super::{
    Backend, BackendState, Desired, ForwardingMode, GrpcCheck, Guard, HealthCheck, HealthKind, HttpCheck,
    Name, OnDown, Ports, Protocol, Quantity, QuicConfig, Rate, Region, RegionPolicy, RegionRules,
    RegionState, ReplicaSource, Rollout, RolloutState, Scheduler, Service, SourceKind, TlsCheck, Via,
    WhenAllDown,
};
use lb_common::limits::TABLE_SIZES;
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Number of kinds of services; between them they set every field.
const KINDS: u8 = 6;

/// Strategy: valid states; half of them with every field set, the others with some fields set.
pub fn desired() -> impl Strategy<Value = Desired> {
    (any::<u64>(), any::<bool>()).prop_map(|(seed, all)| state(seed, all))
}

/// One state; with `all`, every field is set.
pub fn state(seed: u64, all: bool) -> Desired {
    let mut draw = Draw { state: seed, all };
    let mut services = BTreeMap::new();
    for kind in 0..KINDS {
        if let Some(kind) = draw.maybe(kind) {
            services.insert(name(&format!("s{kind}")), draw.service(kind).into());
        }
    }
    Desired { services, regions: draw.regions(), guard: draw.guard() }
}

fn name(text: &str) -> Name {
    text.parse().expect("it is made of letters and digits")
}

/// A source of choices that depends on the seed only (splitmix64).
struct Draw {
    state: u64,
    all: bool,
}

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    /// A number from 1 to `limit`.
    fn count(&mut self, limit: u32) -> u32 {
        self.below(limit.into()) as u32 + 1
    }

    fn yes(&mut self) -> bool {
        self.all || self.below(2) == 1
    }

    fn maybe<T>(&mut self, value: T) -> Option<T> {
        self.yes().then_some(value)
    }

    fn maybe_count(&mut self, limit: u32) -> Option<u32> {
        let count = self.count(limit);
        self.maybe(count)
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    fn text(&mut self, what: &str) -> String {
        format!("{what}-{}", self.below(1_000))
    }

    /// Regions `r0` to `r2`, or none; one of them may drain.
    fn regions(&mut self) -> BTreeMap<Name, Region> {
        if !self.yes() {
            return BTreeMap::new();
        }
        let draining = self.maybe(()).map(|()| self.below(3));
        let state = |i| if Some(i) == draining { RegionState::Draining } else { RegionState::Up };
        (0..3).map(|i| (name(&format!("r{i}")), Region { state: state(i) })).collect()
    }

    fn guard(&mut self) -> Guard {
        let mut guard = Guard::default();
        for list in [&mut guard.deny, &mut guard.allow] {
            if !self.yes() {
                continue;
            }
            for _ in 0..self.count(20) {
                let until = if self.below(2) == 0 { 0 } else { 4_000_000_000 + self.below(1_000) };
                let text = match self.below(3) {
                    0 => format!("2001:db8:{:x}::/48", self.below(4)),
                    _ => format!("192.{}.{}.0/24", self.below(3), self.below(9)),
                };
                list.insert(text.parse().expect("it is a prefix"), until);
            }
        }
        // Both lists are written out, so that a third does not go unnoticed here.
        let Guard { deny, allow } = guard;
        Guard { deny, allow }
    }

    fn rate(&mut self) -> Rate {
        Rate { count: self.count(9_000), per_s: self.one_of(&[1, 60, 3_600]) }
    }

    fn tls(&mut self) -> TlsCheck {
        let file = |draw: &mut Self, what: &str| format!("/etc/{}.pem", draw.text(what)).into();
        TlsCheck {
            sni: self.maybe("sni.example".to_owned()),
            ca: Some(file(self, "ca")).filter(|_| self.yes()),
            verify: !self.yes(),
            client: Some((file(self, "cert"), file(self, "key"))).filter(|_| self.yes()),
        }
    }

    fn health(&mut self, kind: u8, mode: ForwardingMode) -> HealthCheck {
        let tunnel = !matches!(mode, ForwardingMode::Nat | ForwardingMode::Local);
        let asked = match kind {
            0 => HealthKind::Http(HttpCheck {
                path: format!("/{}", self.text("health")),
                host: self.maybe("host.example".to_owned()),
                status: (self.count(99) as u16 + 200, 399),
                headers: BTreeMap::from([("x-token".to_owned(), self.text("token"))]),
                body: self.maybe("ready".to_owned()),
                tls: Some(self.tls()).filter(|_| self.yes()),
            }),
            1 => HealthKind::Grpc(GrpcCheck {
                service: self.text("svc"),
                host: self.maybe("grpc.example".to_owned()),
                tls: Some(self.tls()).filter(|_| self.yes()),
            }),
            2 => HealthKind::Tls(self.tls()),
            3 | 4 => HealthKind::Tcp,
            _ => return HealthCheck::default(),
        };
        HealthCheck {
            kind: asked,
            port: Some(self.count(60_000) as u16),
            via: if tunnel && self.yes() { Via::Tunnel } else { Via::Direct },
            interval_ms: 100 + self.count(900),
            jitter_percent: self.count(50) as u8,
            timeout_ms: self.count(900),
            busy_timeout_ms: self.count(90_000),
            rise: self.count(9) as u8,
            fall: self.count(9) as u8,
            damping: !self.yes(),
            signs: !self.yes(),
        }
    }

    fn replica(&mut self, kind: u8) -> ReplicaSource {
        let metrics = [(Quantity::Running, "busy{model=\"a b\"}"), (Quantity::GpuMemoryUsed, "gpu:used")];
        let read = |(quantity, text): (Quantity, &str)| (quantity, text.parse().expect("it is a metric"));
        let is_custom = kind == 0;
        ReplicaSource {
            kind: if is_custom { SourceKind::Custom } else { SourceKind::Stream },
            port: Some(self.count(60_000) as u16),
            path: self.maybe("/state?x=1".to_owned()),
            interval_ms: 10 + self.count(900),
            timeout_ms: self.count(900),
            capacity: self.maybe(7),
            metrics: if is_custom { metrics.map(read).into() } else { BTreeMap::new() },
        }
    }

    /// Rules under which backends in `r0` and `r1` may be used.
    fn rules(&mut self, kind: u8) -> RegionRules {
        let (r0, r1) = (name("r0"), name("r1"));
        let is_weighted = kind == 0;
        RegionRules {
            policy: if is_weighted { RegionPolicy::Weighted } else { RegionPolicy::ActivePassive },
            allowed: Some(vec![r1.clone(), r0.clone()]),
            weights: if is_weighted {
                BTreeMap::from([(r0, self.count(9)), (r1, self.count(9))])
            } else {
                BTreeMap::new()
            },
            spill_at_percent: 80 + self.count(9) as u16,
            spill_until_percent: self.count(60) as u16,
            spill_most_percent: self.count(49) as u16,
            hold_s: 10 + self.count(900),
            zone_first: !self.yes(),
        }
    }

    fn rollout(&mut self) -> Rollout {
        Rollout {
            model: self.text("model"),
            version: self.text("v"),
            permille: self.count(1_000) as u16,
            regions: if self.yes() { vec![name("r1"), name("r0")] } else { Vec::new() },
            state: self.one_of(&[RolloutState::Promoted, RolloutState::Aborted]),
            since_ms: 1_700_000_000_000 + self.below(1 << 20),
            reason: self.text("because"),
            most_errors_percent: 5 + self.count(90) as u8,
            most_latency_percent: 200 + self.count(900),
            least_requests: 20 + self.count(900),
        }
    }

    /// A service; its kind determines which settings are combined.
    fn service(&mut self, kind: u8) -> Service {
        let (protocol, mode, scheduler, port) = match kind {
            0 => (Protocol::Tcp, ForwardingMode::Gue, Scheduler::P2c, Ports::One(80)),
            1 => (Protocol::Udp, ForwardingMode::Ipip, Scheduler::Maglev, Ports::One(443)),
            2 => (Protocol::Udp, ForwardingMode::L2, Scheduler::SourceHash, Ports::Any),
            3 => (Protocol::Tcp, ForwardingMode::Nat, Scheduler::Wrr, Ports::One(8_080)),
            4 => (Protocol::Tcp, ForwardingMode::Gue, Scheduler::SourceHash, Ports::Range(1_000, 2_000)),
            _ => (Protocol::Tcp, ForwardingMode::Local, Scheduler::Rr, Ports::One(53)),
        };
        let is_limited = kind != 2 && self.yes();
        let is_v6 = kind == 3;
        let vip: IpAddr = match is_v6 {
            true => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, kind.into()).into(),
            false => Ipv4Addr::new(10, 255, 0, kind).into(),
        };
        let quic = QuicConfig { id: self.below(7) as u8, server_id_bytes: 4, nonce_bytes: 8, key: None };
        let key = Some([self.below(256) as u8; 16]).filter(|_| self.yes());
        let mut service = Service {
            vip,
            port,
            protocol,
            mode,
            scheduler,
            load_cap: self.maybe_count(900).filter(|_| kind == 4),
            second_chance: self.maybe(kind == 0).filter(|_| matches!(kind, 0 | 4)),
            table_size: self.maybe(TABLE_SIZES[usize::from(kind) % 2]),
            // Files hold signed numbers.
            seed: Some(self.below(1 << 63)).filter(|_| self.yes()),
            drain_s: 300 + self.count(900),
            slow_start_s: self.count(900),
            udp_stateless: kind == 2,
            udp_timeout_s: 120 + self.count(900),
            tcp_timeout_s: 60 + self.count(9_000),
            quic: if kind == 1 { vec![QuicConfig { key, ..quic }] } else { Vec::new() },
            gue_port: 1_000 + self.count(900) as u16,
            on_down: if self.yes() { OnDown::Reset } else { OnDown::Keep },
            when_all_down: if self.yes() {
                self.one_of(&[WhenAllDown::Withdraw, WhenAllDown::Reset])
            } else {
                WhenAllDown::Keep
            },
            panic_percent: Some(self.count(100) as u8),
            max_ejection_percent: self.maybe(40),
            ejection_window_s: 1 + self.count(900),
            seating: Vec::new(),
            new_flow_rate: Some(self.rate()).filter(|_| is_limited),
            new_flow_burst: self.maybe_count(900).filter(|_| is_limited),
            source_rate: Some(self.rate()).filter(|_| is_limited),
            source_burst: self.maybe_count(900).filter(|_| is_limited),
            source_prefix_v4: self.count(31) as u8,
            source_prefix_v6: self.count(63) as u8,
            health: self.health(kind, mode),
            replica: Some(self.replica(kind)).filter(|_| matches!(kind, 0 | 3)),
            regions: Some(self.rules(kind)).filter(|_| matches!(kind, 0 | 1)),
            rollout: Some(self.rollout()).filter(|_| kind == 0),
            backends: BTreeMap::new(),
        };
        let most = if mode == ForwardingMode::Local { 1 } else { 5 };
        for i in 0..self.count(most) {
            let backend = self.backend(kind, i, is_v6);
            service.backends.insert(name(&format!("b{i}")), backend);
        }
        // As the daemon maintains it, and with a seat that was left.
        service.seating = service.seating();
        if self.yes() {
            service.seating.insert(0, (40, 3));
            service.seating.push((40, 0));
        }
        service
    }

    fn backend(&mut self, kind: u8, i: u32, is_v6: bool) -> Backend {
        let host = self.count(200) as u8;
        let address: IpAddr = match is_v6 {
            true => Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, i as u16 + 1, host.into()).into(),
            false => Ipv4Addr::new(10, 1, i as u8, host).into(),
        };
        let states = [BackendState::Draining, BackendState::Down, BackendState::Up];
        Backend {
            address,
            port: self.maybe_count(60_000).filter(|_| kind == 3).map(|port| port as u16),
            weight: 1 + self.count(900),
            state: self.one_of(&states),
            seat: Some(i * 3 + self.below(3) as u32),
            server_id: Some(format!("{i:02x}{:06x}", self.below(1 << 24)))
                .filter(|_| kind == 1 && self.yes())
                .map(|text| text.parse().expect("it is hexadecimal")),
            region: Some(name(&format!("r{}", self.below(2)))),
            zone: self.maybe(name("z1")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    /// Fields of a type, from serde's error about an unknown field.
    fn fields<T: DeserializeOwned>() -> Vec<String> {
        let error = match serde_json::from_value::<T>(json!({"no such field": 1})) {
            Ok(_) => panic!("unknown fields are taken"),
            Err(error) => error.to_string(),
        };
        error.split('`').skip(3).step_by(2).map(str::to_owned).collect()
    }

    /// Asserts that every field of `T` has, in one of these, a value other than with only `bare` given.
    fn all_set<T: DeserializeOwned + serde::Serialize>(what: &str, found: &[Value], bare: &Value) {
        let usual = serde_json::from_value::<T>(bare.clone()).unwrap();
        let usual = serde_json::to_value(usual).unwrap();
        let fields = fields::<T>();
        assert!(!fields.is_empty(), "{what}");
        for field in fields {
            let is_set = |v: &Value| {
                v.get(&field).is_some_and(|v| Some(v) != usual.get(&field) || bare.get(&field).is_some())
            };
            assert!(found.iter().any(is_set), "{what}: {field} is never set");
        }
    }

    #[test]
    fn every_field_is_set_and_every_rule_kept() {
        let states: Vec<Desired> = (0..20).map(|seed| state(seed, true)).collect();
        let of = |path: fn(&Value) -> Vec<Value>| -> Vec<Value> {
            states.iter().flat_map(|s| path(&serde_json::to_value(s).unwrap())).collect()
        };
        fn values(v: &Value) -> Vec<Value> {
            v.as_object().map(|map| map.values().cloned().collect()).unwrap_or_default()
        }
        fn parts(v: &Value, part: &str) -> Vec<Value> {
            values(&v["services"]).iter().map(|s| s[part].clone()).collect()
        }
        all_set::<Desired>("Desired", &of(|v| vec![v.clone()]), &json!({}));
        let service = json!({"vip": "10.0.0.1", "port": 1, "protocol": "tcp"});
        all_set::<Service>("Service", &of(|v| values(&v["services"])), &service);
        let backends = of(|v| parts(v, "backends").iter().flat_map(values).collect());
        all_set::<Backend>("Backend", &backends, &json!({"address": "10.0.0.1"}));
        all_set::<HealthCheck>("HealthCheck", &of(|v| parts(v, "health")), &json!({"kind": "none"}));
        all_set::<ReplicaSource>("ReplicaSource", &of(|v| parts(v, "replica")), &json!({"kind": "stream"}));
        all_set::<RegionRules>("RegionRules", &of(|v| parts(v, "regions")), &json!({}));
        let rollout = json!({"model": "m", "version": "v", "permille": 1});
        all_set::<Rollout>("Rollout", &of(|v| parts(v, "rollout")), &rollout);
        all_set::<Region>("Region", &of(|v| values(&v["regions"])), &json!({}));
        all_set::<Guard>("Guard", &of(|v| vec![v["guard"].clone()]), &json!({}));
    }

    proptest! {
        #[test]
        fn states_keep_all_rules_and_read_back_from_json(state in desired()) {
            prop_assert_eq!(state.check(), []);
            let text = serde_json::to_string(&state).unwrap();
            prop_assert_eq!(serde_json::from_str::<Desired>(&text).unwrap(), state);
        }
    }
}
