//! NICs instead of veth pairs: where `LB_TEST_NICS` is set, the machine has pairs of them that lead to each other,
//! known by their addresses, `52:54:00:00:0P:00` and `…:01` for pair P. `cargo xtask test kernels` boots such machines.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::netns::{Namespace, run};

/// Whether links are to be made of NICs.
pub fn are_there() -> bool {
    std::env::var_os("LB_TEST_NICS").is_some()
}

/// Moves the next pair that is free to its places. They come back when their namespaces go.
pub fn connect(left: (&Namespace, &str), right: (&Namespace, &str), mtu: &str) -> Result<()> {
    let links: Value = serde_json::from_str(&run(Command::new("ip").args(["-json", "link", "show"]))?)?;
    let pair = (0..10).find_map(|pair| Some([find(&links, pair, 0)?, find(&links, pair, 1)?]));
    let pair = pair.with_context(|| format!("no pair of NICs is free for {} and {}", left.1, right.1))?;
    for ((namespace, name), nic) in [left, right].into_iter().zip(&pair) {
        run(Command::new("ip").args(["link", "set", "dev", nic, "down"]))?;
        run(Command::new("ip").args(["link", "set", "dev", nic, "netns", namespace.name(), "name", name]))?;
        namespace.ip(&["link", "set", "dev", name, "mtu", mtu])?;
    }
    Ok(())
}

fn find(links: &Value, pair: u32, end: u32) -> Option<String> {
    let address = format!("52:54:00:00:{pair:02x}:{end:02x}");
    let link = links.as_array()?.iter().find(|link| link["address"] == address.as_str())?;
    link["ifname"].as_str().map(str::to_owned)
}
