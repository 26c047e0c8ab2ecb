//! PassiveFailures that a worker may be dead: which packets count as one, and for whom.

use crate::{
    build::Packet,
    nat::{error, tables},
    world::{CLIENT4, CLIENT6, VIP4, VIP6},
};
use lb_common::{
    Address, Reason, mapped,
    passive::PassiveFailures,
    service::{TCP, UDP},
    settings::{IngressSettings, features},
};
use lb_ebpf::{
    Verdict,
    native::{self, HashTables, VecFrame},
    packet::verdict::Outcome,
};

const WORKER4: Address = mapped([10, 1, 0, 7]);
const WORKER6: Address = [0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
const ROUTER4: Address = mapped([10, 8, 8, 8]);
const ROUTER6: Address = [0xfd, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8];
/// An outer source that is no address of this host's.
const OUTER4: Address = mapped([192, 0, 2, 77]);
const OUTER6: Address = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 77];

fn run(tables: &HashTables, bytes: &[u8]) -> (Verdict, Outcome) {
    let mut frame = VecFrame::new(bytes).from_interface(7);
    let done = native::run(&mut frame, tables, &IngressSettings::DEFAULT);
    assert_eq!(frame.bytes(), bytes, "a sign changes nothing");
    done
}

/// A packet as it was sent on to a worker.
fn sent(protocol: u8, is_ipv6: bool) -> Packet {
    let (source, worker) = if is_ipv6 { (OUTER6, WORKER6) } else { (OUTER4, WORKER4) };
    let port = if protocol == UDP { 6_080 } else { 0 };
    Packet { payload: vec![0x45; 60], ..Packet::new(protocol, (source, 50_000), (worker, port)) }
}

#[test]
fn errors_about_what_was_sent_on_are_counted_for_the_worker() {
    let tables = tables(false);
    let mut expected = 0;
    for protocol in [4, 41, UDP, TCP] {
        // All that is quoted at least (RFC 792), and all that there is.
        for quote in [28, 600] {
            for code in [0, 1, 2, 3, 9, 10, 13] {
                let about = error(ROUTER4, &sent(protocol, false), quote, 3, code, 0);
                assert_eq!(run(&tables, &about), (Verdict::Pass, Outcome::Not(Reason::NotVip)));
                expected += 1;
            }
        }
    }
    assert_eq!(tables.signs(&WORKER4), PassiveFailures { unreachable: expected, refused: 0 });
    let mut expected = 0;
    for protocol in [4, 41, UDP, TCP] {
        for (kind, code) in [(1, 0), (1, 3), (1, 4), (4, 1)] {
            let about = error(ROUTER6, &sent(protocol, true), 600, kind, code, 0);
            assert_eq!(run(&tables, &about), (Verdict::Pass, Outcome::Not(Reason::NotVip)));
            expected += 1;
        }
    }
    assert_eq!(tables.signs(&WORKER6), PassiveFailures { unreachable: expected, refused: 0 });
}

#[test]
fn other_messages_are_no_sign() {
    let tables = tables(false);
    let (v4, v6) = (sent(4, false), sent(41, true));
    let mut stranger = error(ROUTER4, &v4, 600, 3, 1, 0);
    // To another than the quoted packet's sender.
    stranger[33] ^= 1;
    for frame in [
        // Too big, a redirect, time exceeded, a quote that is cut short.
        error(ROUTER4, &v4, 600, 3, 4, 1_400),
        error(ROUTER4, &v4, 600, 5, 1, 0),
        error(ROUTER4, &v4, 600, 11, 0, 0),
        error(ROUTER4, &v4, 16, 3, 1, 0),
        error(ROUTER6, &v6, 600, 2, 0, 1_400),
        error(ROUTER6, &v6, 600, 4, 0, 0),
        error(ROUTER6, &v6, 36, 1, 0, 0),
        stranger,
        // From where nobody sends.
        error(mapped([127, 0, 0, 1]), &v4, 600, 3, 1, 0),
        error(VIP4, &v4, 600, 3, 1, 0),
        error([0; 16], &v6, 600, 1, 0, 0),
        error(VIP6, &v6, 600, 1, 0, 0),
    ] {
        run(&tables, &frame);
    }
    for worker in [WORKER4, WORKER6] {
        assert_eq!(tables.signs(&worker), PassiveFailures::default());
    }
    // About a packet of a VIP's: it concerns a client, and goes to a worker.
    for (vip, client, router) in [(VIP4, CLIENT4, ROUTER4), (VIP6, CLIENT6, ROUTER6)] {
        let answer = Packet::new(TCP, (vip, 80), (client, 40_000));
        let (kind, code) = if vip == VIP6 { (1, 0) } else { (3, 1) };
        let mut frame = VecFrame::new(&error(router, &answer, 600, kind, code, 0)).from_interface(1);
        native::run(&mut frame, &tables, &IngressSettings::DEFAULT);
        assert_eq!(tables.signs(&client), PassiveFailures::default());
    }
}

#[test]
fn a_program_without_the_stage_counts_none() {
    let tables = tables(false);
    let settings = IngressSettings {
        features: features::ALL & !(features::ICMP | features::NAT),
        ..IngressSettings::DEFAULT
    };
    let mut frame = VecFrame::new(&error(ROUTER4, &sent(4, false), 600, 3, 1, 0)).from_interface(7);
    let (verdict, _) = native::run(&mut frame, &tables, &settings);
    assert_eq!((verdict, tables.signs(&WORKER4)), (Verdict::Pass, PassiveFailures::default()));
}

/// Mode `nat`: an error about a translated packet is the client's to know, and a sign all the same.
#[test]
fn errors_about_translated_packets_count_too() {
    for is_ipv6 in [false, true] {
        let tables = tables(is_ipv6);
        let asked = crate::nat::request(is_ipv6, UDP, 40_000, 0);
        let nat = crate::nat::send(&tables, &asked);
        let (router, kind, code) = if is_ipv6 { (ROUTER6, 1, 4) } else { (ROUTER4, 3, 3) };
        let about = error(router, &crate::nat::translated(&asked, &nat), 600, kind, code, 0);
        let mut frame = VecFrame::new(&about).from_interface(7);
        let (verdict, outcome) = native::run(&mut frame, &tables, &IngressSettings::DEFAULT);
        assert_eq!(verdict, Verdict::Redirect(1), "{outcome:?}");
        assert_eq!(tables.signs(&nat.worker), PassiveFailures { unreachable: 1, refused: 0 });
    }
}

#[test]
fn resets_in_answer_to_a_syn_are_counted() {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    const RST: u8 = 0x04;
    for is_ipv6 in [false, true] {
        let tables = tables(is_ipv6);
        let mut nat = None;
        let mut exchange = |port: u16, asked: &[u8], answers: &[u8]| {
            for flags in asked {
                nat = Some(crate::nat::send(&tables, &crate::nat::request(is_ipv6, TCP, port, *flags)));
            }
            let nat = nat.unwrap();
            for flags in answers {
                let answer = crate::nat::answer(&nat, TCP, *flags);
                let mut frame = VecFrame::new(&answer.bytes()).from_interface(7);
                native::run(&mut frame, &tables, &IngressSettings::DEFAULT);
            }
            tables.signs(&nat.worker).refused
        };
        assert_eq!(exchange(40_000, &[SYN], &[RST | ACK]), 1);
        // The same flow, tried again: one more. Its repetition by the worker: none.
        assert_eq!(exchange(40_000, &[SYN], &[RST | ACK, RST | ACK]), 2);
        // After an answer it is that connection's end; and so it is what a packet without a binding is answered with.
        assert_eq!(exchange(40_001, &[SYN], &[SYN | ACK, RST | ACK]), 2);
        assert_eq!(exchange(40_002, &[ACK], &[RST]), 2);
    }
}
