//! Rules of the announcement, and the handover between hosts that see each other late.

use super::*;
use VipDecision::{Draining, HandedOver, Kept as KeptOn, NoBackend, Served, Unproven};
use proptest::prelude::*;

const DRAIN_MS: u64 = 60_000;
const SPREAD_MS: u64 = 3;

fn vip(n: u8) -> IpAddr {
    IpAddr::from([10, 99, 0, n])
}

fn at(n: u8, served: bool, proven: bool) -> ServiceAt {
    ServiceAt {
        panics: false,
        vip: vip(n),
        served,
        proven,
        keeps: true,
        resets: false,
        has_flows: false,
        drain_ms: DRAIN_MS,
        spread_ms: SPREAD_MS,
    }
}

fn now(ms: u64) -> Now {
    Now { boot_ms: ms, unix_ms: 1_000_000 + ms }
}

fn alone(policy: &mut VipPolicy, services: &[ServiceAt], on: &[u8], ms: u64) -> Vec<VipDecision> {
    let on = on.iter().map(|&n| vip(n)).collect();
    policy.decide(services, &on, false, &BTreeMap::new(), now(ms)).into_values().collect()
}

fn policy() -> VipPolicy {
    VipPolicy::new("a".to_owned())
}

#[test]
fn a_vip_is_on_while_any_of_its_services_is_served() {
    let services = [at(1, false, false), at(1, true, true), at(2, false, false), at(2, false, false)];
    assert_eq!(alone(&mut policy(), &services, &[], 0), [Served, NoBackend]);
    assert_eq!(alone(&mut policy(), &services, &[1, 2], 0), [Served, KeptOn]);
}

#[test]
fn without_proof_a_vip_is_not_put_on_but_one_that_is_on_stays() {
    let services = [at(1, true, false), at(2, true, false), at(2, false, false)];
    assert_eq!(alone(&mut policy(), &services, &[1], 0), [Served, Unproven]);
}

#[test]
fn a_host_that_drains_has_none() {
    let services = [at(1, true, true), at(2, false, false)];
    let found = policy().decide(&services, &BTreeSet::from([vip(1), vip(2)]), true, &BTreeMap::new(), now(0));
    assert_eq!(found.into_values().collect::<Vec<_>>(), [Draining, Draining]);
}

#[test]
fn the_last_host_keeps_a_vip_for_the_drain_time_and_while_it_has_flows() {
    let (mut policy, gone) = (policy(), [at(1, false, false)]);
    let flows = [ServiceAt { has_flows: true, ..gone[0] }];
    assert_eq!(alone(&mut policy, &[at(1, true, true)], &[1], 0), [Served]);
    assert_eq!(alone(&mut policy, &gone, &[1], 1_000), [KeptOn]);
    let kept = policy.kept(vip(1)).unwrap();
    assert_eq!((kept.since_ms, kept.until_ms), (1_001_000, 1_061_000));
    assert_eq!(kept.describe(1_011_000), "for 10 s, at least 50 s more, then while flows remain");
    assert_eq!(kept.describe(1_071_000), "for 70 s, and while flows remain");
    assert_eq!(alone(&mut policy, &gone, &[1], 60_999), [KeptOn]);
    assert_eq!(policy.next_expiry(), Some(Duration::from_millis(1)));
    assert_eq!(alone(&mut policy, &flows, &[1], 900_000), [KeptOn], "flows hold it");
    assert_eq!(policy.next_expiry(), None);
    assert_eq!(alone(&mut policy, &gone, &[1], 900_001), [NoBackend]);
    assert_eq!(alone(&mut policy, &gone, &[], 900_002), [NoBackend], "off, it stays off");
    assert_eq!(policy.kept(vip(1)), None);
    // Served in between: the time begins anew.
    assert_eq!(alone(&mut policy, &[at(1, true, true)], &[1], 900_003), [Served]);
    assert_eq!(alone(&mut policy, &gone, &[1], 900_004), [KeptOn]);
}

#[test]
fn a_vip_is_kept_only_for_services_that_ask_for_it() {
    let withdraws =
        ServiceAt { keeps: false, has_flows: true, drain_ms: 1_000 * DRAIN_MS, ..at(1, false, false) };
    assert_eq!(alone(&mut policy(), &[withdraws], &[1], 0), [NoBackend]);
    let (mut policy, both) = (policy(), [withdraws, at(1, false, false)]);
    assert_eq!(alone(&mut policy, &both, &[1], 0), [KeptOn], "another service keeps it");
    assert_eq!(alone(&mut policy, &both, &[1], DRAIN_MS), [NoBackend], "for its own time and flows");
}

#[test]
fn a_vip_whose_clients_are_reset_is_kept_until_another_host_serves_it() {
    let (mut policy, gone) =
        (policy(), [ServiceAt { resets: true, ..at(1, false, false) }, at(1, false, false)]);
    assert_eq!(alone(&mut policy, &gone, &[1], 0), [KeptOn]);
    assert_eq!(alone(&mut policy, &gone, &[1], 100 * DRAIN_MS), [KeptOn]);
    let kept = policy.kept(vip(1)).unwrap();
    assert_eq!(kept.describe(1_060_000), "for 60 s, until a host serves it");
    let covers = BTreeMap::from([(vip(1), BTreeMap::from([("a".to_owned(), kept.since_ms)]))]);
    let peers = BTreeMap::from([("b".to_owned(), Handover { covers, ..Handover::default() })]);
    let on = BTreeSet::from([vip(1)]);
    policy.decide(&gone, &on, false, &peers, now(100 * DRAIN_MS));
    let later = policy.decide(&gone, &on, false, &peers, now(101 * DRAIN_MS));
    assert_eq!(later[&vip(1)], VipDecision::HandedOver);
}

#[test]
fn flows_of_another_host_that_keeps_the_vip_count() {
    let (mut policy, gone, on) = (policy(), [at(1, false, false)], BTreeSet::from([vip(1)]));
    let kept = KeptVip { since_ms: 1, until_ms: 2, has_flows: true, resets: false };
    let peer = Handover { kept: BTreeMap::from([(vip(1), kept)]), ..Handover::default() };
    let peers = BTreeMap::from([("b".to_owned(), peer)]);
    policy.decide(&gone, &on, false, &peers, now(0));
    assert_eq!(policy.decide(&gone, &on, false, &peers, now(10 * DRAIN_MS))[&vip(1)], KeptOn);
    assert_eq!(policy.decide(&gone, &on, false, &BTreeMap::new(), now(10 * DRAIN_MS))[&vip(1)], NoBackend);
}

#[test]
fn only_a_cover_for_this_very_time_lets_a_host_withdraw() {
    let (mut a, mut b) = (policy(), VipPolicy::new("b".to_owned()));
    let on = BTreeSet::from([vip(1)]);
    let (gone, served) = ([at(1, false, false)], [at(1, true, true)]);
    let told = |policy: &VipPolicy, name: &str, peers: &BTreeMap<String, Handover>| {
        BTreeMap::from([(name.to_owned(), policy.handover(&on, peers))])
    };
    // A host that serves covers nobody before it has heard that somebody keeps the VIP.
    b.decide(&served, &on, false, &BTreeMap::new(), now(0));
    let of_b = told(&b, "b", &BTreeMap::new());
    assert_eq!(a.decide(&gone, &on, false, &of_b, now(0))[&vip(1)], KeptOn);
    let of_a = told(&a, "a", &of_b);
    b.decide(&served, &on, false, &of_a, now(1));
    let of_b = told(&b, "b", &of_a);
    // It must stand for the spread, without interruption.
    assert_eq!(a.decide(&gone, &on, false, &of_b, now(2))[&vip(1)], KeptOn);
    assert_eq!(a.next_expiry(), Some(Duration::from_millis(SPREAD_MS)));
    assert_eq!(a.decide(&gone, &on, false, &BTreeMap::new(), now(4))[&vip(1)], KeptOn);
    assert_eq!(a.decide(&gone, &on, false, &of_b, now(5))[&vip(1)], KeptOn);
    assert_eq!(a.decide(&gone, &on, false, &of_b, now(7))[&vip(1)], KeptOn);
    assert_eq!(a.decide(&gone, &on, false, &of_b, now(8))[&vip(1)], HandedOver);
    // The same cover is worth nothing once the VIP was served in between.
    assert_eq!(a.decide(&served, &on, false, &of_b, now(9))[&vip(1)], Served);
    assert_eq!(a.decide(&gone, &on, false, &of_b, now(9))[&vip(1)], KeptOn);
    assert_eq!(a.decide(&gone, &on, false, &of_b, now(99))[&vip(1)], KeptOn);
    // A host without proof, or without the VIP, covers nobody.
    b.decide(&[at(1, true, false)], &on, false, &of_a, now(4));
    assert_eq!(b.handover(&on, &of_a), Handover::default());
    b.decide(&served, &on, false, &of_a, now(5));
    assert_eq!(b.handover(&BTreeSet::new(), &of_a), Handover::default());
}

/// A host of the simulated fleet.
struct Member {
    policy: VipPolicy,
    served: bool,
    is_on: bool,
    told: Handover,
    /// Publications of the others as they have arrived here.
    seen: BTreeMap<String, Handover>,
}

/// Hosts, and publications on their way: each reader gets those of one writer in order, at any time.
struct Fleet {
    members: Vec<Member>,
    /// By reader and writer.
    underway: BTreeMap<(usize, usize), std::collections::VecDeque<Handover>>,
    ms: u64,
}

impl Fleet {
    fn new(count: usize) -> Self {
        let member = |i: usize| Member {
            policy: VipPolicy::new(format!("h{i}")),
            served: true,
            is_on: true,
            told: Handover::default(),
            seen: BTreeMap::new(),
        };
        Self { members: (0..count).map(member).collect(), underway: BTreeMap::new(), ms: 0 }
    }

    /// A host decides and publishes, as the announcer does.
    fn turn(&mut self, i: usize) {
        let (count, ms) = (self.members.len(), self.ms);
        let member = &mut self.members[i];
        let service = ServiceAt { has_flows: true, ..at(1, member.served, member.served) };
        let on: BTreeSet<IpAddr> = member.is_on.then(|| vip(1)).into_iter().collect();
        let decisions = member.policy.decide(&[service], &on, false, &member.seen, now(ms));
        member.is_on = decisions[&vip(1)].is_on();
        let up: BTreeSet<IpAddr> = member.is_on.then(|| vip(1)).into_iter().collect();
        let told = member.policy.handover(&up, &member.seen);
        if told != member.told {
            member.told = told.clone();
            for reader in (0..count).filter(|&reader| reader != i) {
                self.underway.entry((reader, i)).or_default().push_back(told.clone());
            }
        }
    }

    fn deliver(&mut self, reader: usize, writer: usize) {
        if let Some(told) = self.underway.get_mut(&(reader, writer)).and_then(|queue| queue.pop_front()) {
            self.members[reader].seen.insert(format!("h{writer}"), told);
        }
    }

    /// Delivers and decides until nothing changes.
    fn settle(&mut self) {
        for _ in 0..20 {
            self.ms += SPREAD_MS;
            for i in 0..self.members.len() {
                (0..self.members.len()).for_each(|writer| {
                    while self.underway.get(&(i, writer)).is_some_and(|q| !q.is_empty()) {
                        self.deliver(i, writer);
                    }
                });
                self.turn(i);
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Serves(usize, bool),
    AllStop,
    Turn(usize),
    Deliver(usize, usize),
    Time(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..4usize, any::<bool>()).prop_map(|(i, on)| Step::Serves(i, on)),
        1 => Just(Step::AllStop),
        6 => (0..4usize).prop_map(Step::Turn),
        8 => (0..4usize, 0..4usize).prop_map(|(to, from)| Step::Deliver(to, from)),
        2 => (0..6u64).prop_map(Step::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn hosts_that_hear_each_other_late_never_all_withdraw(count in 2..5usize, steps in prop::collection::vec(step(), 1..120)) {
        let mut fleet = Fleet::new(count);
        for step in steps {
            match step {
                Step::Serves(i, served) => fleet.members[i % count].served = served,
                Step::AllStop => fleet.members.iter_mut().for_each(|m| m.served = false),
                Step::Turn(i) => fleet.turn(i % count),
                Step::Deliver(to, from) => fleet.deliver(to % count, from % count),
                Step::Time(ms) => fleet.ms += ms,
            }
            prop_assert!(fleet.members.iter().any(|m| m.is_on), "nobody announces the VIP after {step:?}");
        }
        // Once views agree, exactly the hosts that serve announce it, if there is one.
        fleet.settle();
        if fleet.members.iter().any(|m| m.served) {
            for member in &fleet.members {
                prop_assert_eq!(member.is_on, member.served);
            }
        }
    }
}
