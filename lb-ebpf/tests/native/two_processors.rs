//! Two packets on two processors at once: every order of their accesses to the tables with up to two switches from one
//! processor to the other, and with three where a packet makes few accesses.
//!
//! An access to one entry is one step. So is what a program does with an entry in place, together with what it reads of
//! others meanwhile.

use crate::{
    build::Packet,
    nat::{answer, request, tables},
};
use lb_common::{service::TCP, settings::IngressSettings};
use lb_ebpf::native::{self, HashTables, VecFrame};
use std::{
    iter,
    sync::{Arc, Condvar, Mutex},
    thread,
};

const SYN: u8 = 0x02;
/// Orders with three switches that a test tries at most.
const MOST: usize = 4_000;

/// Which of two threads may go on, and when it lets the other go on.
struct Baton {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    running: usize,
    has_ended: [bool; 2],
    /// Accesses that the running thread may still make before each switch, the next one first.
    steps: Vec<usize>,
    accesses: [usize; 2],
}

impl Baton {
    /// Called by a thread before it makes an access.
    fn step(&self, thread: usize) {
        let mut state = self.state.lock().unwrap();
        if state.steps.first() == Some(&0) && !state.has_ended[1 - thread] {
            state.steps.remove(0);
            state.running = 1 - thread;
            self.changed.notify_all();
        }
        while state.running != thread {
            state = self.changed.wait(state).unwrap();
        }
        if let Some(left) = state.steps.first_mut() {
            *left = left.saturating_sub(1);
        }
        state.accesses[thread] += 1;
    }

    fn begin(&self, thread: usize) {
        let mut state = self.state.lock().unwrap();
        while state.running != thread {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn end(&self, thread: usize) {
        let mut state = self.state.lock().unwrap();
        state.has_ended[thread] = true;
        state.running = 1 - thread;
        self.changed.notify_all();
    }
}

/// Tables that two threads use in turn.
struct Shared(HashTables);

// SAFETY: only the thread that the baton names uses the tables, and the baton's lock orders the threads' accesses.
unsafe impl Sync for Shared {}
// SAFETY: nothing in the tables belongs to a thread.
unsafe impl Send for Shared {}

fn deliver(tables: &HashTables, packet: &Packet, settings: &IngressSettings) {
    native::run(&mut VecFrame::new(&packet.bytes()).from_interface(1), tables, settings);
}

/// Runs both packets with a switch after each of these numbers of accesses; returns the tables and both numbers of accesses.
fn run(
    tables: HashTables,
    packets: &[Packet; 2],
    settings: IngressSettings,
    steps: &[usize],
) -> (HashTables, [usize; 2]) {
    let state = State { running: 0, has_ended: [false; 2], steps: steps.to_vec(), accesses: [0; 2] };
    let baton = Arc::new(Baton { state: Mutex::new(state), changed: Condvar::new() });
    let shared = Shared(tables);
    thread::scope(|scope| {
        for (number, packet) in packets.iter().enumerate() {
            let (baton, shared) = (Arc::clone(&baton), &shared);
            scope.spawn(move || {
                baton.begin(number);
                let step = Arc::clone(&baton);
                native::run_on(
                    number,
                    move || step.step(number),
                    || {
                        deliver(&shared.0, packet, &settings);
                    },
                );
                baton.end(number);
            });
        }
    });
    let accesses = baton.state.lock().unwrap().accesses;
    (shared.0, accesses)
}

/// Runs two packets in all orders with up to three switches, and checks the tables after each: at once with up to
/// `at_once` switches, otherwise after one more packet of each flow. Without an atomic exchange of an entry, a processor
/// that takes an unconfirmed flow's port may take it from the flow that has just done so.
fn all_orders(
    make: impl Fn() -> HashTables,
    packets: &[Packet; 2],
    settings: IngressSettings,
    at_once: usize,
    check: impl Fn(&HashTables, &[usize]),
) {
    let mut orders = 0;
    for packets in [packets.clone(), [packets[1].clone(), packets[0].clone()]] {
        let (_, [first, second]) = run(make(), &packets, settings, &[]);
        let thirds: Vec<usize> =
            if first * first * second < MOST { (1..=first).collect() } else { vec![1, 2, 3] };
        for i in 0..=first {
            // The first to run makes i accesses, then the other j, then the first k, then the other the rest.
            for j in 1..=second {
                for steps in iter::once(vec![i, j]).chain(thirds.iter().map(|k| vec![i, j, *k])) {
                    let (tables, _) = run(make(), &packets, settings, &steps);
                    if steps.len() > at_once {
                        for packet in &packets {
                            deliver(&tables, packet, &settings);
                        }
                    }
                    check(&tables, &steps);
                    orders += 1;
                }
            }
        }
    }
    assert!(orders > 20, "{orders} orders");
}

/// Asserts that both entries of each binding belong to each other, and that no port is two flows'.
fn assert_consistent(tables: &HashTables, steps: &[usize]) {
    let replies = tables.replies();
    for (flow, nat) in tables.nats() {
        let (_, reply) = replies
            .iter()
            .find(|(key, _)| {
                (key.worker, key.source, key.source_port) == (nat.worker, nat.source, nat.source_port)
            })
            .unwrap_or_else(|| panic!("{steps:?}: no answer reaches {flow:?}"));
        assert_eq!(reply.flow, flow, "{steps:?}: answers go to another client");
    }
}

/// Settings with a single port for each worker.
const ONE_PORT: IngressSettings =
    IngressSettings { nat_first: 20_000, nat_last: 20_000, ..IngressSettings::DEFAULT };

fn new_flow(port: u16) -> Packet {
    request(false, TCP, port, SYN)
}

/// Tables whose only port is that of an unconfirmed flow.
fn with_unconfirmed() -> HashTables {
    let tables = tables(false);
    deliver(&tables, &new_flow(999), &ONE_PORT);
    assert_eq!(tables.nats().len(), 1);
    tables
}

#[test]
fn two_new_flows_do_not_share_a_port() {
    let packets = [new_flow(1_000), new_flow(1_001)];
    all_orders(|| tables(false), &packets, ONE_PORT, 2, assert_consistent);
}

#[test]
fn two_new_flows_do_not_share_the_port_of_an_unconfirmed_one() {
    let packets = [new_flow(1_000), new_flow(1_001)];
    all_orders(with_unconfirmed, &packets, ONE_PORT, 0, assert_consistent);
}

#[test]
fn two_first_packets_of_a_flow_make_one_binding() {
    let packets = [new_flow(1_000), new_flow(1_000)];
    let check = |tables: &HashTables, steps: &[usize]| {
        assert_consistent(tables, steps);
        assert_eq!((tables.nats().len(), tables.replies().len()), (1, 1), "{steps:?}");
    };
    all_orders(|| tables(false), &packets, IngressSettings::DEFAULT, 3, check);
}

#[test]
fn an_answer_and_a_new_flow_that_takes_its_port() {
    let nat = with_unconfirmed().nats()[0].1;
    let packets = [new_flow(1_000), answer(&nat, TCP, 0x12)];
    all_orders(with_unconfirmed, &packets, ONE_PORT, 3, assert_consistent);
}
