//! Schedulers other than `maglev`: who gets a new flow, what is written down, and that nothing moves afterwards.
//!
//! Backends: 1 is the slot's primary, 2 its second choice, 3 and 4 stand in lists, 5 is a previous primary.

use crate::world::{TCP_SERVICE, UDP_SERVICE, headers, key, tables, tcp, udp};
use lb_common::{
    Load, ServiceView, Slot,
    backend::flags::{DOWN, DRAINING, USED},
    load,
    service::{
        flags::{COUNT_FLOWS, HASH_SOURCE, OLD_HASH_SOURCE, SECONDS, TRACK_ALL},
        scheduler,
    },
    settings::features,
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use lb_ebpf::{
    FlowTable::{Flows, Syns, UdpFlows},
    Tables,
    native::HashTables,
    select::{
        choose::{
            Choice,
            Why::{self, *},
            choose, choose_with,
        },
        hash::{flow_hash, slot_of, source_hash},
        scheduler::{LEAST_CONN_SAMPLE, decode, encode},
    },
};

const SLOT: Slot = Slot { primary: 1, secondary: 2 };
const MOVING: Slot = Slot { primary: 1 | TRACKED, secondary: 5 | TRANSITION };
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Both services under a scheduler. Behind the table: second choices if `flags` say so, and a list.
fn world(slot: Slot, scheduler: u8, flags: u32, list: &[u32]) -> HashTables {
    let mut tables = tables(slot, Slot { primary: slot.primary + 10, secondary: slot.secondary + 10 });
    tables.slots = vec![slot; 251];
    if flags & SECONDS != 0 {
        tables.slots.extend(vec![Slot { primary: 2, secondary: NO_BACKEND }; 251]);
    }
    tables.slots.extend(list.iter().map(|&primary| Slot { primary, secondary: NO_BACKEND }));
    let udp_base = tables.slots.len() as u32;
    tables.slots.extend(vec![Slot { primary: 11, secondary: 12 }; 251]);
    let view = tables.services.get_mut(&TCP_SERVICE).unwrap();
    (view.scheduler, view.flags, view.list_count) = (scheduler, flags | TRACK_ALL, list.len() as u32);
    let view = tables.services.get_mut(&UDP_SERVICE).unwrap();
    (view.scheduler, view.slot_base) = (scheduler, udp_base);
    tables
}

fn view(tables: &HashTables) -> ServiceView {
    tables.services[&TCP_SERVICE]
}

fn send(tables: &HashTables, flags: u8, port: u16) -> Choice {
    let (view, headers) = (view(tables), headers(&tcp(flags, port)));
    choose(tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers)).unwrap()
}

fn placed(tables: &HashTables, port: u16) -> (u32, Why) {
    let choice = send(tables, SYN, port);
    (choice.backend, choice.why)
}

fn set_flags(tables: &mut HashTables, backend: u32, flags: u32) {
    tables.backends.get_mut(&backend).unwrap().flags = USED | flags;
}

#[test]
fn p2c_takes_the_less_loaded_half() {
    for (first, second, expect) in [
        (0, 0, (1, NewFlow)),
        (5, 5, (1, NewFlow)),
        (5, 4, (2, LessLoaded)),
        (4, 5, (1, NewFlow)),
        (u32::MAX, u32::MAX - 1, (2, LessLoaded)),
    ] {
        let tables = world(SLOT, scheduler::P2C, 0, &[]);
        tables.report(1, first);
        tables.report(2, second);
        assert_eq!(placed(&tables, 1), expect, "{first} against {second}");
    }
}

#[test]
fn p2c_leaves_alone_who_takes_no_flows() {
    for flags in [DOWN, DRAINING] {
        let mut tables = world(SLOT, scheduler::P2C, 0, &[]);
        tables.report(1, 9);
        set_flags(&mut tables, 2, flags);
        assert_eq!(placed(&tables, 1), (1, NewFlow));
    }
    for secondary in [NO_BACKEND, 12, 99] {
        let tables = world(Slot { secondary, ..SLOT }, scheduler::P2C, 0, &[]);
        tables.report(1, 9);
        assert_eq!(placed(&tables, 1), (1, NewFlow), "none, another service's, one without an entry");
    }
}

#[test]
fn what_was_placed_since_the_report_counts() {
    let tables = world(SLOT, scheduler::P2C, 0, &[]);
    tables.report(1, 3 * load::FLOW);
    tables.report(2, 0);
    let backends: Vec<u32> = (0..7).map(|port| placed(&tables, port).0).collect();
    assert_eq!(backends, [2, 2, 2, 1, 2, 1, 2], "no herd: equal after three, then in turn");
    tables.report(1, 0);
    assert_eq!(placed(&tables, 8).0, 1, "a new report is the whole truth again");
    // A backend that counts double is charged half for each.
    let tables = world(SLOT, scheduler::P2C, 0, &[]);
    tables.loads.borrow_mut().insert(1, Load { cost: load::FLOW, ..Load::default() });
    tables.loads.borrow_mut().insert(2, Load { cost: load::FLOW / 2, ..Load::default() });
    let second = (0..30).filter(|&port| placed(&tables, port).0 == 2).count();
    assert_eq!(second, 20);
}

#[test]
fn only_flows_on_the_secondary_are_tracked() {
    let tables = world(SLOT, scheduler::P2C, 0, &[]);
    tables.report(1, 1);
    assert_eq!(placed(&tables, 1), (2, LessLoaded));
    tables.report(2, 2);
    assert_eq!(placed(&tables, 2), (1, NewFlow));
    assert_eq!((tables.flows(Flows).len(), tables.flows(Syns).len()), (0, 2));
    // Loads have turned since: a repeated SYN goes where the first went, and costs nothing.
    tables.report(1, 0);
    tables.report(2, 9);
    assert_eq!(send(&tables, SYN, 1), Choice { backend: 2, is_new: false, why: RecentSyn });
    assert_eq!(tables.load(2, tables.now_s()), 9);
    for (port, backend) in [(1, 2), (2, 1)] {
        assert_eq!(send(&tables, ACK, port).backend, backend);
    }
    let flows = tables.flows(Flows);
    assert_eq!(flows.iter().map(|(k, f)| (*k, f.backend)).collect::<Vec<_>>(), [(key(&tcp(ACK, 1)), 2)]);
    // Long after the SYN is forgotten.
    tables.advance_s(10_000);
    assert_eq!((send(&tables, ACK, 1).why, send(&tables, ACK, 2).why), (Tracked, NotTracked));
    assert_eq!((send(&tables, ACK, 1).backend, send(&tables, ACK, 2).backend), (2, 1));
}

#[test]
fn counted_flows_are_all_tracked() {
    let tables = world(SLOT, scheduler::LEAST_CONN, COUNT_FLOWS, &[1, 3]);
    for port in 1..5 {
        let backend = send(&tables, SYN, port).backend;
        assert_eq!(send(&tables, ACK, port).backend, backend);
    }
    assert_eq!(tables.flows(Flows).len(), 4);
}

#[test]
fn a_slot_in_transition_has_three_candidates() {
    let tables = world(MOVING, scheduler::P2C, SECONDS, &[]);
    tables.report(1, 5);
    tables.report(5, 0);
    assert_eq!(placed(&tables, 1), (2, LessLoaded), "the pair is that of now, not the previous primary");
    tables.report(2, 9);
    assert_eq!(placed(&tables, 2), (1, NewFlow));
    assert_eq!(send(&tables, ACK, 3), Choice { backend: 5, is_new: false, why: Previous });
    assert_eq!((send(&tables, ACK, 1).backend, send(&tables, ACK, 2).backend), (2, 1));
    assert_eq!(tables.flows(Flows).len(), 3, "in transition the primary needs an entry too");
    // Without the second choices only the primary is left.
    let tables = world(MOVING, scheduler::P2C, 0, &[]);
    tables.report(1, 5);
    assert_eq!(placed(&tables, 1), (1, NewFlow));
}

#[test]
fn a_flood_of_syns_evicts_no_live_flow() {
    let mut tables = world(SLOT, scheduler::P2C, 0, &[]);
    tables.capacity = 100;
    tables.report(1, u32::MAX);
    for port in 0..100 {
        send(&tables, SYN, port);
        assert_eq!(send(&tables, ACK, port).backend, 2);
    }
    let before = tables.flows(Flows);
    assert_eq!(before.len(), 100);
    for port in 1_000..11_000 {
        send(&tables, SYN, port);
    }
    assert_eq!(tables.flows(Flows), before);
    assert_eq!(tables.flows(Syns).len(), 100);
    for port in 0..100 {
        assert_eq!(send(&tables, ACK, port).backend, 2);
    }
}

#[test]
fn a_forged_syn_moves_no_flow_of_p2c() {
    let tables = world(SLOT, scheduler::P2C, 0, &[]);
    tables.report(1, 9);
    let view = view(&tables);
    let ask = |flags: u8, sequence: u32| {
        let mut headers = headers(&tcp(flags, 40_000));
        headers.sequence = sequence;
        choose(&tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers)).unwrap().backend
    };
    assert_eq!(ask(SYN, 7_000_000), 2);
    assert_eq!(ask(ACK, 4_000_000_000), 1, "a live flow on the primary, which no table names");
}

#[test]
fn turns_go_round() {
    let tables = world(SLOT, scheduler::ROUND_ROBIN, 0, &[1, 3, 4, 3]);
    let backends: Vec<u32> = (0..8).map(|port| placed(&tables, port).0).collect();
    assert_eq!(backends, [1, 3, 4, 3, 1, 3, 4, 3]);
    assert_eq!(send(&tables, SYN, 1), Choice { backend: 3, is_new: false, why: RecentSyn });
    for (port, backend) in backends.iter().enumerate() {
        assert_eq!(send(&tables, ACK, port as u16).backend, *backend);
    }
    assert_eq!(tables.flows(Flows).len(), 6, "two are on their primary");
    let mut tables = world(SLOT, scheduler::ROUND_ROBIN, 0, &[3]);
    set_flags(&mut tables, 3, DOWN);
    assert_eq!(placed(&tables, 1), (1, NewFlow), "down since the list was made: the primary");
    assert_eq!(placed(&world(SLOT, scheduler::ROUND_ROBIN, 0, &[]), 1), (1, NewFlow), "an empty list");
}

#[test]
fn random_goes_by_shares() {
    let mut tables = world(SLOT, scheduler::RANDOM, 0, &[]);
    for slot in &mut tables.slots[..50] {
        slot.primary = 3;
    }
    let on_3 = (0..10_000).filter(|&port| placed(&tables, port) == (3, Random)).count();
    // 1,992 expected, standard deviation 40.
    assert!((1_750..2_250).contains(&on_3), "{on_3}");
}

#[test]
fn least_takes_the_least_of_all() {
    let tables = world(SLOT, scheduler::LEAST_CONN, 0, &[1, 2, 3, 4]);
    for (backend, score) in [(1, 5), (2, 4), (3, 1), (4, 2)] {
        tables.report(backend, score * load::FLOW);
    }
    let backends: Vec<u32> = (0..5).map(|port| placed(&tables, port).0).collect();
    assert_eq!(&backends[..1], [3]);
    let count = |b| backends.iter().filter(|x| **x == b).count();
    assert_eq!([count(1), count(2), count(3), count(4)], [0, 0, 3, 2], "filled up evenly: {backends:?}");
    let mut tables = world(SLOT, scheduler::LEAST_CONN, 0, &[3, 4]);
    set_flags(&mut tables, 3, DRAINING);
    tables.report(4, 100);
    assert_eq!(placed(&tables, 1), (4, LeastConn));
}

#[test]
fn a_long_list_is_looked_at_in_windows() {
    let list: Vec<u32> =
        (0..LEAST_CONN_SAMPLE * 3).map(|i| if i == LEAST_CONN_SAMPLE * 2 + 1 { 3 } else { 4 }).collect();
    let tables = world(SLOT, scheduler::LEAST_CONN, 0, &list);
    tables.report(4, 1_000 * load::FLOW);
    let backends: Vec<u32> = (0..6).map(|port| placed(&tables, port).0).collect();
    assert_eq!(backends, [4, 4, 3, 4, 4, 3]);
}

#[test]
fn a_capped_service_spills_to_the_secondary() {
    let mut tables = world(SLOT, scheduler::BOUNDED_LOAD, HASH_SOURCE, &[]);
    tables.services.get_mut(&TCP_SERVICE).unwrap().load_cap = 2 * load::FLOW;
    let backends: Vec<u32> = (0..8).map(|port| placed(&tables, port).0).collect();
    assert_eq!(backends, [1, 1, 1, 2, 2, 2, 1, 2], "three to the primary, then whoever has less");
    for (port, backend) in backends.iter().enumerate() {
        assert_eq!(send(&tables, ACK, port as u16).backend, *backend);
    }
}

#[test]
fn a_client_keeps_its_slot() {
    let mut tables = world(SLOT, scheduler::MAGLEV, HASH_SOURCE, &[]);
    tables.services.get_mut(&TCP_SERVICE).unwrap().flags = HASH_SOURCE;
    for (i, slot) in tables.slots.iter_mut().take(251).enumerate() {
        slot.primary = 1 + i as u32 % 9;
    }
    let first = send(&tables, SYN, 1);
    assert_eq!(first.why, Primary);
    let expect = slot_of(source_hash(view(&tables).seed, &headers(&tcp(SYN, 1))), 251) % 9 + 1;
    assert!((0..200).all(|port| send(&tables, ACK, port).backend == expect));
    assert!(tables.flows(Flows).is_empty());
    // A program without the feature has no such slots.
    let (view, headers) = (view(&tables), headers(&tcp(SYN, 1)));
    let hash = flow_hash(view.seed, &headers);
    let plain = choose_with(&tables, features::ALL & !features::P2C, TCP_SERVICE, &view, &headers, hash);
    assert_eq!(plain.unwrap().backend, slot_of(hash, 251) % 9 + 1);
}

#[test]
fn an_old_table_leads_flows_that_no_table_names() {
    for (old_hash, by_source) in [(0, false), (OLD_HASH_SOURCE, true)] {
        let mut tables = world(Slot { primary: 1 | TRACKED, secondary: 2 }, scheduler::P2C, old_hash, &[3]);
        let udp: Vec<Slot> = tables.slots.split_off(252);
        tables.slots.extend((0..1_021).map(|i| Slot { primary: (3 + i % 3) | TRACKED, secondary: 9 }));
        tables.slots.extend(udp);
        let view = tables.services.get_mut(&TCP_SERVICE).unwrap();
        (view.old_count, view.old_seed) = (1_021, [77, 78]);
        assert_eq!((view.old_base(), view.region()), (252, 252 + 1_021));
        let old = |port| {
            let headers = headers(&tcp(ACK, port));
            let hash =
                if by_source { source_hash([77, 78], &headers) } else { flow_hash([77, 78], &headers) };
            3 + slot_of(hash, 1_021) % 3
        };
        for port in 0..100 {
            let choice = send(&tables, ACK, port);
            assert_eq!((choice.backend, choice.why), (old(port), Previous));
            assert_eq!(send(&tables, ACK, port).why, Tracked, "written down");
        }
        tables.report(1, 1);
        assert_eq!(placed(&tables, 200), (2, LessLoaded), "new flows have the pair of now");
        send(&tables, ACK, 200);
        assert_eq!(tables.peek(Flows, &key(&tcp(ACK, 200))).unwrap().backend, 2);
    }
}

#[test]
fn udp_is_placed_by_load_too() {
    let tables = world(SLOT, scheduler::P2C, 0, &[]);
    tables.report(11, 5);
    let view = tables.services[&UDP_SERVICE];
    let go = |port| {
        let headers = headers(&udp(port));
        choose(&tables, UDP_SERVICE, &view, &headers, flow_hash(view.seed, &headers)).unwrap()
    };
    assert_eq!(go(1), Choice { backend: 12, is_new: true, why: LessLoaded });
    tables.report(12, 9);
    assert_eq!(go(1), Choice { backend: 12, is_new: false, why: Tracked });
    assert_eq!(go(2), Choice { backend: 11, is_new: true, why: NewFlow });
    assert_eq!(tables.flows(UdpFlows).len(), 2);
}

#[test]
fn placements_survive_their_encoding() {
    for why in [NewFlow, LessLoaded, RoundRobin, Random, LeastConn] {
        assert_eq!(decode(encode(Ok((0x12_3456, why)))), Ok((0x12_3456, why)));
    }
    assert!(decode(encode(Err(lb_common::Reason::NoBackend))).is_err());
}
