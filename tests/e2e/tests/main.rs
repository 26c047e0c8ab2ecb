//! All tests of this suite in one program, so that it is linked once. What measures times runs alone; the others run two
//! at a time, as they mostly wait.

use anyhow::Result;

/// Tests that nothing else may disturb.
mod alone {
    mod death;
    mod flood;
    mod guard;
    mod overload;
    mod replica;
    mod restart;
}
mod announce;
mod attach;
mod balance;
mod bed;
mod chain;
mod change;
mod control;
mod defaults;
mod doctor;
mod events;
mod explain;
mod fragments;
mod interfaces;
mod keep;
mod martians;
mod modes;
mod mtu;
mod quic;
mod quickstart;
mod regions;
mod reject;
mod room;
mod scale;
mod second_chance;
mod signs;
mod stored;
mod tunnel;
mod verdicts;
mod vlan;

/// Name of [`is_a_replica`], for the beds that start it.
const REPLICA: &str = "is_a_replica";

/// What a replica's process runs.
#[test]
#[ignore = "not a test: the worker process of the others"]
fn is_a_replica() -> Result<()> {
    test_support::replica::serve()
}
