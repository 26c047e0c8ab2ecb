//! Tests of compiling a desired state: entries, tables, indices, refusals.
#![allow(missing_docs, clippy::unwrap_used)]

use ipnet::{Ipv4Net, Ipv6Net};
use lb_common::{
    Be16, VipKey,
    backend::{flags, mode},
    load::{FLOW, source},
    mapped,
    service::{
        NO_SERVICE, TCP, UDP,
        flags::{OLD_HASH_SOURCE, REJECT, SECONDS, TRACK_ALL},
        scheduler,
    },
    settings::features::{P2C, SECOND_CHANCE},
    slot::NO_BACKEND,
};
use lb_userspace::{
    desired::model::{
        BackendId, BackendState, Desired, ForwardingMode, Health, NextHop, Observed, Scheduler, Service,
        WhenAllDown,
    },
    plan::compile::{Cache, CompileError, Compiled, Cost, DeploymentSettings, Memory, compile},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

/// The compiling part of a daemon.
#[derive(Default)]
struct Host {
    settings: DeploymentSettings,
    observed: Observed,
    memory: Memory,
    cache: Cache,
}

impl Host {
    fn at(&mut self, seconds: u64, desired: &Desired) -> Compiled {
        self.try_at(seconds, desired).unwrap()
    }

    fn try_at(&mut self, seconds: u64, desired: &Desired) -> Result<Compiled, CompileError> {
        self.observed.now = Duration::from_secs(seconds);
        let compiled = compile(desired, &self.observed, &self.memory, &self.settings, &mut self.cache)?;
        self.memory = compiled.memory.clone();
        Ok(compiled)
    }
}

fn desired(json: &str) -> Desired {
    serde_json::from_str(json).unwrap()
}

/// Service `s` on 10.0.0.1:80/tcp with these backends.
fn service(backends: &[(&str, &str)]) -> Desired {
    let list: Vec<_> = backends.iter().map(|(n, rest)| format!(r#""{n}":{{{rest}}}"#)).collect();
    desired(&format!(
        r#"{{"services":{{"s":{{"vip":"10.0.0.1","port":80,"protocol":"tcp","table_size":251,"backends":{{{}}}}}}}}}"#,
        list.join(",")
    ))
}

fn two() -> Desired {
    service(&[("a", r#""address":"10.1.0.1""#), ("b", r#""address":"10.1.0.2""#)])
}

fn hop(ifindex: u32, source: Option<&str>) -> NextHop {
    NextHop {
        ifindex,
        vlan: 7,
        egress_mac: [1; 6],
        next_hop: [2; 6],
        mtu: 1_500,
        path_mtu: None,
        source: source.map(|s| s.parse().unwrap()),
        is_routed: false,
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_backend_is_resolved_when_next_hop_and_source_are_known() {
    let mut host = Host::default();
    let plan = host.at(1, &two()).plan;
    let entry = plan.backends[&0];
    assert_eq!(entry.address, mapped([10, 1, 0, 1]));
    assert_eq!((entry.flags, entry.mode, entry.service), (flags::USED, mode::IPIP, 0));

    host.observed.paths.next_hops = BTreeMap::from([
        (address("10.1.0.1"), hop(3, Some("10.1.0.254"))),
        (address("10.1.0.2"), hop(4, None)),
    ]);
    let plan = host.at(2, &two()).plan;
    let entry = plan.backends[&0];
    assert_eq!(entry.flags, flags::USED | flags::RESOLVED);
    assert_eq!((entry.source, entry.source_bits), (mapped([10, 1, 0, 254]), 0));
    assert_eq!((entry.ifindex, entry.mtu, entry.vlan), (3, 1_500, Be16::new(7)));
    assert_eq!((entry.next_hop, entry.egress_mac), ([2; 6], [1; 6]));
    assert_eq!(plan.backends[&1].flags, flags::USED, "no source: the kernel is asked");
    assert_eq!(plan.egress, BTreeSet::from([3, 4]));
}

#[test]
fn the_kernel_may_answer_with_any_interface_until_a_next_hop_is_known() {
    let mut host = Host::default();
    host.observed.paths.links = (1..=400).map(|i| (i, format!("eth{i}"))).collect();
    host.observed.paths.next_hops.insert(address("10.1.0.1"), hop(399, None));
    let egress = host.at(1, &two()).plan.egress;
    assert_eq!(egress.len(), lb_common::limits::EGRESS as usize, "as many as fit");
    assert!(egress.contains(&1) && egress.contains(&399), "those in use before all others: {egress:?}");
}

#[test]
fn the_source_prefix_is_for_ipip_and_its_own_family() {
    let mut host = Host::default();
    host.settings.ipip_source_v4 = Some(Ipv4Net::new([172, 16, 0, 0].into(), 12).unwrap());
    host.settings.ipip_source_v6 = Some("fd00:1::/48".parse::<Ipv6Net>().unwrap());
    let mut desired = service(&[("a", r#""address":"10.1.0.1""#), ("b", r#""address":"fd00::2""#)]);
    for a in ["10.1.0.1", "fd00::2"] {
        host.observed.paths.next_hops.insert(address(a), hop(3, None));
    }
    let plan = host.at(1, &desired).plan;
    let entry = |plan: &lb_userspace::plan::compile::Plan, v4: bool| {
        *plan.backends.values().find(|b| lb_common::is_mapped(&b.address) == v4).unwrap()
    };
    assert_eq!((entry(&plan, true).source, entry(&plan, true).source_bits), (mapped([172, 16, 0, 0]), 20));
    assert_eq!(entry(&plan, false).source_bits, 64);
    assert_eq!(entry(&plan, false).source[..6], [0xfd, 0, 0, 1, 0, 0]);
    assert!(plan.backends.values().all(|b| b.flags & flags::RESOLVED != 0));

    let s = Arc::make_mut(desired.services.values_mut().next().unwrap());
    s.mode = lb_userspace::desired::model::ForwardingMode::Gue;
    let plan = host.at(2, &desired).plan;
    let gue = entry(&plan, true);
    assert_eq!((gue.mode, gue.port, gue.source_bits), (mode::GUE_CHAIN, Be16::new(6080), 0));
    assert_eq!(gue.flags & flags::RESOLVED, 0, "a route without a source");
}

#[test]
fn services_are_entered_where_packets_find_them() {
    let desired = desired(
        r#"{"services":{
            "exact":{"vip":"10.0.0.1","port":80,"protocol":"tcp"},
            "high":{"vip":"10.0.0.1","port":"9000-9999","protocol":"udp"},
            "low":{"vip":"10.0.0.1","port":"100-200","protocol":"udp"},
            "rest":{"vip":"10.0.0.1","port":"any","protocol":"udp"},
            "six":{"vip":"fd00::1","port":80,"protocol":"tcp"}}}"#,
    );
    let mut host = Host::default();
    let Compiled { plan, status, .. } = host.at(1, &desired);
    let index: BTreeMap<_, _> = status.iter().map(|s| (s.name.to_string(), s.index)).collect();
    assert_eq!(plan.index.len(), 2);
    assert_eq!(plan.vips.len(), 2);
    let vip = plan.vips[&VipKey { vip: mapped([10, 0, 0, 1]) }];
    assert_eq!((vip.any_tcp, vip.any_udp, vip.range_count), (NO_SERVICE, index["rest"], 2));
    assert_eq!((vip.ranges[0].first, vip.ranges[0].last, vip.ranges[0].service), (100, 200, index["low"]));
    assert_eq!((vip.ranges[1].first, vip.ranges[1].protocol), (9_000, u32::from(UDP)));
    assert!(plan.services.values().all(|s| s.table.is_empty()), "no backend, no table");
    assert_eq!(plan.services[&index["exact"]].view.protocol, TCP);

    // The maps alone identify the backends.
    let mut adopted = Memory::default();
    adopted.adopt(&plan, 1_000);
    let indices = |m: &Memory| m.services.iter().map(|(id, s)| (*id, s.index)).collect::<Vec<_>>();
    assert_eq!(indices(&adopted), indices(&host.memory));
}

#[test]
fn a_removed_backend_keeps_its_entry_until_no_flow_names_it() {
    let mut host = Host::default();
    let before = host.at(1, &two()).plan;
    let one = service(&[("a", r#""address":"10.1.0.1""#)]);
    let Compiled { plan, status, next_change_ms, .. } = host.at(10, &one);
    assert_eq!(plan.backends[&1].flags, flags::USED | flags::DRAINING);
    assert!(plan.services[&0].table.iter().all(|s| s.primary_index() == 0));
    let moved = before.services[&0].table.iter().filter(|s| s.primary_index() == 1).count();
    assert_eq!(status[0].transition_slots as usize, moved);
    assert_eq!(status[0].backends[1].removed_until_ms, Some(310_000));
    assert_eq!(next_change_ms, Some(310_000));
    assert!(host.memory.drained(&one, 309_999).is_empty(), "within the drain time");
    assert_eq!(host.memory.drained(&one, 310_000), BTreeSet::from([1]));

    // A new address gets another index; a returning address gets its old index.
    let with_c = service(&[("a", r#""address":"10.1.0.1""#), ("c", r#""address":"10.1.0.3""#)]);
    assert_eq!(host.at(11, &with_c).plan.backends[&2].address, mapped([10, 1, 0, 3]));
    let again = host.at(12, &two());
    assert_eq!(again.plan.backends[&1].flags, flags::USED);

    host.at(13, &one);
    host.memory.release(&BTreeSet::new(), &BTreeSet::from([1, 2]));
    let plan = host.at(400, &one).plan;
    assert_eq!(plan.backends.keys().copied().collect::<Vec<_>>(), [0]);
    assert!(plan.services[&0].table.iter().all(|s| !s.is_transition() && s.secondary_index() == NO_BACKEND));
    assert!(plan.services[&0].table.iter().any(|s| s.is_tracked()), "until a scan has found no flow");
    host.memory.untrack(0);
    assert!(host.at(401, &one).plan.services[&0].table.iter().all(|s| !s.is_tracked()));
}

#[test]
fn a_removed_service_keeps_its_indices_until_they_are_released() {
    let mut host = Host::default();
    host.at(1, &two());
    let none = host.at(2, &Desired::default());
    assert_eq!(none.plan, lb_userspace::plan::compile::Plan::default());
    let again = host.at(3, &two());
    assert_eq!(again.status[0].index, 1);
    assert_eq!(again.plan.backends.keys().copied().collect::<Vec<_>>(), [2, 3]);
    host.at(4, &Desired::default());
    host.memory.release(&BTreeSet::from([0, 1]), &BTreeSet::new());
    assert_eq!(host.at(5, &two()).status[0].index, 0);
}

#[test]
fn another_name_changes_nothing_and_another_address_is_another_backend() {
    let mut host = Host::default();
    let before = host.at(1, &two()).plan;
    let renamed = service(&[("x", r#""address":"10.1.0.1""#), ("y", r#""address":"10.1.0.2""#)]);
    assert_eq!(host.at(2, &renamed).plan, before);
    let moved = service(&[("a", r#""address":"10.1.0.9""#), ("b", r#""address":"10.1.0.2""#)]);
    let plan = host.at(3, &moved).plan;
    assert_eq!(plan.backends[&0].flags, flags::USED | flags::DRAINING);
    assert_eq!(plan.backends[&2].address, mapped([10, 1, 0, 9]));
}

#[test]
fn hosts_with_different_pasts_have_the_same_tables() {
    let four = service(&[
        ("a", r#""address":"10.1.0.1""#),
        ("b", r#""address":"10.1.0.2","weight":3"#),
        ("c", r#""address":"10.1.0.3""#),
        ("d", r#""address":"10.1.0.4","state":"draining""#),
    ]);
    let (mut one, mut other) = (Host::default(), Host::default());
    other.at(1, &service(&[("c", r#""address":"10.1.0.3""#)]));
    other.at(2, &two());
    let owners = |compiled: &Compiled| -> Vec<[u8; 16]> {
        let address = |i: u32| compiled.plan.backends[&i].address;
        compiled.plan.services[&0].table.iter().map(|s| address(s.primary_index())).collect()
    };
    assert_eq!(owners(&one.at(1_000, &four)), owners(&other.at(1_000, &four)));
}

#[test]
fn what_is_down_is_marked_and_out_of_the_table_but_for_transitions() {
    let mut host = Host::default();
    let mut desired = two();
    let s = Arc::make_mut(desired.services.values_mut().next().unwrap());
    s.health.kind = lb_userspace::desired::model::HealthKind::Tcp;
    let id = |b: &str| BackendId { service: "s".parse().unwrap(), backend: b.parse().unwrap() };
    host.observed.health = BTreeMap::from([(id("a"), Health::Healthy), (id("b"), Health::Healthy)]);
    host.at(1, &desired);
    host.observed.health.insert(id("a"), Health::Unhealthy);
    host.observed.health.insert(id("b"), Health::Unhealthy);
    let Compiled { plan, status, .. } = host.at(2, &desired);
    assert!(plan.backends.values().all(|b| b.flags == flags::USED | flags::DOWN));
    assert_eq!((status[0].eligible, status[0].panic), (0, false));
    for slot in plan.services[&0].table.iter() {
        assert_eq!(slot.primary_index(), NO_BACKEND);
        assert!(slot.is_transition() && slot.secondary_index() < 2);
    }
    Arc::make_mut(desired.services.values_mut().next().unwrap()).panic_percent = Some(50);
    let Compiled { plan, status, .. } = host.at(3, &desired);
    assert!(status[0].panic && plan.backends.values().all(|b| b.flags == flags::USED));
}

#[test]
fn an_unchanged_service_is_not_built_again() {
    let mut host = Host::default();
    let first = host.at(1, &two()).plan;
    let second = host.at(2, &two()).plan;
    assert!(Arc::ptr_eq(&first.services[&0].table, &second.services[&0].table));
}

#[test]
fn what_does_not_fit_is_refused_with_its_name() {
    let mut host = Host::default();
    host.settings.limits.backends = 1;
    let error = host.try_at(1, &two()).unwrap_err().to_string();
    assert!(
        error.contains("backends do not fit: 2 needed, 1 available, first that does not fit: s"),
        "{error}"
    );
    assert!(error.contains("--max-backends"), "{error}");
    assert_eq!(host.memory, Memory::default(), "nothing is remembered of it");

    let mut host = Host::default();
    host.settings.limits.services = 0;
    let error = host.try_at(1, &two()).unwrap_err().to_string();
    assert!(
        error.contains("services do not fit: 1 needed, 0 available, first that does not fit: s"),
        "{error}"
    );

    let mut host = Host::default();
    host.settings.limits.slots = 500;
    let error = host.try_at(1, &two()).unwrap_err().to_string();
    assert!(
        error.contains("1255 slots needed")
            && error.contains("service s has the largest table with 251 slots"),
        "{error}"
    );
    assert!(error.contains("--max-slots 1255"), "{error}");
}

#[test]
fn a_reboot_shifts_the_past_by_the_time_away() {
    let mut host = Host::default();
    host.at(100, &two());
    host.at(200, &service(&[("a", r#""address":"10.1.0.1""#)]));
    let text = serde_json::to_string(&host.memory).unwrap();
    let mut read: Memory = serde_json::from_str(&text).unwrap();
    read.shift_times(-150_000);
    let service = read.services.values().next().unwrap();
    assert_eq!(service.epochs.iter().map(|e| e.from_ms).collect::<Vec<_>>(), [-50_000, 50_000]);
    assert_eq!(service.backends[&address("10.1.0.2")].removed_ms, Some(50_000));
}

/// The service of [`two`], with a change.
fn changed(change: impl FnOnce(&mut Service)) -> Desired {
    let mut desired = two();
    change(desired.service_mut(&"s".parse().unwrap()).unwrap());
    desired
}

/// Hosts of different builds compare these hashes, so they must not change.
#[test]
fn the_status_tells_what_the_slots_name() {
    let mix = |hash: u64, value: u64| {
        let x = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^ (x >> 29)
    };
    let v6 = r#""address":"2001:db8::1""#;
    let three = service(&[
        ("a", r#""address":"10.1.0.1","weight":5"#),
        ("c", r#""address":"10.1.0.3","weight":2"#),
        ("d", v6),
    ]);
    let mut host = Host::default();
    host.at(1, &two());
    // A removed backend with slots in transition, and indices that are not in the order of addresses.
    for compiled in [host.at(2, &three), host.at(3, &service(&[])), host.at(4, &two())] {
        let (status, entry) = (&compiled.status[0], &compiled.plan.services[&0]);
        let slots = entry.slots();
        let mut shares = BTreeMap::new();
        slots.iter().for_each(|slot| *shares.entry(slot.primary_index()).or_insert(0) += 1);
        for backend in &status.backends {
            let is_known = backend.name.is_some();
            let share = shares.get(&backend.index).copied().filter(|_| is_known).unwrap_or(0);
            assert_eq!(backend.slots, share, "{}", backend.address);
        }
        let start = mix(mix(entry.view.seed[0], entry.view.seed[1]), slots.len() as u64);
        let hash = slots.iter().fold(start, |hash, slot| {
            let named = status.backends.iter().find(|b| b.index == slot.primary_index());
            let value = named.map_or(0, |b| {
                let bits = match b.address {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
                    IpAddr::V6(v6) => v6.to_bits(),
                };
                mix(mix(0, (bits >> 64) as u64), bits as u64)
            });
            mix(hash, value)
        });
        assert_eq!(status.table_hash, hash);
    }
}

#[test]
fn a_new_seed_size_or_hash_leaves_the_old_table_for_the_drain_time() {
    let by_source = |s: &mut Service| s.scheduler = Scheduler::SourceHash;
    for (change, is_by_source) in [
        (changed(|s| s.seed = Some(7)), false),
        (changed(|s| s.table_size = Some(1_021)), false),
        (changed(by_source), false),
    ] {
        let mut host = Host::default();
        let before = host.at(1, &two()).plan.services[&0].clone();
        assert_eq!(before.view.old_count, 0);
        let after = host.at(1_000, &change);
        let entry = &after.plan.services[&0];
        assert_eq!((entry.view.old_count, entry.view.old_seed), (251, before.view.seed));
        assert_eq!(entry.view.flags & OLD_HASH_SOURCE != 0, is_by_source);
        let old = &entry.table[entry.slots().len()..];
        assert!(old.iter().map(|s| s.primary_index()).eq(before.slots().iter().map(|s| s.primary_index())));
        assert!(entry.in_transition() && entry.slots().iter().all(|s| s.is_tracked() && !s.is_transition()));
        assert_eq!(after.next_change_ms, Some(1_300_000));
        let later = host.at(1_300, &change).plan.services[&0].clone();
        assert!(!later.in_transition() && later.table.len() == later.slots().len());
        assert!(later.slots().iter().all(|s| s.is_tracked()), "until a scan has found no flow");
    }
    // And back within the drain time: the base is the current table, and each slot has its own previous primary.
    let mut host = Host::default();
    host.at(1, &two());
    host.at(1_000, &changed(by_source));
    let entry = host.at(1_010, &two()).plan.services[&0].clone();
    assert_eq!(entry.view.old_count, 0);
    assert!(entry.slots().iter().all(|s| s.is_transition() && s.secondary_index() == s.primary_index()));
    // An old table hashed by source is marked as such.
    let mut host = Host::default();
    host.at(1, &changed(by_source));
    let entry = host.at(1_000, &two()).plan.services[&0].clone();
    assert_ne!(entry.view.flags & OLD_HASH_SOURCE, 0);
}

#[test]
fn a_scheduler_leaves_its_flows_to_the_next() {
    let mut host = Host::default();
    let p2c = changed(|s| s.scheduler = Scheduler::P2c);
    let first = host.at(1, &p2c);
    assert_eq!(first.plan.services[&0].view.scheduler, scheduler::P2C);
    assert_ne!(first.plan.services[&0].view.flags & TRACK_ALL, 0);
    assert!(first.plan.services[&0].slots().iter().all(|s| !s.is_tracked() && s.secondary_index() < 2));
    // A restarted daemon reads it from the maps.
    host.memory.adopt(&first.plan, 2_000);
    host.cache = Cache::default();
    let after = host.at(3, &two());
    assert!(after.status[0].exceptions, "the sweep must not speak for it at once");
    let entry = &after.plan.services[&0];
    assert!(entry.view.flags & TRACK_ALL == 0 && entry.slots().iter().all(|s| s.is_tracked()));
    assert!(!host.at(4, &changed(|s| s.drain_s = 5)).status[0].exceptions);
}

#[test]
fn second_choices_stand_behind_the_table_of_who_uses_them() {
    let mut host = Host::default();
    let three = [
        ("a", r#""address":"10.1.0.1""#),
        ("b", r#""address":"10.1.0.2""#),
        ("c", r#""address":"10.1.0.3""#),
    ];
    let with = |n: usize| {
        let mut desired = service(&three[..n]);
        desired.service_mut(&"s".parse().unwrap()).unwrap().scheduler = Scheduler::P2c;
        desired
    };
    let stable = host.at(1, &with(2)).plan.services[&0].clone();
    assert_eq!(
        (stable.view.flags & SECONDS, stable.table.len()),
        (SECONDS, 502),
        "a transition begins in place"
    );
    let moving = host.at(1_000, &with(3)).plan.services[&0].clone();
    assert_eq!((moving.view.flags & SECONDS, moving.table.len()), (SECONDS, 502));
    let seconds = |entry: &lb_userspace::plan::compile::ServiceEntry| -> Vec<u32> {
        entry.table[251..].iter().map(|s| s.primary_index()).collect()
    };
    let moved: Vec<usize> =
        (0..251).filter(|&i| moving.table[i].primary_index() != stable.table[i].primary_index()).collect();
    assert!(moved.len() > 60, "the third takes its share: {}", moved.len());
    for i in 0..251 {
        let (was, is) = (stable.table[i], seconds(&moving)[i]);
        assert_eq!(is, was.secondary_index(), "slot {i} keeps its second choice for the drain time");
    }
    let after = host.at(2_000, &with(3)).plan.services[&0].clone();
    let then: Vec<u32> = after.slots().iter().map(|s| s.secondary_index()).collect();
    assert_eq!(then, seconds(&after), "the same pairs afterwards");
    let changed = |i: &usize| seconds(&after)[*i] != seconds(&moving)[*i];
    for i in (0..251).filter(changed) {
        assert_eq!(
            after.table[251 + i].secondary_index(),
            seconds(&moving)[i],
            "slot {i} is asked there too"
        );
        assert!(after.table[i].has_earlier());
    }
    assert!((0..251).filter(changed).count() > 60, "second choices follow the table");
    let last = host.at(3_000, &with(3)).plan.services[&0].clone();
    assert!(last.slots().iter().all(|s| !s.has_earlier()), "for one drain time");
}

#[test]
fn lists_and_costs_follow_the_backends() {
    let mut host = Host::default();
    let mut desired =
        service(&[("a", r#""address":"10.1.0.1","weight":3"#), ("b", r#""address":"10.1.0.2""#)]);
    let mut with = |scheduler: Scheduler, has_replicas: bool| {
        let service = desired.service_mut(&"s".parse().unwrap()).unwrap();
        service.scheduler = scheduler;
        service.replica = has_replicas.then(|| serde_json::from_str(r#"{"kind":"stream"}"#).unwrap());
        let plan = host.at(1, &desired).plan;
        let entry = &plan.services[&0];
        let list: Vec<u32> = entry.table[entry.slots().len()..].iter().map(|s| s.primary_index()).collect();
        if scheduler != Scheduler::P2c {
            assert_eq!(list.len(), entry.view.list_count as usize, "no transition");
        }
        (entry.view.scheduler, list, plan.costs)
    };
    let (reports, flows) = (source::REPORTS, source::FLOWS);
    let costs = |source| BTreeMap::from([(0, Cost { flow: 682, source }), (1, Cost { flow: 2_048, source })]);
    assert_eq!(with(Scheduler::Rr, false), (scheduler::ROUND_ROBIN, vec![0, 1], costs(reports)));
    assert_eq!(with(Scheduler::Wrr, false), (scheduler::ROUND_ROBIN, vec![0, 0, 1, 0], costs(reports)));
    assert_eq!(with(Scheduler::Lc, false), (scheduler::LEAST_CONN, vec![0, 1], costs(flows)));
    assert_eq!(with(Scheduler::Random, false), (scheduler::RANDOM, vec![], costs(reports)));
    // With replica reports: weights are in p2c's table, but not in the list of lc.
    let capacity = Cost { flow: FLOW, source: source::CAPACITY };
    assert_eq!(with(Scheduler::P2c, true).2, BTreeMap::from([(0, capacity), (1, capacity)]));
    let by_capacity = costs(source::CAPACITY_OR_FLOWS);
    assert_eq!(with(Scheduler::Lc, true), (scheduler::LEAST_CONN, vec![0, 1], by_capacity));
}

#[test]
fn a_service_that_needs_what_is_off_is_refused() {
    let mut host = Host::default();
    host.settings.features_off = P2C | SECOND_CHANCE;
    let p2c = changed(|s| s.scheduler = Scheduler::P2c);
    let error = host.try_at(1, &p2c).unwrap_err().to_string();
    assert_eq!(
        error,
        "service s: scheduler p2c needs feature p2c, which is off: add it to the setting features"
    );
    let gue = changed(|s| s.mode = ForwardingMode::Gue);
    host.at(1, &gue);
    let mut asked = gue;
    asked.service_mut(&"s".parse().unwrap()).unwrap().second_chance = Some(true);
    assert!(host.try_at(2, &asked).unwrap_err().to_string().contains("needs feature second-chance"));
}

/// Any service flag that the fast path does not know costs it, so the mark is there only while nothing takes new flows.
#[test]
fn clients_are_answered_only_while_no_backend_takes_new_flows() {
    let mut host = Host::default();
    let mut marked = |seconds, change: &dyn Fn(&mut Service)| {
        let desired = changed(|s| {
            s.when_all_down = WhenAllDown::Reset;
            change(s);
        });
        host.at(seconds, &desired).plan.services[&0].view.flags & REJECT != 0
    };
    assert!(!marked(1, &|_| {}));
    let drain = |s: &mut Service, count: usize| {
        s.backends.values_mut().take(count).for_each(|b| b.state = BackendState::Draining);
    };
    assert!(!marked(2, &|s| drain(s, 1)));
    assert!(marked(3, &|s| drain(s, 2)));
    assert!(!marked(4, &|s| {
        drain(s, 2);
        s.when_all_down = WhenAllDown::Keep;
    }));
    assert!(marked(5, &|s| s.backends.clear()));
    assert!(marked(6, &|s| s.backends.values_mut().for_each(|b| b.weight = 0)));
}

#[test]
fn l2_reaches_no_further_than_the_segment() {
    let mut host = Host::default();
    let mut desired = service(&[("a", r#""address":"10.1.0.1""#), ("b", r#""address":"10.1.0.2""#)]);
    Arc::make_mut(desired.services.values_mut().next().unwrap()).mode =
        lb_userspace::desired::model::ForwardingMode::L2;
    // Mode l2 adds no header, so it needs no source.
    host.observed.paths.next_hops.insert(address("10.1.0.1"), hop(3, None));
    let routed = NextHop { is_routed: true, ..hop(3, Some("10.0.0.1")) };
    host.observed.paths.next_hops.insert(address("10.1.0.2"), routed);
    let compiled = host.at(1, &desired);
    let status = &compiled.status[0];
    let entries: Vec<_> = status.backends.iter().map(|b| compiled.plan.backends[&b.index]).collect();
    assert!(entries.iter().all(|b| b.mode == mode::L2));
    assert_eq!(entries.iter().map(|b| b.flags & flags::RESOLVED != 0).collect::<Vec<_>>(), [true, false]);
    assert_eq!(status.backends.iter().map(|b| b.eligible).collect::<Vec<_>>(), [true, false]);
    assert_eq!(status.backends[0].problem, None);
    let problem = status.backends[1].problem.as_ref().unwrap();
    assert!(problem.contains("10.1.0.2 is behind a router: use ipip, gue or nat"), "{problem}");

    // The route changes, and with it the problem.
    host.observed.paths.next_hops.insert(address("10.1.0.2"), hop(3, None));
    let status = host.at(2, &desired).status;
    assert!(status[0].backends.iter().all(|b| b.eligible && b.problem.is_none() && b.resolved));
}

#[test]
fn what_a_router_says_lowers_the_mtu_as_far_as_clients_heed_it() {
    let mut host = Host::default();
    let of = |vip: &str, address: &str| {
        let mut desired = service(&[("a", &format!(r#""address":"{address}""#))]);
        Arc::make_mut(desired.services.values_mut().next().unwrap()).vip = vip.parse().unwrap();
        desired
    };
    let mut seen = |vip: &str, at: &str, path_mtu: Option<u16>| {
        let source = if at.contains(':') { "fd00::1" } else { "10.0.0.1" };
        let told = NextHop { path_mtu, ..hop(3, Some(source)) };
        host.observed.paths.next_hops.insert(address(at), told);
        let compiled = host.at(1, &of(vip, at));
        let status = &compiled.status[0].backends[0];
        assert!(status.eligible);
        (compiled.plan.backends[&status.index].mtu, status.problem.is_some())
    };
    // Mode ipip: 20 bytes over IPv4, 40 over IPv6.
    for (path, expected) in [(None, 1_500), (Some(1_400), 1_400), (Some(600), 600), (Some(9_000), 1_500)] {
        assert_eq!(seen("10.0.0.9", "10.1.0.1", path), (expected, false), "{path:?}");
    }
    let narrow = [(None, (1_500, false)), (Some(1_400), (1_400, false)), (Some(1_310), (1_320, true))];
    for (path, expected) in narrow {
        assert_eq!(seen("fd00::9", "fd00:1::1", path), expected, "{path:?}");
    }
    assert_eq!(seen("fd00::9", "10.1.0.1", Some(1_290)), (1_300, true));
}

#[test]
fn local_needs_no_next_hop() {
    let mut host = Host::default();
    let mut desired = service(&[("a", r#""address":"127.0.0.1""#)]);
    Arc::make_mut(desired.services.values_mut().next().unwrap()).mode =
        lb_userspace::desired::model::ForwardingMode::Local;
    assert!(desired.check().is_empty());
    let plan = host.at(1, &desired).plan;
    let entry = plan.backends.values().next().unwrap();
    assert_eq!((entry.mode, entry.flags & flags::RESOLVED), (mode::LOCAL, flags::RESOLVED));
    assert!(plan.egress.is_empty());
}
