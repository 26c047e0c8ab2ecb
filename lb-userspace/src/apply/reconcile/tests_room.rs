//! Behaviour with few free slots: nothing waits for a table that does not fit.

use super::{fake::*, tests::*, *};
use crate::desired::model::{BackendState, ForwardingMode, Ports, Scheduler, Service};
use lb_common::{limits, slot::NO_BACKEND};
use proptest::prelude::*;
use std::sync::Mutex;

fn room(services: u32, slots: u32) -> SharedMaps {
    SharedMaps(Arc::new(Mutex::new(FakeMaps { is_large: true, ..FakeMaps::new(services, slots, 16_384) })))
}

/// A test bed over maps of these sizes, whose settings know them.
fn large(services: u32, slots: u32) -> Bed {
    let limits = compile::TableLimits { services, slots, ..compile::TableLimits::default() };
    start_with(
        room(services, slots),
        &Arc::default(),
        DeploymentSettings { limits, ..DeploymentSettings::default() },
    )
}

/// `count` services with backends of their own and one backend that all share, which is called `shared`.
fn sharing(count: usize, own: u32, change: impl Fn(&mut Service)) -> Arc<Desired> {
    let mut desired = Desired::default();
    for i in 0..count as u32 {
        let vip = std::net::Ipv4Addr::from(0x0a00_0000 + i + 1).to_string();
        let mut s = service(&vip, Ports::One(80), &[("shared", "10.9.9.9", 1)]);
        for b in 0..own {
            let address = std::net::Ipv4Addr::from(0x0a64_0000 + i * own + b).to_string();
            let other = service(&vip, Ports::One(80), &[("x", &address, 1)]);
            s.backends.insert(name(&format!("b{b}")), other.backends[&name("x")].clone());
        }
        s.table_size = None;
        s.health = crate::desired::model::HealthCheck {
            kind: crate::desired::model::HealthKind::Tcp,
            ..crate::desired::model::HealthCheck::default()
        };
        change(&mut s);
        desired.services.insert(name(&format!("s{i:04}")), s.into());
    }
    Arc::new(desired)
}

fn shared_dies(service: &Name) -> Event {
    let id = BackendId { service: service.clone(), backend: name("shared") };
    Event::Health { id, health: Health::Unhealthy, at: Duration::ZERO }
}

/// Number of a service's slots that send new flows to `address`.
fn slots_to(bed: &Bed, service: &Name, address: &str) -> usize {
    let maps = bed.maps.0.lock().unwrap();
    let key = bed.published.borrow().services[service].index;
    let view = *maps.live_view(key);
    let table = &maps.slots[view.slot_base as usize..(view.slot_base + view.slot_count) as usize];
    let address = crate::plan::compile::to_address(address.parse().unwrap());
    let is_it = |index: u32| index != NO_BACKEND && maps.backends[index as usize].address == address;
    table.iter().filter(|s| is_it(s.primary_index())).count()
}

fn all_left(bed: &Bed, desired: &Desired) {
    for service in desired.services.keys() {
        assert_eq!(
            slots_to(bed, service, "10.9.9.9"),
            0,
            "{service} still sends new flows to the dead worker"
        );
    }
    assert_eq!(bed.published.borrow().problems, BTreeMap::new());
}

fn p2c_of_16381() -> Arc<Desired> {
    sharing(4, 1, |s| {
        s.scheduler = Scheduler::P2c;
        s.table_size = Some(16_381);
    })
}

/// This state was accepted at 44 % of the slots by versions that counted present tables only.
#[test]
fn four_services_in_a_small_room_all_leave_a_dead_worker() {
    let desired = p2c_of_16381();
    // For each the table and its second choices; once more for one of them with the old table behind it, and as much
    // again to move tables through.
    large(16, 4 * 32_762 + 2 * (32_762 + 16_381)).check(&desired).unwrap();
    let mut bed = large(16, 150_000);
    bed.check(&desired).unwrap_err();
    bed.set(&desired, 1).unwrap();
    for service in desired.services.keys() {
        bed.reconciler.step(vec![shared_dies(service)], clock::boot());
    }
    all_left(&bed, &desired);
    // A state that needs no more slots than it has is not refused for shortage of room.
    let mut drained = desired;
    let web = Arc::make_mut(&mut drained).service_mut(&name("s0001")).unwrap();
    web.backends.get_mut(&name("b0")).unwrap().state = BackendState::Draining;
    bed.check(&drained).unwrap();
    // A refusal builds no tables.
    let refused = sharing(40, 1, |s| s.table_size = Some(524_287));
    let began = std::time::Instant::now();
    bed.check(&refused).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

/// A host that was upgraded, or has fewer slots than the one that accepted the state.
#[test]
fn even_where_second_choices_do_not_fit_a_dead_worker_is_left() {
    let mut bed = large(16, 4 * 16_381 + 100);
    let desired = p2c_of_16381();
    bed.check(&desired).unwrap_err();
    bed.set(&desired, 1).unwrap();
    let waiting = bed.published.borrow().problems.clone();
    assert!(!waiting.is_empty() && waiting.values().all(|p| p.label() == "no_room"), "{waiting:?}");
    for service in desired.services.keys().filter(|s| !waiting.contains_key(*s)) {
        bed.reconciler.step(vec![shared_dies(service)], clock::boot());
        assert_eq!(slots_to(&bed, service, "10.9.9.9"), 0);
    }
}

fn gue(count: usize, own: u32) -> Arc<Desired> {
    sharing(count, own, |s| s.mode = ForwardingMode::Gue)
}

#[test]
fn three_hundred_services_leave_a_worker_whose_verdicts_come_one_by_one() {
    let mut bed = large(4_096, limits::SLOTS);
    let mut desired = gue(300, 2);
    let sized = Arc::make_mut(&mut desired);
    // The sizes of services created from now on.
    sized.assign_sizes(&Desired::default());
    bed.check(&desired).unwrap();
    bed.set(&desired, 1).unwrap();
    for service in desired.services.keys() {
        bed.reconciler.step(vec![shared_dies(service)], clock::boot());
        assert_eq!(slots_to(&bed, service, "10.9.9.9"), 0);
    }
    all_left(&bed, &desired);
}

/// Sizes accepted by earlier versions: 16,381 slots each, 59 % of all slots, twice that with second choices.
#[test]
fn three_hundred_large_tables_leave_a_worker_in_one_burst() {
    let mut bed = large(4_096, limits::SLOTS);
    let mut desired = gue(300, 2);
    bed.set(&desired, 1).unwrap();
    let began = std::time::Instant::now();
    bed.reconciler.step(desired.services.keys().map(shared_dies).collect(), clock::boot());
    println!("one burst over 300 services: {:?}", began.elapsed());
    let served: Vec<Name> = bed.published.borrow().services.keys().cloned().collect();
    assert!(served.len() >= 250, "{} of 300 have a table", served.len());
    for service in &served {
        assert_eq!(slots_to(&bed, service, "10.9.9.9"), 0, "{service}");
    }
    // Other services do not wait for those without a table.
    let change = Arc::make_mut(&mut desired);
    change.service_mut(&served[7]).unwrap().backends.get_mut(&name("b0")).unwrap().state =
        BackendState::Draining;
    bed.set(&desired, 2).unwrap();
    assert_eq!(bed.published.borrow().revision, 2);
    assert_eq!(
        slots_to(&bed, &served[7], &desired.services[&served[7]].backends[&name("b0")].address.to_string()),
        0
    );
}

/// A service that waits for a smaller table while its old one is in transition, and whose new mode stores second choices.
#[test]
fn a_waiting_service_does_not_take_the_room_that_it_waits_for() {
    let of = |mode, size, seed, backends: &[_]| {
        let mut s = service("10.0.0.1", Ports::One(80), backends);
        (s.mode, s.table_size, s.seed) = (mode, Some(size), seed);
        desired(vec![("s0", s)])
    };
    let states = [
        of(ForwardingMode::Ipip, 1_021, Some(1), &[("b0", "10.1.0.1", 1)]),
        of(ForwardingMode::Ipip, 1_021, None, &[]),
        of(ForwardingMode::Gue, 251, Some(2), &[("b0", "10.1.0.1", 1)]),
    ];
    let limits = compile::TableLimits { services: 16, slots: 3 * 1_021, ..compile::TableLimits::default() };
    let maps = SharedMaps(Arc::new(Mutex::new(FakeMaps::new(16, limits.slots, 64))));
    let mut bed =
        start_with(maps, &Arc::default(), DeploymentSettings { limits, ..DeploymentSettings::default() });
    for (i, state) in states.iter().enumerate() {
        // Less room than the check asks for, as a state that an earlier version accepted may have.
        bed.set(state, i as u64 + 1).unwrap();
    }
    assert!(!bed.published.borrow().problems.is_empty());
    assert_eq!(bed.published.borrow().applied.waiting, [name("s0")]);
    for _ in 0..2 {
        bed.reconciler.age(Duration::from_secs(301));
        bed.reconciler.step(Vec::new(), clock::boot());
    }
    assert_settled(&bed, &states[2]);
}

/// Strategy: states of up to four services with tables of two sizes, several schedulers, seeds and backends.
fn any_states() -> impl Strategy<Value = Vec<(Arc<Desired>, u8, bool)>> {
    let one = (0u8..3, any::<bool>(), 0u64..3, proptest::collection::btree_map(0u8..5, 0u8..3, 0..4));
    let state = proptest::collection::btree_map(0u8..4, one, 0..4);
    let state = state.prop_map(|services| {
        let mut desired = Desired::default();
        for (i, (scheduler, is_large, seed, backends)) in services {
            let mut s = service(&format!("10.0.0.{}", i + 1), Ports::One(80), &[]);
            s.scheduler = [Scheduler::Maglev, Scheduler::P2c, Scheduler::Rr][scheduler as usize];
            s.mode = if seed == 2 { ForwardingMode::Gue } else { ForwardingMode::Ipip };
            s.table_size = Some(if is_large { 1_021 } else { 251 });
            s.seed = (seed > 0).then_some(seed);
            for (b, state) in backends {
                let backend = service("10.0.0.9", Ports::One(1), &[("x", &format!("10.1.0.{}", b + 1), 1)]);
                let mut backend = backend.backends[&name("x")].clone();
                backend.state =
                    [BackendState::Up, BackendState::Draining, BackendState::Down][state as usize];
                s.backends.insert(name(&format!("b{b}")), backend);
            }
            desired.services.insert(name(&format!("s{i}")), s.into());
        }
        Arc::new(desired)
    });
    proptest::collection::vec((state, 0u8..4, any::<bool>()), 1..8)
}

/// Asserts that every service has its table, and that none names a backend without new flows while another takes them.
fn assert_settled(bed: &Bed, desired: &Desired) {
    let published = bed.published.borrow();
    assert_eq!(published.problems, BTreeMap::new());
    let maps = bed.maps.0.lock().unwrap();
    for (name, wanted) in &desired.services {
        let view = maps.live_view(published.services[name].index);
        let size = if wanted.backends.is_empty() { view.slot_count } else { wanted.table_size.unwrap() };
        assert_eq!(view.slot_count, size, "{name}");
        let takes =
            |address| wanted.backends.values().any(|b| b.address == address && b.state == BackendState::Up);
        for slot in &maps.slots[view.slot_base as usize..(view.slot_base + view.slot_count) as usize] {
            let primary = slot.primary_index();
            let address = || crate::plan::compile::from_address(&maps.backends[primary as usize].address);
            assert!(primary == NO_BACKEND || takes(address()), "{name} sends new flows to {}", address());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.div_ceil(5), ..ProptestConfig::default() })]

    /// With any number of slots: an accepted state is in force in the end, whatever else is requested meanwhile. The maps
    /// assert after each write that every live table is complete, and that nothing is written that may still be read.
    #[test]
    fn what_is_accepted_comes_into_force(states in any_states(), slots in 2_000u32..14_000) {
        let limits = compile::TableLimits { services: 16, slots, ..compile::TableLimits::default() };
        let maps = SharedMaps(Arc::new(Mutex::new(FakeMaps::new(16, slots, 64))));
        let mut bed = start_with(maps, &Arc::default(), DeploymentSettings { limits, ..DeploymentSettings::default() });
        let mut accepted = Arc::new(Desired::default());
        for (revision, (state, minutes, restart)) in states.into_iter().enumerate() {
            if state.check().is_empty() && bed.check(&state).is_ok() {
                accepted = state;
            }
            if restart {
                bed = bed.restart();
            }
            bed.set(&accepted, revision as u64 + 1).unwrap();
            // Some drain windows end before the next change, others do not.
            bed.reconciler.age(Duration::from_secs(u64::from(minutes) * 100));
            bed.reconciler.step(Vec::new(), clock::boot());
        }
        for _ in 0..12 {
            // All drain windows end, including those of services that waited for others.
            bed.reconciler.age(Duration::from_secs(301));
            bed.reconciler.step(Vec::new(), clock::boot());
        }
        assert_settled(&bed, &accepted);
    }
}

/// Resident memory of this process in MiB.
fn resident_mib() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4 / 1_024
}

/// At default limits, except the number of backends: a worker that all services share dies, a region with a thousand
/// services is drained, and changes go on meanwhile. Prints the cost.
fn a_fleet(services: usize, backends: u32, regional: usize) {
    let mut bed = large(4_096, limits::SLOTS);
    let settings = &mut bed.reconciler.settings;
    settings.limits.backends = 65_536;
    bed.maps.0.lock().unwrap().backends.resize(65_536, Default::default());
    let mut desired = gue(services, backends - 1);
    let fleet = Arc::make_mut(&mut desired);
    fleet.assign_sizes(&Desired::default());
    let names: Vec<Name> = fleet.services.keys().cloned().collect();
    for service in &names[..regional] {
        let service = fleet.service_mut(service).unwrap();
        let rules = r#"{"policy":"weighted","weights":{"eu":1,"us":2}}"#;
        service.regions = Some(serde_json::from_str(rules).unwrap());
        for (backend, b) in &mut service.backends {
            b.region = Some(name(if backend.as_str() == "b0" { "eu" } else { "us" }));
        }
    }
    fleet.regions.insert(name("eu"), serde_json::from_str("{}").unwrap());
    bed.check(&desired).unwrap();
    // CPU time of this thread, so that a busy machine does not matter.
    let took = |what: &str, began: Duration| {
        let spent = clock::thread().saturating_sub(began);
        println!("{what}: {spent:?} of CPU time, {} MiB resident", resident_mib());
        spent
    };
    let began = clock::thread();
    bed.set(&desired, 1).unwrap();
    took("first application", began);
    let limit = Duration::from_secs(1);

    let began = clock::thread();
    bed.reconciler.step(names.iter().map(shared_dies).collect(), clock::boot());
    // Unoptimised builds take about ten times as long.
    assert!(took("a worker of all dies", began) < if cfg!(debug_assertions) { limit * 10 } else { limit });
    all_left(&bed, &desired);
    let mut times = Vec::new();
    for change in 0..50usize {
        let service = &names[regional + change * 7_919 % (services - regional)];
        let began = clock::thread();
        let backend = Arc::make_mut(&mut desired).service_mut(service).unwrap();
        backend.backends.get_mut(&name("b0")).unwrap().state = BackendState::Draining;
        bed.check(&desired).unwrap();
        bed.set(&desired, 2 + change as u64).unwrap();
        times.push(clock::thread().saturating_sub(began));
    }
    times.sort_unstable();
    println!("50 changes meanwhile: median {:?}, longest {:?}", times[25], times[49]);
    assert!(times[49] < if cfg!(debug_assertions) { limit * 10 } else { limit }, "{:?}", times[49]);
    let of_eu = |service: &Name| desired.services[service].backends[&name("b0")].address.to_string();
    assert!(names[..regional].iter().all(|s| slots_to(&bed, s, &of_eu(s)) > 0));
    let began = clock::thread();
    let eu = Arc::make_mut(&mut desired).regions.get_mut(&name("eu")).unwrap();
    eu.state = crate::desired::model::RegionState::Draining;
    bed.check(&desired).unwrap();
    bed.set(&desired, 100).unwrap();
    took("a region of services drains", began);
    for service in &names[..regional] {
        let address = desired.services[service].backends[&name("b0")].address.to_string();
        assert_eq!(slots_to(&bed, service, &address), 0, "{service}");
    }
    assert!(bed.published.borrow().problems.is_empty());
}

#[test]
fn three_hundred_services_change_meanwhile() {
    a_fleet(300, 3, 100);
}

/// Takes half a minute of CPU time in an unoptimised build.
#[test]
#[ignore = "large: run it by its name, with --release"]
fn four_thousand_services_of_ten_backends_change_meanwhile() {
    a_fleet(4_096, 10, 1_000);
}
