//! Every branch of `choose`, one row per case.
//!
//! Backends: 1 is the slot's primary, 2 its secondary, 3 the one that tables name (11 to 13 for UDP).

use crate::world::{TCP_SERVICE, UDP_SERVICE, UDP_TIMEOUT_S, headers, key, tables, tcp, udp};
use lb_common::{
    Flow, Reason, Slot,
    backend::flags::{DOWN, DRAINING, USED},
    flow::{SYN_TIMEOUT_S, TCP_IDLE_S, flags::CLOSING},
    service::{
        flags::{REFUSED_BY_RESIDENCY, REJECT, RESET_ON_DOWN, TRACK_ALL, UDP_STATELESS},
        scheduler::P2C,
    },
    settings::features,
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use lb_ebpf::{
    FlowTable::{self, Flows, Syns, UdpFlows},
    Tables,
    native::WhenFull,
    select::{
        choose::{
            Choice, KEEP,
            Why::{self, *},
            choose, choose_with,
        },
        hash::flow_hash,
    },
};

const STABLE: Slot = Slot { primary: 1, secondary: 2 };
const MARKED: Slot = Slot { primary: 1 | TRACKED, secondary: 2 };
const MOVING: Slot = Slot { primary: 1 | TRACKED, secondary: 2 | TRANSITION };
const NO_PRIMARY: Slot = Slot { primary: NO_BACKEND | TRACKED, secondary: 2 | TRANSITION };
const UDP_SLOT: Slot = Slot { primary: 11, secondary: 12 };

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const FIN: u8 = 0x11;
const RST: u8 = 0x04;

/// A flow-table entry: table, backend, age in seconds, flags.
type Entry = (FlowTable, u32, u32, u32);

struct Case {
    name: &'static str,
    slot: Slot,
    is_udp: bool,
    tcp_flags: u8,
    view_flags: u32,
    backends: Vec<(u32, u32)>,
    before: Vec<Entry>,
    full: bool,
    bare: bool,
    taking_over: bool,
    expect: Result<Choice, Reason>,
    after: Vec<Entry>,
    counted: Vec<(Reason, u64)>,
}

fn tcp_case(name: &'static str, slot: Slot, tcp_flags: u8) -> Case {
    Case {
        name,
        slot,
        is_udp: false,
        tcp_flags,
        view_flags: 0,
        backends: vec![],
        before: vec![],
        full: false,
        bare: false,
        taking_over: false,
        expect: Err(Reason::NoBackend),
        after: vec![],
        counted: vec![],
    }
}

fn udp_case(name: &'static str, slot: Slot) -> Case {
    Case { is_udp: true, ..tcp_case(name, slot, 0) }
}

impl Case {
    fn view(mut self, flags: u32) -> Self {
        self.view_flags = flags;
        self
    }
    /// Gives a backend these flags beside USED; `u32::MAX` removes it.
    fn backend(mut self, index: u32, flags: u32) -> Self {
        self.backends.push((index, flags));
        self
    }
    fn knows(mut self, table: FlowTable, backend: u32, age_s: u32, flags: u32) -> Self {
        self.before.push((table, backend, age_s, flags));
        self
    }
    fn full(mut self) -> Self {
        self.full = true;
        self
    }
    /// The packet carries no data.
    fn bare(mut self) -> Self {
        self.bare = true;
        self
    }
    /// Another ABI version's program still knows flows that these tables do not.
    fn taking_over(mut self) -> Self {
        self.taking_over = true;
        self
    }
    fn goes(mut self, backend: u32, why: Why) -> Self {
        self.expect = Ok(Choice { backend, is_new: false, why });
        self
    }
    fn starts(mut self, backend: u32, why: Why) -> Self {
        self.expect = Ok(Choice { backend, is_new: true, why });
        self
    }
    fn fails(mut self, reason: Reason) -> Self {
        self.expect = Err(reason);
        self
    }
    fn leaves(mut self, table: FlowTable, backend: u32, age_s: u32, flags: u32) -> Self {
        self.after.push((table, backend, age_s, flags));
        self
    }
    fn counts(mut self, reason: Reason) -> Self {
        self.counted.push((reason, 1));
        self
    }

    fn check(self) {
        let mut tables = if self.is_udp { tables(STABLE, self.slot) } else { tables(self.slot, UDP_SLOT) };
        let service = if self.is_udp { UDP_SERVICE } else { TCP_SERVICE };
        tables.services.get_mut(&service).unwrap().flags = self.view_flags;
        for (index, flags) in &self.backends {
            if *flags == u32::MAX {
                tables.backends.get_mut(index).unwrap().flags = 0;
            } else {
                tables.backends.get_mut(index).unwrap().flags = USED | flags;
            }
        }
        let mut packet = if self.is_udp { udp(40_000) } else { tcp(self.tcp_flags, 40_000) };
        if self.bare {
            packet.payload.clear();
        }
        let (key, now_s) = (key(&packet), tables.now_s());
        for (table, backend, age_s, flags) in &self.before {
            let last_seen_s = now_s.wrapping_sub(*age_s);
            let flow = Flow::new(*backend, last_seen_s, headers(&packet).sequence, *flags);
            assert!(tables.record(*table, &key, &flow));
        }
        if self.full {
            tables.capacity = 0;
            tables.when_full = WhenFull::Refuse;
        }
        tables.is_taking_over.set(self.taking_over);
        let view = tables.services[&service];
        let headers = headers(&packet);
        let hash = flow_hash(view.seed, &headers);
        let choice = choose_with(&tables, features::ALL | KEEP, service, &view, &headers, hash);
        assert_eq!(choice, self.expect, "{}: choice", self.name);
        let mut after = Vec::new();
        for table in [Flows, Syns, UdpFlows] {
            for (k, f) in tables.flows(table) {
                assert_eq!(k, key, "{}: no other flow is touched", self.name);
                after.push((table, f.backend, now_s.wrapping_sub(f.last_seen_s), f.flags & CLOSING));
            }
        }
        assert_eq!(after, self.after, "{}: flow tables", self.name);
        assert_eq!(tables.counts(), self.counted, "{}: counters", self.name);
    }
}

fn check(cases: Vec<Case>) {
    for case in cases {
        case.check();
    }
}

#[test]
fn a_stable_slot_answers_by_itself() {
    check(vec![
        tcp_case("syn", STABLE, SYN).starts(1, Primary),
        tcp_case("established", STABLE, ACK).goes(1, Primary),
        tcp_case("syn-ack is no new flow", STABLE, SYN_ACK).goes(1, Primary),
        tcp_case("fin", STABLE, FIN).goes(1, Primary),
        tcp_case("rst", STABLE, RST).goes(1, Primary),
        tcp_case("no lookup: an entry in FLOWS is not seen", STABLE, ACK)
            .knows(Flows, 3, 1, 0)
            .goes(1, Primary)
            .leaves(Flows, 3, 1, 0),
        tcp_case("no lookup: a note is not seen", STABLE, SYN)
            .knows(Syns, 3, 1, 0)
            .starts(1, Primary)
            .leaves(Syns, 3, 1, 0),
        tcp_case("empty slot", Slot::EMPTY, SYN).fails(Reason::NoBackend),
        tcp_case("empty slot, established", Slot::EMPTY, ACK).fails(Reason::NoBackend),
        tcp_case("empty slot, answered", Slot::EMPTY, SYN).view(REJECT).fails(Reason::NoBackendAnswered),
        tcp_case("empty slot, answered whatever residency says", Slot::EMPTY, ACK)
            .view(REJECT | REFUSED_BY_RESIDENCY)
            .fails(Reason::NoBackendAnswered),
        tcp_case("empty slot by residency", Slot::EMPTY, SYN)
            .view(REFUSED_BY_RESIDENCY)
            .fails(Reason::Residency),
        tcp_case("residency stops no flow that has a backend", MOVING, ACK)
            .view(REFUSED_BY_RESIDENCY)
            .goes(2, Previous)
            .leaves(Flows, 2, 0, 0)
            .counts(Reason::FlowPromoted),
    ]);
}

#[test]
fn a_syn_of_a_marked_slot() {
    check(vec![
        tcp_case("not known: primary, not noted", MARKED, SYN).starts(1, NewFlow),
        tcp_case("live flow: follows it", MARKED, SYN)
            .knows(Flows, 3, 9, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 9, 0),
        tcp_case("idle flow: still followed", MARKED, SYN)
            .knows(Flows, 3, TCP_IDLE_S + 1, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, TCP_IDLE_S + 1, 0),
        tcp_case("live flow on a draining backend: follows it", MARKED, SYN)
            .backend(3, DRAINING)
            .knows(Flows, 3, 9, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 9, 0),
        tcp_case("closing flow: placed anew and noted", MARKED, SYN)
            .knows(Flows, 3, 9, CLOSING)
            .starts(1, NewFlow)
            .leaves(Flows, 3, 9, CLOSING)
            .leaves(Syns, 1, 0, 0),
        tcp_case("flow on a backend that is down: placed anew and noted", MARKED, SYN)
            .backend(3, DOWN)
            .knows(Flows, 3, 9, 0)
            .starts(1, NewFlow)
            .leaves(Flows, 3, 0, CLOSING)
            .leaves(Syns, 1, 0, 0),
        tcp_case("flow on a removed backend: placed anew and noted", MARKED, SYN)
            .backend(3, u32::MAX)
            .knows(Flows, 3, 9, 0)
            .starts(1, NewFlow)
            .leaves(Flows, 3, 0, CLOSING)
            .leaves(Syns, 1, 0, 0),
        tcp_case("placed anew, then the old flow's backend is back: goes where the first went", MARKED, SYN)
            .knows(Flows, 3, 2, CLOSING)
            .knows(Syns, 1, 2, 0)
            .goes(1, RecentSyn)
            .leaves(Flows, 3, 2, CLOSING)
            .leaves(Syns, 1, 2, 0),
        tcp_case("repeated: goes where the first went", MARKED, SYN)
            .knows(Syns, 3, 7, 0)
            .goes(3, RecentSyn)
            .leaves(Syns, 3, 7, 0),
        tcp_case("repeated at the last moment", MARKED, SYN)
            .knows(Syns, 3, SYN_TIMEOUT_S, 0)
            .goes(3, RecentSyn)
            .leaves(Syns, 3, SYN_TIMEOUT_S, 0),
        tcp_case("noted too long ago", MARKED, SYN)
            .knows(Syns, 3, SYN_TIMEOUT_S + 1, 0)
            .starts(1, NewFlow)
            .leaves(Syns, 3, SYN_TIMEOUT_S + 1, 0),
        tcp_case("repeated, but the first's backend went down: noted anew", MARKED, SYN)
            .backend(3, DOWN)
            .knows(Syns, 3, 7, 0)
            .starts(1, NewFlow)
            .leaves(Syns, 1, 0, 0),
        tcp_case("closing flow and a later syn: the syn's", MARKED, SYN)
            .knows(Flows, 3, 9, CLOSING)
            .knows(Syns, 4, 2, 0)
            .goes(4, RecentSyn)
            .leaves(Flows, 3, 9, CLOSING)
            .leaves(Syns, 4, 2, 0),
        tcp_case("noted by a processor whose clock is ahead", MARKED, SYN)
            .knows(Syns, 3, 1_u32.wrapping_neg(), 0)
            .goes(3, RecentSyn)
            .leaves(Syns, 3, 1_u32.wrapping_neg(), 0),
    ]);
}

#[test]
fn a_syn_of_a_slot_in_transition() {
    check(vec![
        tcp_case("not known: primary, noted", MOVING, SYN).starts(1, NewFlow).leaves(Syns, 1, 0, 0),
        tcp_case("noted too long ago: noted anew", MOVING, SYN)
            .knows(Syns, 3, SYN_TIMEOUT_S + 1, 0)
            .starts(1, NewFlow)
            .leaves(Syns, 1, 0, 0),
        tcp_case("repeated", MOVING, SYN).knows(Syns, 3, 1, 0).goes(3, RecentSyn).leaves(Syns, 3, 1, 0),
        tcp_case("live flow", MOVING, SYN).knows(Flows, 3, 1, 0).goes(3, Tracked).leaves(Flows, 3, 1, 0),
        tcp_case("no room: goes all the same, counted", MOVING, SYN)
            .full()
            .starts(1, NewFlow)
            .counts(Reason::FlowNotRecorded),
        tcp_case("no primary: the previous one takes no new flow", NO_PRIMARY, SYN).fails(Reason::NoBackend),
        tcp_case("no primary, repeated: the first's backend is up", NO_PRIMARY, SYN)
            .knows(Syns, 3, 1, 0)
            .goes(3, RecentSyn)
            .leaves(Syns, 3, 1, 0),
    ]);
}

#[test]
fn an_established_flow_of_a_marked_slot() {
    check(vec![
        tcp_case("in no table: primary, not written", MARKED, ACK).goes(1, NotTracked),
        tcp_case("the service tracks all", STABLE, ACK)
            .view(TRACK_ALL)
            .knows(Flows, 3, 1, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0),
        tcp_case("the service tracks all, in no table", STABLE, ACK).view(TRACK_ALL).goes(1, NotTracked),
        tcp_case("in FLOWS: followed, touched", MARKED, ACK)
            .knows(Flows, 3, 9, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0),
        tcp_case("its fin closes", MARKED, FIN)
            .knows(Flows, 3, 0, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, CLOSING),
        tcp_case("its rst closes", MARKED, RST)
            .knows(Flows, 3, 4, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, CLOSING),
        tcp_case("closing: still followed, as long as packets come", MARKED, ACK)
            .bare()
            .knows(Flows, 3, 4, CLOSING)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, CLOSING),
        tcp_case("closing, and data comes: somebody else has sent the fin", MARKED, ACK)
            .knows(Flows, 3, 4, CLOSING)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0),
        tcp_case("data on a fin ends nothing's end", MARKED, FIN)
            .knows(Flows, 3, 4, CLOSING)
            .goes(3, Tracked)
            .leaves(Flows, 3, 4, CLOSING),
        tcp_case("closing, but a later syn went elsewhere", MARKED, ACK)
            .knows(Flows, 3, 4, CLOSING)
            .knows(Syns, 1, 1, 0)
            .goes(1, RecentSyn)
            .leaves(Flows, 1, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("a live entry goes before a syn's", MARKED, ACK)
            .knows(Flows, 3, 0, 0)
            .knows(Syns, 1, 0, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0)
            .leaves(Syns, 1, 0, 0),
        tcp_case("handshake completed: promoted", MARKED, ACK)
            .knows(Syns, 3, 1, 0)
            .goes(3, RecentSyn)
            .leaves(Flows, 3, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("promoted by an rst: closing", MARKED, RST)
            .knows(Syns, 3, 1, 0)
            .goes(3, RecentSyn)
            .leaves(Flows, 3, 0, CLOSING)
            .counts(Reason::FlowPromoted),
        tcp_case("promotion without room: followed, kept as a note", MARKED, ACK)
            .knows(Syns, 3, 1, 0)
            .full()
            .goes(3, RecentSyn)
            .leaves(Syns, 3, 1, 0)
            .counts(Reason::FlowNotRecorded),
        tcp_case("syn noted too long ago", MARKED, ACK)
            .knows(Syns, 3, SYN_TIMEOUT_S + 1, 0)
            .goes(1, NotTracked)
            .leaves(Syns, 3, SYN_TIMEOUT_S + 1, 0),
        tcp_case("no primary", Slot { primary: NO_BACKEND | TRACKED, secondary: NO_BACKEND }, ACK)
            .fails(Reason::NoBackend),
        tcp_case("no primary, in FLOWS", NO_PRIMARY, ACK)
            .knows(Flows, 3, 0, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0),
    ]);
}

/// Packets of flows that no table knows go to the other program, which may know an earlier flow with the same addresses and
/// ports: so flows that begin now are written down wherever they go.
#[test]
fn while_another_versions_flows_are_taken_over() {
    let tracked = Slot { primary: 1 | TRACKED, secondary: NO_BACKEND };
    check(vec![
        tcp_case("a new flow", tracked, SYN).taking_over().starts(1, NewFlow).leaves(Syns, 1, 0, 0),
        tcp_case("its handshake ends", tracked, ACK)
            .taking_over()
            .knows(Syns, 1, 1, 0)
            .goes(1, RecentSyn)
            .leaves(Flows, 1, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("a flow that only the other knows", tracked, ACK).taking_over().fails(Reason::TakenOver),
        tcp_case("a flow that is known", tracked, ACK)
            .taking_over()
            .knows(Flows, 3, 1, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0),
        tcp_case("a new flow without a takeover", tracked, SYN).starts(1, NewFlow),
        tcp_case("a handshake that ends without a takeover", tracked, ACK)
            .knows(Syns, 1, 1, 0)
            .goes(1, RecentSyn),
    ]);
}

#[test]
fn an_established_flow_of_a_slot_in_transition() {
    check(vec![
        tcp_case("in no table: previous primary, written", MOVING, ACK)
            .goes(2, Previous)
            .leaves(Flows, 2, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("its last packet: written as closing", MOVING, FIN)
            .goes(2, Previous)
            .leaves(Flows, 2, 0, CLOSING)
            .counts(Reason::FlowPromoted),
        tcp_case("no room: previous primary all the same", MOVING, ACK)
            .full()
            .goes(2, Previous)
            .counts(Reason::FlowNotRecorded),
        tcp_case("in FLOWS", MOVING, ACK).knows(Flows, 3, 0, 0).goes(3, Tracked).leaves(Flows, 3, 0, 0),
        tcp_case("noted", MOVING, ACK)
            .knows(Syns, 3, 0, 0)
            .goes(3, RecentSyn)
            .leaves(Flows, 3, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("previous primary draining", MOVING, ACK)
            .backend(2, DRAINING)
            .goes(2, Previous)
            .leaves(Flows, 2, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("previous primary down: kept", MOVING, ACK)
            .backend(2, DOWN)
            .goes(2, Previous)
            .leaves(Flows, 2, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("previous primary down, reset on down: primary", MOVING, ACK)
            .view(RESET_ON_DOWN)
            .backend(2, DOWN)
            .goes(1, NotTracked),
        tcp_case("previous primary removed: primary", MOVING, ACK).backend(2, u32::MAX).goes(1, NotTracked),
        tcp_case(
            "no previous primary: primary",
            Slot { primary: 1 | TRACKED, secondary: NO_BACKEND | TRANSITION },
            ACK,
        )
        .goes(1, NotTracked),
        tcp_case("no primary: previous one", NO_PRIMARY, ACK)
            .goes(2, Previous)
            .leaves(Flows, 2, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case(
            "changed and changed back: previous is primary, written",
            Slot { primary: 1 | TRACKED, secondary: 1 | TRANSITION },
            ACK,
        )
        .goes(1, Previous)
        .leaves(Flows, 1, 0, 0)
        .counts(Reason::FlowPromoted),
    ]);
}

#[test]
fn an_established_flow_whose_backend_is_gone() {
    check(vec![
        tcp_case("down: kept, in case the verdict was wrong", MARKED, ACK)
            .backend(3, DOWN)
            .knows(Flows, 3, 2, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 2, 0),
        tcp_case("down, reset on down: primary", MARKED, ACK)
            .view(RESET_ON_DOWN)
            .backend(3, DOWN)
            .knows(Flows, 3, 2, 0)
            .goes(1, NotTracked)
            .leaves(Flows, 3, 2, 0)
            .counts(Reason::FlowStale),
        tcp_case("draining: kept", MARKED, ACK)
            .backend(3, DRAINING)
            .knows(Flows, 3, 2, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0),
        tcp_case("draining, reset on down: kept", MARKED, ACK)
            .view(RESET_ON_DOWN)
            .backend(3, DRAINING)
            .knows(Flows, 3, 2, 0)
            .goes(3, Tracked)
            .leaves(Flows, 3, 0, 0),
        tcp_case("removed: primary", MARKED, ACK)
            .backend(3, u32::MAX)
            .knows(Flows, 3, 2, 0)
            .goes(1, NotTracked)
            .leaves(Flows, 3, 2, 0)
            .counts(Reason::FlowStale),
        tcp_case("an entry that names no backend: primary", MARKED, ACK)
            .knows(Flows, 200, 2, 0)
            .goes(1, NotTracked)
            .leaves(Flows, 200, 2, 0)
            .counts(Reason::FlowStale),
        tcp_case("an entry that names another service's backend: primary", MARKED, ACK)
            .knows(Flows, 11, 2, 0)
            .goes(1, NotTracked)
            .leaves(Flows, 11, 2, 0)
            .counts(Reason::FlowStale),
        tcp_case("removed, in transition: previous primary, rewritten", MOVING, ACK)
            .backend(3, u32::MAX)
            .knows(Flows, 3, 2, 0)
            .goes(2, Previous)
            .leaves(Flows, 2, 0, 0)
            .counts(Reason::FlowPromoted)
            .counts(Reason::FlowStale),
        tcp_case("down, but the client has opened anew elsewhere", MARKED, ACK)
            .backend(3, DOWN)
            .knows(Flows, 3, 2, 0)
            .knows(Syns, 1, 1, 0)
            .goes(1, RecentSyn)
            .leaves(Flows, 1, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("the syn's backend was removed: primary", MARKED, ACK)
            .backend(3, u32::MAX)
            .knows(Syns, 3, 1, 0)
            .goes(1, NotTracked)
            .leaves(Syns, 3, 1, 0),
        tcp_case("the syn's backend went down: followed", MARKED, ACK)
            .backend(3, DOWN)
            .knows(Syns, 3, 1, 0)
            .goes(3, RecentSyn)
            .leaves(Flows, 3, 0, 0)
            .counts(Reason::FlowPromoted),
        tcp_case("the syn's backend went down, reset on down: primary", MARKED, ACK)
            .view(RESET_ON_DOWN)
            .backend(3, DOWN)
            .knows(Syns, 3, 1, 0)
            .goes(1, NotTracked)
            .leaves(Syns, 3, 1, 0),
    ]);
}

#[test]
fn a_udp_packet() {
    check(vec![
        udp_case("first packet: primary, written", UDP_SLOT).starts(11, NewFlow).leaves(UdpFlows, 11, 0, 0),
        udp_case("known: followed, touched", UDP_SLOT)
            .knows(UdpFlows, 13, 5, 0)
            .goes(13, Tracked)
            .leaves(UdpFlows, 13, 0, 0),
        udp_case("known, seen this second", UDP_SLOT)
            .knows(UdpFlows, 13, 0, 0)
            .goes(13, Tracked)
            .leaves(UdpFlows, 13, 0, 0),
        udp_case("idle for just as long as allowed", UDP_SLOT)
            .knows(UdpFlows, 13, UDP_TIMEOUT_S, 0)
            .goes(13, Tracked)
            .leaves(UdpFlows, 13, 0, 0),
        udp_case("idle too long: a new flow", UDP_SLOT)
            .knows(UdpFlows, 13, UDP_TIMEOUT_S + 1, 0)
            .starts(11, NewFlow)
            .leaves(UdpFlows, 11, 0, 0),
        udp_case("seen by a processor whose clock is ahead: not expired", UDP_SLOT)
            .knows(UdpFlows, 13, 1_u32.wrapping_neg(), 0)
            .goes(13, Tracked)
            .leaves(UdpFlows, 13, 0, 0),
        udp_case("draining: kept", UDP_SLOT)
            .backend(13, DRAINING)
            .knows(UdpFlows, 13, 5, 0)
            .goes(13, Tracked)
            .leaves(UdpFlows, 13, 0, 0),
        udp_case("down: moves", UDP_SLOT)
            .backend(13, DOWN)
            .knows(UdpFlows, 13, 5, 0)
            .starts(11, NewFlow)
            .leaves(UdpFlows, 11, 0, 0)
            .counts(Reason::FlowStale),
        udp_case("removed: moves", UDP_SLOT)
            .backend(13, u32::MAX)
            .knows(UdpFlows, 13, 5, 0)
            .starts(11, NewFlow)
            .leaves(UdpFlows, 11, 0, 0)
            .counts(Reason::FlowStale),
        udp_case("no room: goes all the same, counted", UDP_SLOT)
            .full()
            .starts(11, NewFlow)
            .counts(Reason::FlowNotRecorded),
        udp_case("no primary", Slot::EMPTY).fails(Reason::NoBackend),
        udp_case("no primary, known", Slot::EMPTY)
            .knows(UdpFlows, 13, 5, 0)
            .goes(13, Tracked)
            .leaves(UdpFlows, 13, 0, 0),
        udp_case(
            "in transition: unknown flows take the primary",
            Slot { primary: 11 | TRACKED, secondary: 12 | TRANSITION },
        )
        .starts(11, NewFlow)
        .leaves(UdpFlows, 11, 0, 0),
        udp_case("stateless: primary, nothing written", UDP_SLOT).view(UDP_STATELESS).goes(11, Primary),
        udp_case("stateless: an entry is not seen", UDP_SLOT)
            .view(UDP_STATELESS)
            .knows(UdpFlows, 13, 5, 0)
            .goes(11, Primary)
            .leaves(UdpFlows, 13, 5, 0),
        udp_case("stateless, no primary", Slot::EMPTY).view(UDP_STATELESS).fails(Reason::NoBackend),
        udp_case("no primary by residency", Slot::EMPTY).view(REFUSED_BY_RESIDENCY).fails(Reason::Residency),
        udp_case("stateless, no primary by residency", Slot::EMPTY)
            .view(UDP_STATELESS | REFUSED_BY_RESIDENCY)
            .fails(Reason::Residency),
    ]);
}

#[test]
fn tables_that_contradict_each_other() {
    let packet = headers(&tcp(SYN, 1));
    let mut tables = tables(STABLE, UDP_SLOT);
    let mut view = tables.services[&TCP_SERVICE];
    view.slot_count = 0;
    assert_eq!(choose(&tables, TCP_SERVICE, &view, &packet, 7), Err(Reason::NoBackend), "no slots");
    view.slot_count = 251;
    view.slot_base = 100_000;
    assert_eq!(
        choose(&tables, TCP_SERVICE, &view, &packet, 7),
        Err(Reason::BrokenTable),
        "slots out of range"
    );
    view.slot_base = u32::MAX;
    assert!(choose(&tables, TCP_SERVICE, &view, &packet, !0).is_ok(), "as in the kernel, places wrap around");
    view.slot_base = 0;
    tables.slots.clear();
    assert_eq!(choose(&tables, TCP_SERVICE, &view, &packet, 7), Err(Reason::BrokenTable), "no slots written");
}

#[test]
fn a_flood_of_syns_pushes_out_nothing_but_syns() {
    let mut tables = tables(MOVING, UDP_SLOT);
    tables.capacity = 100;
    let view = tables.services[&TCP_SERVICE];
    let go = |flags, port| {
        let headers = headers(&tcp(flags, port));
        choose(&tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers)).unwrap()
    };
    for port in 0..100 {
        assert_eq!(go(ACK, port).backend, 2);
    }
    let before = tables.flows(Flows);
    assert_eq!(before.len(), 100);
    for port in 1_000..11_000 {
        assert_eq!(go(SYN, port).backend, 1);
    }
    assert_eq!(tables.flows(Flows), before, "live flows are untouched");
    assert_eq!(tables.flows(Syns).len(), 100);
}

/// A SYN forged on a live flow, which no table names, leads its packets nowhere else.
#[test]
fn a_forged_syn_moves_no_flow() {
    let tables = tables(MOVING, UDP_SLOT);
    let view = tables.services[&TCP_SERVICE];
    let ask = |flags: u8, sequence: u32| {
        let mut headers = headers(&tcp(flags, 40_000));
        headers.sequence = sequence;
        let choice = choose(&tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers));
        choice.map(|choice| (choice.backend, choice.why))
    };
    assert_eq!(ask(SYN, 7_000_000), Ok((1, NewFlow)));
    assert_eq!(ask(ACK, 4_000_000_000), Ok((2, Previous)), "the live flow's own numbers");
    assert_eq!(ask(ACK, 7_000_001), Ok((2, Tracked)), "the forger's next packet follows the live flow");
}

/// A handshake's last packet, and data right after it, go where the SYN went; so does a second attempt
/// from the same port.
#[test]
fn a_handshake_is_completed_by_its_own_numbers() {
    for (syns, packet) in
        [(vec![100], 101), (vec![u32::MAX], 0), (vec![100], 15_000), (vec![100, 9_000_000], 9_000_001)]
    {
        let mut tables = tables(MOVING, UDP_SLOT);
        let view = tables.services[&TCP_SERVICE];
        let ask = |tables: &lb_ebpf::native::HashTables, flags: u8, sequence: u32| {
            let mut headers = headers(&tcp(flags, 40_000));
            headers.sequence = sequence;
            let choice = choose(tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers));
            choice.map(|choice| choice.backend)
        };
        for syn in &syns {
            assert_eq!(ask(&tables, SYN, *syn), Ok(1));
        }
        // The table changes again: what was noted counts, not what the slot says now.
        tables.slots.iter_mut().for_each(|slot| slot.primary = 3 | TRACKED);
        assert_eq!(ask(&tables, ACK, packet), Ok(1), "SYNs {syns:?}, packet {packet}");
    }
}

/// A flow that no table names, at home on its slot's primary, and a forger who knows its addresses and ports.
struct Forged {
    tables: lb_ebpf::native::HashTables,
}

impl Forged {
    const CLIENT: u32 = 900_000_000;

    /// A service that has placed the forged flow on backend 2.
    fn new() -> Self {
        let mut tables = tables(Slot { primary: 1, secondary: 2 }, UDP_SLOT);
        let view = tables.services.get_mut(&TCP_SERVICE).unwrap();
        (view.scheduler, view.flags) = (P2C, TRACK_ALL);
        tables.report(1, 50);
        tables.report(2, 10);
        Self { tables }
    }

    fn send(&self, flags: u8, sequence: u32) -> (u32, Why) {
        let view = self.tables.services[&TCP_SERVICE];
        let mut headers = headers(&tcp(flags, 40_000));
        headers.sequence = sequence;
        let hash = flow_hash(view.seed, &headers);
        let choice =
            choose_with(&self.tables, features::ALL | KEEP, TCP_SERVICE, &view, &headers, hash).unwrap();
        (choice.backend, choice.why)
    }

    /// A handshake that begins at this number.
    fn open(&self, sequence: u32) {
        assert_eq!(self.send(SYN, sequence).0, 2);
        assert_eq!(self.send(ACK, sequence + 1).0, 2);
    }
}

#[test]
fn a_forged_handshake_moves_no_flow() {
    let world = Forged::new();
    assert_eq!(world.send(ACK, Forged::CLIENT), (1, NotTracked));
    world.open(7);
    for step in 0..200 {
        let sequence = Forged::CLIENT + step * 1_000_000;
        assert_eq!(world.send(ACK, sequence), (1, NotTracked), "after {step} s");
        world.tables.advance_s(1);
    }
    assert_eq!(world.send(RST, Forged::CLIENT), (1, NotTracked), "nor does its end end the forged flow");
    assert_eq!(world.send(ACK, 9), (2, Tracked));
    // The client begins anew: its SYN follows the entry, and so does what goes on from it.
    assert_eq!(world.send(SYN, 2_000_000_000), (2, Tracked));
    assert_eq!(world.send(ACK, 2_000_000_001), (2, RecentSyn));
}

#[test]
fn a_forged_handshake_takes_no_flow_from_its_entry() {
    let world = Forged::new();
    world.open(Forged::CLIENT);
    for sequence in [7, 1_000_000_000, 3_000_000_000] {
        assert_eq!(world.send(SYN, sequence), (2, Tracked));
        assert_eq!(world.send(ACK, sequence + 1), (2, RecentSyn));
        assert_eq!(world.send(ACK, sequence + 10_000_000), (1, NotTracked));
        assert_eq!(world.send(FIN, sequence + 20_000_000), (1, NotTracked));
    }
    for step in 0..200 {
        assert_eq!(world.send(ACK, Forged::CLIENT.wrapping_add(step * 3_000_000)), (2, Tracked));
        world.tables.advance_s(1);
    }
}

/// In a transition, a packet that does not fit does not overwrite the entry of the flow that does.
#[test]
fn a_forged_packet_overwrites_no_new_flow_of_a_slot_in_transition() {
    let mut world = Forged::new();
    world
        .tables
        .slots
        .iter_mut()
        .for_each(|slot| *slot = Slot { primary: 2 | TRACKED, secondary: 1 | TRANSITION });
    world.tables.services.get_mut(&TCP_SERVICE).unwrap().scheduler = 0;
    world.open(Forged::CLIENT);
    assert_eq!(world.send(ACK, 7), (1, Previous));
    assert_eq!(world.send(ACK, Forged::CLIENT + 9), (2, Tracked));
}

/// Packets of one flow: far apart in time, sent again, reordered, and beyond the end of the sequence numbers.
#[test]
fn a_flow_follows_its_entry_wherever_its_numbers_go() {
    let world = Forged::new();
    let first = u32::MAX - 5_000_000;
    world.open(first);
    for step in 0..3_000_u32 {
        let sequence = first.wrapping_add(step.wrapping_mul(2_000_000));
        for sent in [
            sequence,
            sequence.wrapping_sub(2_000_000),
            sequence.wrapping_add(1_900_000),
            sequence.wrapping_sub(1),
        ] {
            assert_eq!(world.send(ACK, sent), (2, Tracked), "step {step}");
        }
        world.tables.advance_ns(1_000_000);
    }
    // An old flow that goes on after it was seen by another host.
    world.tables.advance_s(lb_common::flow::YOUNG_S + 1);
    assert_eq!(world.send(ACK, first.wrapping_add(2_000_000_000)), (2, Tracked));
}
