//! Hundreds of thousands of mutated packets through translation, QUIC and second chance, natively, in worlds that go on:
//! what one leaves behind, the next ones meet. `bodies::stages` and `bodies::chance` say what must hold for each.

use crate::{
    bodies::{
        chance,
        mutate::{Random, mutate},
        stages,
    },
    seeds,
};
use lb_common::Reason;

const PORTS: seeds::Ports = seeds::Ports {
    nat: stages::NAT_PORT,
    quic: stages::QUIC_PORT,
    chain: stages::CHAIN_PORT,
    reject: stages::REJECT_PORT,
};

#[test]
fn mutated_packets_of_clients_and_workers() {
    let (clients, mut random, mut frame) = (seeds::clients(PORTS), Random(11), Vec::new());
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        // Few flows at a time: what holds for each is looked at after each packet.
        let mut tables = stages::world();
        tables.capacity = 12;
        for _ in 0..500 {
            let replies = tables.replies();
            if replies.is_empty() || random.below(3) > 0 {
                mutate(&mut random, &clients, &mut frame);
            } else {
                let (key, reply) = replies[random.below(replies.len())];
                let nats = tables.nats();
                let Some((_, nat)) = nats.iter().find(|(flow, _)| *flow == reply.flow) else { continue };
                let flags = [0x12, 0x10, 0x11, 0x04][random.below(4)];
                let own = seeds::answers(nat, &reply, key.protocol as u8, flags);
                mutate(&mut random, &own, &mut frame);
            }
            stages::check_in(&tables, &frame);
        }
        seen.extend(tables.counts().into_iter().map(|(reason, _)| reason));
    }
    for reason in [
        Reason::NatReply,
        Reason::NatUnknown,
        Reason::NatStray,
        Reason::OwnSource,
        Reason::NatNoRoom,
        Reason::QuicRouted,
        Reason::QuicUnroutable,
        Reason::QuicUnknownId,
        Reason::QuicShortId,
        Reason::IcmpBadQuote,
        Reason::IcmpForeignQuote,
    ] {
        assert!(seen.contains(&reason), "no packet was {reason:?}: {seen:?}");
    }
}

#[test]
fn chains_made_by_hand_end() {
    let (seeds, mut random, mut frame) = (seeds::chains(stages::CHAIN_PORT), Random(12), Vec::new());
    seeds.iter().for_each(|seed| chance::check(seed));
    for _ in 0..150_000 {
        mutate(&mut random, &seeds, &mut frame);
        chance::check(&frame);
    }
}

#[test]
fn each_stage_takes_every_cut() {
    for seed in seeds::clients(PORTS).iter().step_by(7) {
        for len in 14..=seed.len().min(160) {
            stages::check(&seed[..len]);
        }
    }
    for seed in seeds::chains(stages::CHAIN_PORT).iter().step_by(11) {
        for len in 14..=seed.len() {
            chance::check(&seed[..len]);
        }
    }
}
