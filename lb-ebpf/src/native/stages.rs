//! The tail calls of the ingress object, as plain calls.

use super::{HashTables, VecFrame};
use crate::{
    Verdict,
    icmp::{dispatch, reject},
    ingress::{self, fragment},
    nat,
    packet::verdict::Outcome,
    quic,
};
use lb_common::{names::stage, settings::IngressSettings};

/// A packet's whole way: `ingress`, and the stages that it jumps to, if any.
pub fn run(frame: &mut VecFrame, tables: &HashTables, settings: &IngressSettings) -> (Verdict, Outcome) {
    let (mut verdict, mut outcome) = ingress::process(frame, tables, settings);
    // The kernel allows 33 jumps. One processor needs four; a binding that another takes meanwhile is made again.
    for _ in 0..12 {
        (verdict, outcome) = match verdict {
            Verdict::Stage(stage::ICMP) => dispatch::process(frame, tables, settings),
            Verdict::Stage(stage::FRAGMENT) => fragment::process(frame, tables, settings),
            Verdict::Stage(stage::QUIC) => quic::process(frame, tables, settings),
            Verdict::Stage(stage::NAT) => nat::process(frame, tables, settings),
            Verdict::Stage(stage::NAT_BIND) => nat::process_new(frame, tables, settings),
            Verdict::Stage(stage::NAT_FRAGMENT) => nat::process_fragment(frame, tables, settings),
            Verdict::Stage(stage::REJECT) => reject::process(frame, tables, settings),
            Verdict::Stage(stage::NAT_ERROR) => nat::process_error(frame, tables, settings),
            _ => return (verdict, outcome),
        };
    }
    panic!("stages jump in a circle")
}
