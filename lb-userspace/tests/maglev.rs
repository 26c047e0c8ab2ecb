//! Properties of Maglev tables: exact shares, few moves, no dependence on order.
#![allow(missing_docs, clippy::unwrap_used)]

use lb_userspace::{
    desired::model::{Backend, Desired, Name, Service},
    plan::maglev::{Member, NONE, SeatChange, Table, build, rebuild},
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const SIZE: u32 = 65_537;

fn member(i: u32, weight: u32) -> Member {
    Member { seat: i, weight, eligible: true }
}

fn equal(count: u32) -> Vec<Member> {
    (0..count).map(|i| member(i, 1)).collect()
}

fn shares(owners: &[u16], count: usize) -> Vec<u32> {
    let mut shares = vec![0; count];
    for &owner in owners {
        shares[owner as usize] += 1;
    }
    shares
}

fn ideal(members: &[Member]) -> Vec<f64> {
    let weight = |m: &Member| if m.eligible { f64::from(m.weight) } else { 0.0 };
    let sum: f64 = members.iter().map(weight).sum();
    members.iter().map(|m| weight(m) * f64::from(SIZE) / sum).collect()
}

/// Number of slots whose owner's seat differs.
fn moved(a: (&[u16], &[Member]), b: (&[u16], &[Member])) -> usize {
    let seat = |members: &[Member], i: u16| members.get(i as usize).map(|m| m.seat);
    a.0.iter().zip(b.0).filter(|&(&x, &y)| seat(a.1, x) != seat(b.1, y)).count()
}

fn check_well_formed(table: &Table, members: &[Member]) {
    let eligible = members.iter().filter(|m| m.eligible && m.weight > 0).count();
    for (&p, &s) in table.primary.iter().zip(&table.secondary) {
        assert!(members[p as usize].eligible && members[p as usize].weight > 0);
        if eligible == 1 {
            assert_eq!(s, NONE);
        } else {
            assert!(s != p && members[s as usize].eligible && members[s as usize].weight > 0);
        }
    }
}

fn members_strategy(most: usize) -> impl Strategy<Value = Vec<Member>> {
    let one = (0u32..2_000, (1u32..=1_000, prop::bool::weighted(0.9)));
    prop::collection::vec(one, 1..most).prop_map(|all| {
        let all: std::collections::BTreeMap<_, _> = all.into_iter().collect();
        let mut members: Vec<_> =
            all.into_iter().map(|(seat, (weight, eligible))| Member { seat, weight, eligible }).collect();
        members[0].eligible = true;
        members
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_slot_has_an_eligible_owner_and_shares_are_exact(members in members_strategy(1_000), seed: [u64; 2]) {
        let table = build(seed, SIZE, &[], &members);
        check_well_formed(&table, &members);
        let whole = members.iter().all(|m| m.eligible);
        for ((i, share), ideal) in shares(&table.primary, members.len()).into_iter().enumerate().zip(ideal(&members)) {
            let off = (f64::from(share) - ideal).abs();
            // Largest remainder: within one slot. Shares after changes start from another rounding: within two.
            prop_assert!(off < if whole { 1.0 } else { 2.0 }, "member {}: {} slots instead of {:.1}", i, share, ideal);
        }
    }

    /// Weights change, and others leave, at once: a seat whose weight fell by less than those of others gains slots.
    #[test]
    fn shares_are_exact_whatever_changed_at_once(
        members in members_strategy(60), before in prop::collection::vec(1u32..=1_000, 60), seed: [u64; 2],
    ) {
        let history: Vec<SeatChange> = members.iter().zip(before).map(|(m, weight)| (m.seat, weight)).collect();
        let table = build(seed, SIZE, &history, &members);
        check_well_formed(&table, &members);
        for ((i, share), ideal) in shares(&table.primary, members.len()).into_iter().enumerate().zip(ideal(&members)) {
            let off = (f64::from(share) - ideal).abs();
            prop_assert!(off < 3.0, "member {}: {} slots instead of {:.1}", i, share, ideal);
        }
    }

    #[test]
    fn the_order_of_the_members_does_not_matter(members in members_strategy(200), seed: [u64; 2], by in any::<prop::sample::Index>()) {
        let mut other = members.clone();
        other.rotate_left(by.index(members.len()));
        other.reverse();
        let (a, b) = (build(seed, 4_093, &[], &members), build(seed, 4_093, &[], &other));
        prop_assert_eq!(moved((&a.primary, &members), (&b.primary, &other)), 0);
        prop_assert_eq!(moved((&a.secondary, &members), (&b.secondary, &other)), 0);
    }

    #[test]
    fn a_table_made_again_is_the_same(
        members in members_strategy(60),
        seed: [u64; 2],
        changes in prop::collection::vec((any::<prop::sample::Index>(), 1u32..=1_000, 0..8), 1..20),
    ) {
        let (mut members, mut history, mut known) = (members, Vec::<SeatChange>::new(), None);
        for (which, weight, kind) in changes {
            let at = which.index(members.len());
            match kind {
                // Seats are taken and left less often than weights and health change.
                0 => history = members.iter().map(|m| (m.seat, m.weight)).collect(),
                1 if members.len() > 1 => drop(members.remove(at)),
                2 | 3 => members[at].eligible ^= true,
                _ => members[at].weight = weight,
            }
            let again = rebuild(seed, 4_093, &history, &members, &mut known);
            prop_assert_eq!(again, build(seed, 4_093, &history, &members));
        }
    }

    #[test]
    fn a_member_that_fails_or_drains_moves_its_own_slots_only(count in 2u32..=1_000, which in any::<prop::sample::Index>(), weights in prop::collection::vec(1u32..100, 1_000), seed: [u64; 2]) {
        let members: Vec<_> = (0..count).map(|i| member(i, weights[i as usize])).collect();
        let mut fewer = members.clone();
        let gone = which.index(members.len());
        fewer[gone].eligible = false;
        let (a, b) = (build(seed, SIZE, &[], &members), build(seed, SIZE, &[], &fewer));
        let share = shares(&a.primary, members.len())[gone] as usize;
        prop_assert_eq!(moved((&a.primary, &members), (&b.primary, &fewer)), share);
    }
}

fn sum(slots: &[u16]) -> u64 {
    slots.iter().fold(0, |sum, &slot| (sum ^ u64::from(slot)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Hosts of different builds must agree on every slot: a change of these numbers moves flows while hosts are upgraded
/// one after another.
#[test]
fn tables_are_what_they_have_always_been() {
    let sums = [3, 100, 1_000, 5_000].map(|count| {
        let mut members: Vec<Member> = (0..count).map(|i| member(i, 1 + i * 7 % 100)).collect();
        members[1].eligible = false;
        let table = build([1, 2], SIZE, &[], &members);
        (sum(&table.primary), sum(&table.secondary))
    });
    let known = [
        (0x0dae_9213_80dd_0b8e, 0xafd7_56ba_173c_3f48),
        (0x35a8_ff1f_b09d_a2fd, 0xcb90_d66f_0982_a8bd),
        (0xe02b_6981_58e3_9926, 0xefd0_cc92_97c8_7cd8),
        (0xa020_79e0_f77e_8b29, 0xaf79_ad51_0757_1c5e),
    ];
    assert_eq!(sums, known);
}

/// Fixed tables for each way of finding the giving seats, with a history: hosts of different builds must agree.
#[test]
fn tables_with_a_history_are_what_they_have_always_been() {
    type Weight = fn(u32) -> u32;
    let cases: [(u32, Weight, bool); 6] = [
        (1_000, |_| 1, false),
        (10_000, |_| 1, false),
        (1_000, |i| 1 + i % 3, true),
        (1_000, |i| 1 + i * 7 % 100, true),
        (1_000, |i| 1 + i * i % 65_535, true),
        (10_000, |i| 1 + i * 7 % 100, false),
    ];
    let sums = cases.map(|(count, weight, has_history)| {
        let mut members: Vec<Member> = (0..count).map(|i| member(i, weight(i))).collect();
        let mut history: Vec<SeatChange> = Vec::new();
        if has_history {
            history.extend(members.iter().map(|m| (m.seat, m.weight)));
            // Some seats leave, half of them return, others change their weights or fail.
            history.extend((0..count).filter(|i| i % 11 == 3).map(|i| (i, 0)));
            history.extend((0..count).filter(|i| i % 22 == 3).map(|i| (i, 5)));
            members.retain(|m| m.seat % 11 != 3 || m.seat % 22 == 3);
            members.iter_mut().filter(|m| m.seat % 22 == 3).for_each(|m| m.weight = 5);
            members.iter_mut().filter(|m| m.seat % 100 == 50).for_each(|m| m.weight += 40);
            members.iter_mut().filter(|m| m.seat % 300 == 77).for_each(|m| m.eligible = false);
        }
        let table = build([3, 4], SIZE, &history, &members);
        (sum(&table.primary), sum(&table.secondary))
    });
    let known = [
        (0x0d26_eac5_2efe_4b15, 0xc850_194f_2510_3697),
        (0xb131_a4c6_a0dd_4ed2, 0xd562_b53b_f31f_bc0f),
        (0x1bb4_961c_62eb_782b, 0x78eb_694f_b677_33ab),
        (0x35f8_c87d_21b9_d547, 0x82be_5959_a681_ff0b),
        (0xd82d_a359_7ebf_af5d, 0xaa6e_54fe_40b0_da10),
        (0x30ec_b12c_71c1_85b1, 0xe369_e002_e2ea_481f),
    ];
    assert_eq!(sums, known);
}

#[test]
fn equal_weights_differ_by_one_slot_at_most() {
    for count in [1, 2, 3, 7, 10, 64, 100, 333, 1_000] {
        let shares = shares(&build([3, 4], SIZE, &[], &equal(count)).primary, count as usize);
        assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{count}");
    }
}

/// A state with one service and its compiled table, with seats as the daemon assigns them.
#[derive(Clone)]
struct Fleet {
    state: Desired,
    down: BTreeSet<u32>,
}

fn number(name: &Name) -> u32 {
    name.to_string()[1..].parse().unwrap()
}

impl Fleet {
    fn new(weights: impl IntoIterator<Item = u32>) -> Self {
        let mut fleet = Self { state: service(&[]), down: BTreeSet::new() };
        fleet.change(|backends| {
            backends.extend(weights.into_iter().zip(0..).map(|(weight, i)| backend(i, weight)));
        });
        fleet
    }

    fn change(&mut self, change: impl FnOnce(&mut BTreeMap<Name, Backend>)) {
        let old = self.state.clone();
        change(&mut self.service().backends);
        self.state.assign_seats(&old);
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut other = self.clone();
        change(&mut other);
        other
    }

    fn add(&mut self, i: u32, weight: u32) {
        self.change(|backends| backends.extend([backend(i, weight)]));
    }

    fn remove(&mut self, i: u32) {
        self.change(|backends| {
            backends.remove(&name(i));
        });
    }

    fn service(&mut self) -> &mut Service {
        self.state.service_mut(&"s".parse().unwrap()).unwrap()
    }

    fn weights(&mut self) -> BTreeMap<u32, u32> {
        let down = self.down.clone();
        let all = self.service().backends.iter().map(|(name, b)| (number(name), b.weight));
        all.filter(|(i, weight)| *weight > 0 && !down.contains(i)).collect()
    }

    /// Owner of each slot, as the number of a backend.
    fn owners(&mut self, seed: [u64; 2]) -> Vec<u32> {
        let down = self.down.clone();
        let service = self.service();
        let numbers: Vec<u32> = service.backends.keys().map(number).collect();
        let weights = service.backends.values().map(|b| b.weight);
        let members: Vec<_> = (service.seats().into_iter().zip(weights).zip(&numbers))
            .map(|((seat, weight), i)| Member { seat, weight, eligible: !down.contains(i) })
            .collect();
        let table = build(seed, SIZE, &service.seating, &members);
        check_well_formed(&table, &members);
        table.primary.into_iter().map(|i| numbers[i as usize]).collect()
    }

    /// A backend's exact share of the slots; None if it takes no flows.
    fn share(&mut self, i: u32) -> Option<f64> {
        let weights = self.weights();
        let sum: f64 = weights.values().map(|&w| f64::from(w)).sum();
        weights.get(&i).map(|&weight| f64::from(weight) * f64::from(SIZE) / sum)
    }

    /// Number of slots that a change to another state moves: the worst of a few seeds. Shares are exact before and after.
    fn moved_to(&mut self, after: &mut Self) -> f64 {
        let mut worst = 0;
        for seed in 5..8 {
            let owners = [&mut *self, &mut *after].map(|fleet| {
                let owners = fleet.owners([seed, 6]);
                let mut counts = BTreeMap::<u32, u32>::new();
                owners.iter().for_each(|&i| *counts.entry(i).or_default() += 1);
                let weights = fleet.weights();
                let sum: f64 = weights.values().map(|&w| f64::from(w)).sum();
                for (i, &weight) in &weights {
                    let (count, ideal) =
                        (counts.get(i).copied().unwrap_or(0), f64::from(weight) * f64::from(SIZE) / sum);
                    assert!(
                        (f64::from(count) - ideal).abs() <= 1.0,
                        "{i} has {count} slots instead of {ideal:.2}"
                    );
                }
                owners
            });
            worst = worst.max(owners[0].iter().zip(&owners[1]).filter(|(a, b)| a != b).count());
        }
        worst as f64
    }
}

fn name(i: u32) -> Name {
    format!("b{i:05}").parse().unwrap()
}

fn backend(i: u32, weight: u32) -> (Name, Backend) {
    let address = std::net::Ipv4Addr::from(0x0a01_0000 + i);
    (name(i), serde_json::from_value(serde_json::json!({ "address": address, "weight": weight })).unwrap())
}

fn service(backends: &[(Name, Backend)]) -> Desired {
    let bare = serde_json::json!({ "vip": "10.0.0.1", "port": 80, "protocol": "tcp" });
    let mut service: Service = serde_json::from_value(bare).unwrap();
    service.backends.extend(backends.iter().cloned());
    Desired { services: [("s".parse().unwrap(), std::sync::Arc::new(service))].into(), ..Desired::default() }
}

/// Adding, removing, returning, failing, draining or replacing one backend moves only its own slots, whatever the history,
/// number and weights of backends. A share of few slots may move one more.
#[test]
fn one_change_moves_one_share() {
    let weights: [(&str, fn(u32) -> u32); 3] =
        [("equal", |_| 1), ("1 to 10", |i| 1 + mixed(i) % 10), ("1 to 100", |i| 1 + mixed(i) % 100)];
    for count in [2, 3, 10, 30, 100, 300, 1_000] {
        for (kind, weight) in weights {
            let mut all = Fleet::new((0..count).map(weight));
            let middle = count / 2;
            let holes = all.with(|f| (0..count / 7).for_each(|i| f.remove(i * 7 + 1)));
            let kept = (0..count).rev().find(|i| i % 7 != 1 && *i != middle).unwrap();
            let failed = all.with(|f| f.down.extend([middle]));
            let removed = all.with(|f| f.remove(middle));
            let mut cases = vec![
                ("add", all.clone(), all.with(|f| f.add(count, weight(count))), count, 1.2),
                ("remove the last", all.clone(), all.with(|f| f.remove(count - 1)), count - 1, 1.2),
                ("remove a middle one", all.clone(), removed.clone(), middle, 1.2),
                (
                    "bring it back",
                    removed.clone(),
                    removed.with(|f| f.add(middle, weight(middle))),
                    middle,
                    1.2,
                ),
                (
                    "replace it by one of another weight",
                    removed.clone(),
                    removed.with(|f| f.add(count, 5)),
                    count,
                    1.2,
                ),
                ("fail or drain", all.clone(), failed.clone(), middle, 1.2),
                ("recover", failed.clone(), all.clone(), middle, 1.2),
                ("remove what has drained", failed.clone(), failed.with(|f| f.remove(middle)), middle, 0.0),
            ];
            if count >= 10 {
                cases.extend([
                    (
                        "add after others left",
                        holes.clone(),
                        holes.with(|f| f.add(count, weight(count))),
                        count,
                        1.2,
                    ),
                    ("remove after others left", holes.clone(), holes.with(|f| f.remove(kept)), kept, 1.2),
                ]);
            }
            for (what, mut before, mut after, which, bound) in cases {
                let share =
                    before.share(which).or_else(|| after.share(which)).or_else(|| all.share(which)).unwrap();
                let moved = before.moved_to(&mut after);
                println!("{count} {kind}, {what}: {moved} of {share:.1}: {:.3}", moved / share);
                assert!(moved <= bound * share + 1.0, "{count} {kind}, {what}: {moved} of {share}");
            }
        }
    }
}

fn mixed(i: u32) -> u32 {
    let x = i.wrapping_mul(0x9e37_79b9);
    (x ^ x >> 15).wrapping_mul(0x85eb_ca6b) >> 7
}

/// A change of weight moves the difference of the shares.
#[test]
fn another_weight_moves_the_difference() {
    for count in [10u32, 100, 1_000] {
        let mut before = Fleet::new((0..count).map(|i| 10 + mixed(i) % 20));
        for which in [count / 2, count - 1] {
            let mut after = before.with(|f| {
                f.change(|backends| backends.get_mut(&name(which)).unwrap().weight += 20);
            });
            let difference = after.share(which).unwrap() - before.share(which).unwrap();
            let moved = before.moved_to(&mut after);
            println!("{count}: {moved} of {difference:.1}");
            assert!(moved <= 1.2 * difference + 1.0, "{count}: {moved} of {difference}");
        }
    }
}

/// With several backends down at once, their slots are partly reassigned. Prints and bounds the number.
#[test]
fn with_others_down_one_more_moves_more() {
    for (count, down) in [(100u32, 5u32), (1_000, 5), (1_000, 100)] {
        let mut before = Fleet::new((0..count).map(|_| 1));
        before.down = (0..count).filter(|i| i % (count / down) == 1).collect();
        let mut after = before.with(|f| f.down.extend([count / 3]));
        let (moved, share) = (before.moved_to(&mut after), before.share(count / 3).unwrap());
        println!("{down} of {count} down: {:.3} shares", moved / share);
        assert!(moved <= 5.0 * share + 1.0, "{count}, {down}: {moved} of {share}");
    }
}

/// Very many seats, and seats beyond the limit.
#[test]
fn odd_seats_still_make_a_table() {
    let all: Vec<Member> = (0..5_000).map(|i| member(i * 13, 1 + i % 3)).collect();
    check_well_formed(&build([1, 2], SIZE, &[], &all), &all);
    let odd: Vec<Member> = [u32::MAX, 7, 70_000].into_iter().map(|seat| member(seat, 1)).collect();
    let table = build([1, 2], SIZE, &[], &odd);
    check_well_formed(&table, &odd);
    assert!(shares(&table.primary, 3).iter().all(|&s| s.abs_diff(SIZE / 3) <= 1));
}
