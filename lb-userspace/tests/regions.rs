//! Tests of regions, residency, drains and roll-outs in compiled tables.
#![allow(missing_docs, clippy::unwrap_used)]

use lb_common::{
    backend::{flags, mode},
    service::flags::REFUSED_BY_RESIDENCY,
    slot::NO_BACKEND,
};
use lb_userspace::{
    desired::model::{BackendId, Canary, Desired, Health, Locality, Name, Observed, RegionShares, Share},
    plan::compile::{Cache, Compiled, DeploymentSettings, Memory, Past, compile},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// Service `s` with two backends in eu, two in us and one in uk.
fn desired(settings: Value) -> Desired {
    let mut service = json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "table_size": 4099,
        "health": {"kind": "tcp"}, "backends": {}});
    service.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    for (i, backend) in ["eu-1", "eu-2", "us-1", "us-2", "uk-1"].iter().enumerate() {
        service["backends"][backend] = json!({"address": format!("10.1.0.{i}"), "region": &backend[..2]});
    }
    let mut desired: Desired = serde_json::from_value(json!({"services": {"s": service}})).unwrap();
    desired.assign_seats(&Desired::default());
    desired
}

struct Host {
    settings: DeploymentSettings,
    observed: Observed,
    memory: Memory,
    cache: Cache,
    now_s: u64,
}

impl Host {
    fn new(region: &str) -> Self {
        let here = Locality { region: name(region), zone: name("a") };
        let mut host = Self {
            settings: DeploymentSettings { here, ..DeploymentSettings::default() },
            observed: Observed::default(),
            memory: Memory::default(),
            cache: Cache::default(),
            now_s: 0,
        };
        for backend in ["eu-1", "eu-2", "us-1", "us-2", "uk-1"] {
            host.health(backend, Health::Healthy);
        }
        host
    }

    fn health(&mut self, backend: &str, health: Health) {
        let id = BackendId { service: name("s"), backend: name(backend) };
        self.observed.health.insert(id, health);
    }

    fn steer(&mut self, shares: &[(&str, u16)], new: &[&str]) {
        let steer = RegionShares {
            shares: shares.iter().map(|&(n, permille)| Share { name: name(n), permille }).collect(),
            order: ["eu", "uk", "us"].map(name).into(),
            canary: Some(Canary { backends: new.iter().map(|n| name(n)).collect(), ..Canary::default() }),
            ..RegionShares::default()
        };
        self.observed.steers = BTreeMap::from([(name("s"), Arc::new(steer))]);
    }

    /// Compiles a second later; returns the slots' owners by name, and the result.
    fn compile(&mut self, desired: &Desired) -> (Vec<String>, Compiled) {
        self.now_s += 1;
        self.observed.now = Duration::from_secs(self.now_s);
        let compiled =
            compile(desired, &self.observed, &self.memory, &self.settings, &mut self.cache).unwrap();
        self.memory = compiled.memory.clone();
        let status = &compiled.status[0];
        let of = |index: u32| match status.backends.iter().find(|b| b.index == index) {
            Some(backend) => backend.name.as_ref().unwrap().to_string(),
            None => String::new(),
        };
        let slots = compiled.plan.services[&status.index].slots().to_vec();
        (slots.iter().map(|slot| of(slot.primary_index())).collect(), compiled)
    }
}

/// Share of the slots by owner, in thousandths.
fn shares(slots: &[String]) -> BTreeMap<&str, usize> {
    let mut count = BTreeMap::<&str, usize>::new();
    slots.iter().for_each(|owner| *count.entry(owner).or_default() += 1);
    count.into_iter().map(|(owner, n)| (owner, (n * 1_000 + 2_049) / 4_099)).collect()
}

#[test]
fn without_a_decision_the_own_region_serves_and_another_stands_in_at_once() {
    let desired = desired(json!({}));
    let mut host = Host::new("us");
    assert_eq!(shares(&host.compile(&desired).0), [("us-1", 500), ("us-2", 500)].into());
    host.health("us-1", Health::Unhealthy);
    assert_eq!(shares(&host.compile(&desired).0), [("us-2", 1_000)].into());
    host.health("us-2", Health::Unhealthy);
    assert_eq!(shares(&host.compile(&desired).0), [("eu-1", 500), ("eu-2", 500)].into());
    let (slots, compiled) = Host::new("asia").compile(&desired);
    assert_eq!(shares(&slots), [("eu-1", 500), ("eu-2", 500)].into());
    assert_eq!(compiled.status[0].regions, [Share { name: name("eu"), permille: 1_000 }]);
}

#[test]
fn a_spill_moves_its_share_and_no_more() {
    let desired = desired(json!({"slow_start_s": 30}));
    let mut host = Host::new("eu");
    host.steer(&[("eu", 1_000)], &[]);
    host.compile(&desired);
    let (before, _) = host.compile(&desired);
    host.steer(&[("eu", 700), ("us", 300)], &[]);
    let (after, compiled) = host.compile(&desired);
    assert_eq!(shares(&after), [("eu-1", 350), ("eu-2", 350), ("us-1", 150), ("us-2", 150)].into());
    assert!(compiled.status[0].backends.iter().all(|b| b.slow_start_percent.is_none()), "they are not new");
    let moved = |a: &[String], b: &[String]| a.iter().zip(b).filter(|(a, b)| a != b).count();
    let away = after.iter().filter(|owner| owner.starts_with("us")).count();
    // Slots that an excluded region left to the others are reassigned, so a few more move.
    let all = moved(&before, &after);
    assert!((away..=away + away / 10).contains(&all), "{all} slots move for {away}");
    // The previous owner is kept for flows without an entry.
    let slots = compiled.plan.services[&0].slots();
    assert!(slots.iter().zip(before.iter().zip(&after)).all(|(s, (a, b))| (a != b) == s.is_transition()));
    host.steer(&[("eu", 675), ("us", 325)], &[]);
    let (step, _) = host.compile(&desired);
    let more = moved(&after, &step);
    assert!((98..=130).contains(&more), "a step of 25 ‰ moves {more} of 4099 slots");
    host.steer(&[("eu", 1_000)], &[]);
    assert_eq!(host.compile(&desired).0, before, "and all come back to their old places");
}

#[test]
fn residency_fails_closed_whatever_was_decided() {
    let bound = desired(json!({"regions": {"allowed": ["eu"]}, "panic_percent": 100}));
    let mut host = Host::new("us");
    host.steer(&[("us", 1_000)], &[]);
    let (slots, compiled) = host.compile(&bound);
    assert_eq!(shares(&slots), [("eu-1", 500), ("eu-2", 500)].into());
    let us = compiled.status[0].backends.iter().find(|b| b.name == Some(name("us-1"))).unwrap();
    assert_eq!(us.excluded.as_deref(), Some("residency: only eu, not us"));
    // Established flows and packets that a worker sends on do not reach it either.
    let entry = compiled.plan.backends[&us.index];
    assert_eq!((entry.mode, entry.flags & flags::DOWN), (mode::FORBIDDEN, flags::DOWN));
    let open = compiled.plan.backends.values().filter(|b| b.mode == mode::IPIP && b.flags & flags::DOWN == 0);
    assert_eq!(open.count(), 2);
    for backend in ["eu-1", "eu-2"] {
        host.observed.replicas.clear();
        host.health(backend, Health::Unhealthy);
    }
    // The panic rule ignores health, but not residency.
    assert_eq!(shares(&host.compile(&bound).0), [("eu-1", 500), ("eu-2", 500)].into());
    let calm = desired(json!({"regions": {"allowed": ["eu"]}}));
    let (_, compiled) = host.compile(&calm);
    let all_refused = compiled.plan.services[&0].slots().iter().all(|s| s.primary_index() == NO_BACKEND);
    assert!(all_refused && compiled.status[0].eligible == 0);
    let by_residency = |c: &Compiled| c.plan.services[&0].view.flags & REFUSED_BY_RESIDENCY != 0;
    assert!(by_residency(&compiled));
    host.health("eu-1", Health::Healthy);
    assert!(!by_residency(&host.compile(&calm).1));
    host.health("eu-1", Health::Unhealthy);
    // Without the rule no backend takes flows either, but for another reason.
    for backend in ["us-1", "us-2", "uk-1"] {
        host.health(backend, Health::Unhealthy);
    }
    let (_, unbound) = host.compile(&desired(json!({})));
    assert!(unbound.status[0].eligible == 0 && !by_residency(&unbound));
    for backend in ["us-1", "us-2", "uk-1"] {
        host.health(backend, Health::Healthy);
    }
    // Under residency, a backend without a region belongs to no region.
    let mut unplaced = calm.clone();
    let service = unplaced.service_mut(&name("s")).unwrap();
    service.backends.get_mut(&name("us-1")).unwrap().region = None;
    assert!(host.compile(&unplaced).0.iter().all(String::is_empty));
}

#[test]
fn a_draining_region_takes_nothing_new_and_keeps_what_it_has() {
    let mut state = desired(json!({}));
    let mut host = Host::new("eu");
    host.compile(&state);
    state.regions.extend(["eu", "uk", "us"].map(|r| (name(r), Default::default())));
    state.regions.get_mut(&name("eu")).unwrap().state = lb_userspace::desired::model::RegionState::Draining;
    let (slots, compiled) = host.compile(&state);
    assert_eq!(shares(&slots), [("uk-1", 1_000)].into());
    let eu = compiled.status[0].backends.iter().find(|b| b.name == Some(name("eu-1"))).unwrap();
    assert_eq!(eu.excluded.as_deref(), Some("region eu drains"));
    let entry = compiled.plan.backends[&eu.index];
    assert_eq!((entry.mode, entry.flags & (flags::DRAINING | flags::DOWN)), (mode::IPIP, flags::DRAINING));
    assert!(compiled.plan.services[&0].slots().iter().all(|s| s.is_transition()));
}

#[test]
fn a_new_version_has_its_share_until_it_is_promoted_or_aborted() {
    let rollout = |state: &str| {
        desired(json!({"replica": {"kind": "stream"},
            "rollout": {"model": "m", "version": "v2", "permille": 50, "state": state}}))
    };
    let mut host = Host::new("eu");
    host.steer(&[("eu", 1_000)], &["eu-2"]);
    assert_eq!(shares(&host.compile(&rollout("running")).0), [("eu-1", 950), ("eu-2", 50)].into());
    assert_eq!(shares(&host.compile(&rollout("promoted")).0), [("eu-2", 1_000)].into());
    assert_eq!(shares(&host.compile(&rollout("aborted")).0), [("eu-1", 1_000)].into());
    host.health("eu-1", Health::Unhealthy);
    assert_eq!(
        shares(&host.compile(&rollout("aborted")).0),
        [("uk-1", 1_000)].into(),
        "better far than wrong"
    );
}

#[test]
fn a_roll_out_that_is_limited_to_regions_leaves_the_others_alone() {
    let rollout = |regions: Value| {
        desired(json!({"replica": {"kind": "stream"}, "rollout": {"model": "m", "version": "v2",
            "permille": 200, "regions": regions}}))
    };
    let mut host = Host::new("eu");
    host.steer(&[("eu", 500), ("us", 500)], &["eu-2", "us-2"]);
    assert_eq!(
        shares(&host.compile(&rollout(json!(["eu"]))).0),
        [("eu-1", 400), ("eu-2", 100), ("us-1", 500)].into()
    );
    assert_eq!(
        shares(&host.compile(&rollout(json!(["eu", "us"]))).0),
        [("eu-1", 400), ("eu-2", 100), ("us-1", 400), ("us-2", 100)].into(),
        "widened"
    );
    // All that is left in a region runs a version that may not be used there: the old one elsewhere takes its flows.
    host.health("us-1", Health::Unhealthy);
    assert_eq!(shares(&host.compile(&rollout(json!(["eu"]))).0), [("eu-1", 900), ("eu-2", 100)].into());
}

#[test]
fn a_host_that_starts_relives_the_past_of_its_own_region() {
    let desired = Arc::new(desired(json!({})));
    let mut host = Host::new("us");
    let past = [Past { from_ms: -10_000, desired: desired.clone() }];
    host.memory.replay_history(&past, &host.settings, 1_000);
    let (slots, compiled) = host.compile(&desired);
    assert_eq!(shares(&slots), [("us-1", 500), ("us-2", 500)].into());
    assert_eq!(compiled.status[0].transition_slots, 0, "nothing has changed, so nothing is in transition");
}
