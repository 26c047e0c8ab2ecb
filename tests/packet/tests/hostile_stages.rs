//! A million mutated packets through the loaded stages (translation both ways, QUIC, second chance), and the same through
//! the same code run natively: verdict, frame, counters and bindings must agree, packet by packet.

use lb_common::{Reason, reason::Fate, settings::IngressSettings};
use lb_ebpf::native::{HashTables, VecFrame};
use test_packet::{Ingress, USED, action, bed, hex, seeds};

#[path = "../../../fuzz/src/bodies/mod.rs"]
#[allow(dead_code, reason = "the checks run natively, in lb-ebpf's tests")]
mod bodies;

use bodies::{
    mutate::{Random, mutate},
    stages,
};

const PACKETS: u64 = 1_000_000;
/// Packets of one world. Few enough that no binding runs out of time.
const BATCH: u64 = 10_000;
/// Packets after which it is looked up which flows there are to answer.
const LOOK: u64 = 100;

/// What workers would answer to the flows that there are.
fn answers(tables: &HashTables, random: &mut Random) -> Vec<Vec<u8>> {
    let nats = tables.nats();
    let replies = tables.replies();
    let of = |(key, reply): &(lb_common::ReplyKey, lb_common::Reply), flags| {
        let (_, nat) = nats.iter().find(|(flow, _)| *flow == reply.flow)?;
        Some(seeds::answers(nat, reply, key.protocol as u8, flags))
    };
    let flags = || [0x12, 0x10, 0x11, 0x04];
    let picked = replies.iter().map(|reply| of(reply, flags()[random.below(4)]));
    picked.flatten().flatten().collect()
}

#[test]
fn stages_do_in_the_kernel_what_they_do_natively() {
    bed::enter();
    let settings =
        IngressSettings { icmp_per_s: 1_000_000_000, icmp_burst: u32::MAX, ..IngressSettings::DEFAULT };
    let mut ingress = Ingress::load(settings).expect("loads");
    ingress.egress(bed::EGRESS);
    let ports = seeds::Ports {
        nat: stages::NAT_PORT,
        quic: stages::QUIC_PORT,
        chain: stages::CHAIN_PORT,
        reject: stages::REJECT_PORT,
    };
    let (clients, mut random, mut frame) = (seeds::clients(ports), Random(21), Vec::new());
    let mut totals = std::collections::BTreeMap::<Reason, u64>::new();
    let mut verdicts = [0u64; 5];
    for batch in 0..PACKETS / BATCH {
        let tables = stages::world();
        ingress.hold(&tables);
        let mut workers = Vec::new();
        for i in 0..BATCH {
            if i % LOOK == 0 {
                workers = answers(&tables, &mut random);
            }
            let of_worker = !workers.is_empty() && random.below(3) == 0;
            mutate(&mut random, if of_worker { &workers } else { &clients }, &mut frame);
            let mut native = VecFrame::new(&frame).with_fib(bodies::ingress::fib);
            tables.advance_ns(1_000);
            let (verdict, outcome) = lb_ebpf::native::run(&mut native, &tables, &settings);
            let run = ingress.run(&frame).expect("the kernel runs it");
            let packet = batch * BATCH + i;
            assert_eq!(run.verdict, action(verdict), "packet {packet}: {outcome:?} {}", hex(&frame));
            assert!(
                run.packet == native.bytes(),
                "packet {packet}: {outcome:?} {} gave {} natively {}",
                hex(&frame),
                hex(&run.packet),
                hex(&native.bytes())
            );
            verdicts[run.verdict as usize] += 1;
        }
        compare(&mut ingress, &tables, (batch + 1) * BATCH);
        tables.counts().into_iter().for_each(|(reason, n)| *totals.entry(reason).or_default() += n);
    }
    println!("{verdicts:?} {totals:?}");
    assert!(verdicts[1..].iter().all(|n| *n > PACKETS / 1_000), "{verdicts:?}");
    for reason in [
        Reason::NatReply,
        Reason::NatUnknown,
        Reason::NatStray,
        Reason::OwnSource,
        Reason::NatFragment,
        Reason::NatTtl,
        Reason::NatError,
        Reason::QuicRouted,
        Reason::QuicUnroutable,
        Reason::QuicUnknownId,
        Reason::QuicShortId,
        Reason::QuicTruncated,
        Reason::IcmpBadQuote,
        Reason::IcmpForeignQuote,
    ] {
        assert!(totals.contains_key(&reason), "no packet was {reason:?}: {totals:?}");
    }
}

/// Counters and bindings of the kernel, against the native ones and against the number of packets.
fn compare(ingress: &mut Ingress, tables: &HashTables, packets: u64) {
    let counts = ingress.counts();
    assert_eq!(counts, tables.counts(), "after {packets} packets");
    let forwarded: u64 = (0..USED)
        .map(|index| {
            let stats = ingress.stats(index);
            assert_eq!(stats, tables.stats(index), "backend {index} after {packets} packets");
            stats.packets
        })
        .sum();
    let is_end = |r: Reason| r.fate() != Fate::Note || r == Reason::NatReply;
    let ends: u64 = counts.iter().filter(|(r, _)| is_end(*r)).map(|(_, n)| n).sum();
    assert!(forwarded + ends <= BATCH, "more ends than packets: {counts:?}");
    let (mut nats, mut replies) = ingress.bindings();
    nats.sort_by_key(|(key, _)| *key);
    replies.sort_by_key(|(key, _)| *key);
    let place = |(key, nat): &(lb_common::FlowKey, lb_common::Nat)| {
        (*key, nat.worker, nat.port, nat.source, nat.source_port, nat.flags)
    };
    let native: Vec<_> = tables.nats().iter().map(place).collect();
    assert!(nats.iter().map(place).collect::<Vec<_>>() == native, "bindings after {packets} packets");
    let state =
        |(key, reply): &(lb_common::ReplyKey, lb_common::Reply)| (*key, reply.flow, reply.vip, reply.flags);
    let native: Vec<_> = tables.replies().iter().map(state).collect();
    assert!(replies.iter().map(state).collect::<Vec<_>>() == native, "answers after {packets} packets");
}
