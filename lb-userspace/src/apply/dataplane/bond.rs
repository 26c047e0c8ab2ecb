//! Bonds: an XDP program attached to a bond runs on the interfaces below it, and sees their indices.
//!
//! `EGRESS` maps such an interface to its bond, so that answers of mode `nat` leave by the bond.

use std::{fs, path::Path};

/// Directory in which the kernel lists bonds with the interfaces below them, for this network namespace.
const BONDS: &str = "/proc/net/bonding";

/// Index of the bond above an interface, if any.
pub fn over(ifindex: u32) -> Option<u32> {
    let name = nix::net::if_::if_indextoname(ifindex).ok()?;
    let bond = bond_in(Path::new(BONDS), name.to_str().ok()?)?;
    nix::net::if_::if_nametoindex(bond.as_str()).ok()
}

fn bond_in(bonds: &Path, interface: &str) -> Option<String> {
    let has = |text: &str| {
        text.lines().any(|line| line.strip_prefix("Slave Interface:").is_some_and(|s| s.trim() == interface))
    };
    let all = fs::read_dir(bonds).ok()?.filter_map(Result::ok);
    let bond = all.into_iter().find(|entry| fs::read_to_string(entry.path()).is_ok_and(|text| has(&text)))?;
    bond.file_name().into_string().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bond_is_found_by_what_is_below_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let text = "Ethernet Channel Bonding Driver: v6.1\n\nBonding Mode: fault-tolerance (active-backup)\n\
                    Primary Slave: None\nCurrently Active Slave: eth0\n\nSlave Interface: eth0\nMII Status: up\n\n\
                    Slave Interface: eth10\nMII Status: up\n";
        fs::write(directory.path().join("bond0"), text).expect("it is written");
        let found = |name| bond_in(directory.path(), name);
        assert_eq!(found("eth0").as_deref(), Some("bond0"));
        assert_eq!(found("eth10").as_deref(), Some("bond0"));
        assert_eq!(found("eth1"), None, "not a prefix of a name");
        assert_eq!(bond_in(&directory.path().join("none"), "eth0"), None, "no bonds at all");
    }

    #[test]
    fn what_is_not_below_a_bond_has_none() {
        assert_eq!(over(1), None);
    }
}
