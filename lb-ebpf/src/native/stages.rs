//! The tail calls of the ingress object, as plain calls.

use super::{HashTables, VecFrame};
use crate::{
    Verdict, fragment, icmp_stage,
    ingress::{self, Outcome},
    quic,
};
use lb_common::{names::stage, settings::IngressSettings};

/// A packet's whole way: `ingress`, and the stage that it jumps to, if any.
pub fn run(frame: &mut VecFrame, tables: &HashTables, settings: &IngressSettings) -> (Verdict, Outcome) {
    let (verdict, outcome) = ingress::process(frame, tables, settings);
    match verdict {
        Verdict::Stage(stage::ICMP) => icmp_stage::process(frame, tables, settings),
        Verdict::Stage(stage::FRAGMENT) => fragment::process(frame, tables, settings),
        Verdict::Stage(stage::QUIC) => quic::process(frame, tables, settings),
        _ => (verdict, outcome),
    }
}
