//! Clients whose frames carry an 802.1Q tag are balanced like any others.

use anyhow::Result;
use test_support::{
    bed::{CLIENT_V6, INGRESS_V6},
    check::{ensure_none_failed, ensure_shared, request},
    netns::Namespace,
    nginx, program,
    stage::{Plan, Stage},
};

/// Neighbour discovery would be tagged too, and then not be heard.
fn fix_neighbour(at: &Namespace, of: &Namespace, address: std::net::Ipv6Addr) -> Result<()> {
    let links: serde_json::Value = serde_json::from_str(&of.ip(&["-json", "link", "show", "dev", "eth0"])?)?;
    let mac = links[0]["address"].as_str().unwrap_or_default();
    at.ip(&["neigh", "replace", &address.to_string(), "lladdr", mac, "dev", "eth0", "nud", "permanent"])
        .map(drop)
}

#[test]
fn tagged_frames_are_balanced() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    let (client, ingress) = (&stage.bed.client, &stage.bed.ingress);
    fix_neighbour(client, ingress, INGRESS_V6)?;
    fix_neighbour(ingress, client, CLIENT_V6)?;
    let _tagger = match program::attach_tagger(client, "eth0", 7) {
        Ok(tagger) => tagger,
        Err(error) => {
            test_support::skip("no-tcx", &format!("{error:#}"));
            return Ok(());
        }
    };
    // The ingress host itself has no VLAN 7: only XDP can have handled these.
    let account = request(&stage, stage.targets(nginx::PORT), 400)?;
    ensure_none_failed(&account)?;
    ensure_shared(&account, &["w1", "w2", "w3"], 0.05)
}
