//! Under flood nothing is written, and a flow's packets stay together all the same, whatever the tables say.

use crate::world::{TCP_SERVICE, UDP_SERVICE, backend, cases, headers, key, tables, tcp, udp};
use lb_common::{
    Backend, Flow, Reason, Slot,
    backend::flags::{DOWN, DRAINING, RESOLVED, USED},
    flow::flags::CLOSING,
    service::{
        flags::{COUNT_FLOWS, RESET_ON_DOWN, TRACK_ALL},
        scheduler,
    },
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use lb_ebpf::{
    FlowTable::{Flows, Syns, UdpFlows},
    Tables,
    native::HashTables,
    select::{choose::choose, hash::flow_hash},
};
use proptest::prelude::*;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

fn slots() -> impl Strategy<Value = Slot> {
    (prop_oneof![1u32..5, Just(NO_BACKEND)], prop_oneof![1u32..5, Just(NO_BACKEND)], any::<bool>()).prop_map(
        |(primary, secondary, moves)| Slot {
            primary: primary | TRACKED,
            secondary: secondary | if moves { TRANSITION } else { 0 },
        },
    )
}

fn schedulers() -> impl Strategy<Value = (u8, u32)> {
    prop_oneof![
        Just((scheduler::MAGLEV, 0)),
        Just((scheduler::P2C, TRACK_ALL)),
        Just((scheduler::RANDOM, TRACK_ALL)),
        Just((scheduler::LEAST_CONN, TRACK_ALL | COUNT_FLOWS)),
    ]
}

fn choice(tables: &HashTables, flags: u8, port: u16) -> Result<u32, Reason> {
    let (view, headers) = (tables.services[&TCP_SERVICE], headers(&tcp(flags, port)));
    choose(tables, TCP_SERVICE, &view, &headers, flow_hash(view.seed, &headers)).map(|c| c.backend)
}

proptest! {
    #![proptest_config(cases(2_000))]

    #[test]
    fn a_flow_begun_under_flood_stays_together(
        slot in slots(),
        (scheduler, more) in schedulers(),
        states in proptest::collection::vec(prop_oneof![4 => Just(0), 1 => Just(DOWN), 1 => Just(DRAINING)], 4),
        known in proptest::option::of((1u32..6, any::<bool>())),
        resets in any::<bool>(),
        port in 1_024u16..60_000,
    ) {
        let mut tables = tables(slot, Slot::EMPTY);
        let view = tables.services.get_mut(&TCP_SERVICE).unwrap();
        (view.scheduler, view.flags) = (scheduler, more | if resets { RESET_ON_DOWN } else { 0 });
        for (i, state) in (1..).zip(&states) {
            tables.backends.insert(i, Backend { flags: USED | RESOLVED | state, ..backend(i) });
        }
        // Backend 5 is gone.
        tables.backends.remove(&5);
        if let Some((backend, closing)) = known {
            let now_s = tables.now_s();
            let flags = if closing { CLOSING } else { 0 };
            let flow = Flow { backend, last_seen_s: now_s - 9, created_s: now_s - 99, flags };
            tables.record(Flows, &key(&tcp(SYN, port)), &flow);
        }
        let before = (tables.flows(Flows).len(), tables.flows(Syns).len());
        tables.is_flooded.set(true);
        let first = choice(&tables, SYN, port);
        for _ in 0..3 {
            tables.advance_s(1);
            let later = choice(&tables, ACK, port);
            prop_assert_eq!(first, later, "counted {:?}", tables.counts());
        }
        prop_assert_eq!(before, (tables.flows(Flows).len(), tables.flows(Syns).len()));
    }

    #[test]
    fn a_full_table_of_udp_flows_scatters_nobody(slot in slots(), port in 1_024u16..60_000) {
        let mut tables = tables(Slot::EMPTY, slot);
        tables.capacity = 0;
        tables.when_full = lb_ebpf::native::WhenFull::Refuse;
        let view = tables.services.get_mut(&UDP_SERVICE).unwrap();
        (view.scheduler, view.flags) = (scheduler::RANDOM, TRACK_ALL);
        for i in 1..5 {
            tables.backends.insert(i, Backend { service: UDP_SERVICE, ..backend(i) });
        }
        let (view, headers) = (tables.services[&UDP_SERVICE], headers(&udp(port)));
        let choice = || {
            choose(&tables, UDP_SERVICE, &view, &headers, flow_hash(view.seed, &headers)).map(|c| c.backend)
        };
        let first = choice();
        for _ in 0..20 {
            prop_assert_eq!(first, choice());
        }
        prop_assert_eq!(tables.flows(UdpFlows).len(), 0);
    }
}
