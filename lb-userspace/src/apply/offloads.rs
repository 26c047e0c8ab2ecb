//! NIC offloads that XDP cannot work with: with them, the program's packets differ from those on the wire.

use crate::apply::ethtool::{Ethtool, Feature, LRO, RX_GRO_HW, RX_VLAN};
use std::{collections::BTreeMap, fs};

/// An offload that is on and should be off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffloadProblem {
    /// The kernel's name of the offload.
    pub feature: &'static str,
    /// Description of the problem.
    pub what: String,
    /// Command that switches the offload off.
    pub fix: String,
    /// Whether packets are lost or corrupted now; otherwise only tagged packets are affected.
    pub is_certain: bool,
}

/// Finds the offloads of an interface that should be off. `vlans`: names of the VLAN devices above it.
pub fn offload_problems(
    interface: &str,
    driver: &str,
    features: &BTreeMap<String, Feature>,
    vlans: &[String],
) -> Vec<OffloadProblem> {
    let is_on = |name: &str| features.get(name).is_some_and(|f| f.is_on);
    let mut found = Vec::new();
    if is_on(LRO) {
        let what =
            "large-receive-offload is on: packets joined by the NIC are too large to be forwarded".to_owned();
        let fix = format!("`ethtool -K {interface} lro off`");
        found.push(OffloadProblem { feature: LRO, what, fix, is_certain: true });
    }
    // virtio's driver asks its host for unjoined packets while a program is attached, and reports the offload as on.
    if is_on(RX_GRO_HW) && driver != "virtio_net" {
        let what = "rx-gro-hw is on: packets joined by the NIC are too large to be forwarded".to_owned();
        let fix = format!("`ethtool -K {interface} rx-gro-hw off`");
        found.push(OffloadProblem { feature: RX_GRO_HW, what, fix, is_certain: true });
    }
    // A tag that the NIC strips is invisible to the program and missing in its answers. veth keeps the tag in the packet.
    if is_on(RX_VLAN) && driver != "veth" {
        let fix = format!("`ethtool -K {interface} rxvlan off`");
        let what = if vlans.is_empty() {
            "rx-vlan-offload is on: answers to tagged packets (echo, nat, too-big) would be sent untagged"
                .to_owned()
        } else {
            format!(
                "rx-vlan-offload is on below {}: the program's answers (echo, nat, too-big) are sent untagged",
                vlans.join(", ")
            )
        };
        found.push(OffloadProblem { feature: RX_VLAN, what, fix, is_certain: !vlans.is_empty() });
    }
    found
}

/// Examines an interface; none if its driver does not report offloads.
pub fn examine(interface: &str) -> Option<Vec<OffloadProblem>> {
    let tool = Ethtool::open().ok()?;
    let driver = tool.driver(interface).unwrap_or_default();
    let features = tool.features(interface).ok()?;
    Some(offload_problems(interface, &driver, &features, &vlans_above(interface)))
}

/// Lists the VLAN devices above an interface.
pub fn vlans_above(interface: &str) -> Vec<String> {
    vlans_in(&fs::read_to_string("/proc/net/vlan/config").unwrap_or_default(), interface)
}

fn vlans_in(config: &str, interface: &str) -> Vec<String> {
    let columns = config.lines().filter_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        Some((columns.next()?, columns.nth(1)?))
    });
    columns.filter(|(_, below)| *below == interface).map(|(name, _)| name.to_owned()).collect()
}

/// Switches off the offloads that should be off, and logs the result of each.
pub fn fix(interface: &str) {
    let Some(offload_problems) = examine(interface) else { return };
    let Ok(tool) = Ethtool::open() else { return };
    for OffloadProblem { feature, what, fix, .. } in offload_problems {
        match tool.switch_off(interface, feature) {
            Ok(true) => tracing::info!(interface, feature, "switched off an offload: {what}"),
            Ok(false) => tracing::warn!(interface, "{what}; the driver does not allow switching it off"),
            Err(error) => tracing::warn!(interface, "{what}; {fix} failed: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(names: &[&str]) -> BTreeMap<String, Feature> {
        names.iter().map(|name| ((*name).to_owned(), Feature { is_on: true, is_fixed: false })).collect()
    }

    #[test]
    fn offloads_that_join_packets_are_named_with_their_switch() {
        let found = offload_problems("eth0", "mlx5_core", &on(&[LRO, "rx-checksum"]), &[]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].fix, "`ethtool -K eth0 lro off`");
        assert!(offload_problems("eth0", "igb", &on(&["rx-checksum"]), &[]).is_empty());
        assert_eq!(
            offload_problems("eth0", "bnxt_en", &on(&[RX_GRO_HW]), &[])[0].fix,
            "`ethtool -K eth0 rx-gro-hw off`"
        );
        assert!(
            offload_problems("eth0", "virtio_net", &on(&[RX_GRO_HW]), &[]).is_empty(),
            "its driver unjoins packets"
        );
    }

    #[test]
    fn tags_that_the_nic_takes_off_are_certain_trouble_under_vlan_devices() {
        let vlans = ["eth0.7".to_owned()];
        let found = offload_problems("eth0", "igb", &on(&[RX_VLAN]), &vlans);
        assert!(found[0].is_certain && found[0].what.contains("eth0.7"), "{found:?}");
        assert_eq!(found[0].fix, "`ethtool -K eth0 rxvlan off`");
        assert!(!offload_problems("eth0", "igb", &on(&[RX_VLAN]), &[])[0].is_certain);
        assert!(
            offload_problems("eth0", "veth", &on(&[RX_VLAN]), &vlans).is_empty(),
            "veth leaves tags in packets"
        );
    }

    #[test]
    fn vlan_devices_are_found_by_what_they_stand_on() {
        let config = "VLAN Dev name    | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\n\
                      eth0.7         | 7  | eth0\nblue           | 9  | eth0\neth1.7         | 7  | eth1\n";
        assert_eq!(vlans_in(config, "eth0"), ["eth0.7", "blue"]);
        assert_eq!(vlans_in("", "eth0"), Vec::<String>::new());
    }
}
