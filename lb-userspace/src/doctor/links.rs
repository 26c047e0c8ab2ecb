//! The interfaces that the program runs on, and addresses that should not be this host's.

use super::Finding;
use crate::api::types::{Interface, ServiceInfo, Status};
use futures_util::TryStreamExt;
use rtnetlink::{
    Handle,
    packet_route::{address::AddressAttribute, link::LinkAttribute, link::State},
};
use std::{collections::BTreeSet, fs, net::IpAddr, process::Command};

/// Index of the loopback interface: the first in every network namespace.
const LOOPBACK: u32 = 1;

/// Looks at them.
pub async fn examine(status: &Status, services: &[ServiceInfo]) -> Vec<Finding> {
    let mut found = Vec::new();
    let Ok((connection, handle, _)) = rtnetlink::new_connection() else {
        return vec![Finding::warn("interfaces", "cannot open a netlink socket", "run it as root (sudo)")];
    };
    let connection = tokio::spawn(connection);
    for interface in &status.interfaces {
        found.extend(one(&handle, interface).await);
    }
    found.extend(vips(&handle, status, services).await);
    connection.abort();
    found
}

async fn one(handle: &Handle, interface: &Interface) -> Vec<Finding> {
    let about = format!("interface {}", interface.name);
    let mut found = Vec::new();
    let link = handle.link().get().match_index(interface.ifindex).execute().try_next().await;
    let Ok(Some(link)) = link else {
        let fix = "restart lbd once it is back, or take it out of `iface`";
        return vec![Finding::fail(about, "gone", fix)];
    };
    let state = link
        .attributes
        .iter()
        .find_map(|a| if let LinkAttribute::OperState(s) = a { Some(*s) } else { None });
    match state {
        Some(State::Up | State::Unknown) | None => {}
        Some(state) => {
            let fix = format!("`ip link set dev {} up`, and look at its cable or peer", interface.name);
            found.push(Finding::fail(&about, format!("is {state:?}").to_lowercase(), fix));
        }
    }
    found.push(if interface.mode == "driver" {
        Finding::ok(&about, "the program runs in the driver")
    } else {
        let fix = "use a NIC whose driver has native XDP, or see why it refused: MTU, LRO, number of queues";
        Finding::warn(&about, "the program runs in generic mode, at a fraction of the speed", fix)
    });
    found.extend(offloads(&about, &interface.name));
    found.extend(reverse_path(&about, &interface.name));
    found
}

/// Offloads that join packets before the program sees them.
fn offloads(about: &str, name: &str) -> Option<Finding> {
    let said = Command::new("ethtool").args(["-k", name]).output().ok().filter(|o| o.status.success());
    let Some(said) = said else {
        return Some(Finding::warn(about, "offloads not looked at", "install ethtool"));
    };
    joining(about, name, &String::from_utf8_lossy(&said.stdout))
}

fn joining(about: &str, name: &str, features: &str) -> Option<Finding> {
    let is_on = |feature: &str| {
        let line = features.lines().find_map(|l| l.trim().strip_prefix(feature)?.strip_prefix(':'));
        line.is_some_and(|rest| rest.trim().starts_with("on"))
    };
    let on: Vec<(&str, &str)> = [("large-receive-offload", "lro"), ("rx-gro-hw", "rx-gro-hw")]
        .into_iter()
        .filter(|(feature, _)| is_on(feature))
        .collect();
    if on.is_empty() {
        return Some(Finding::ok(about, "no offload joins packets before the program"));
    }
    let names: Vec<&str> = on.iter().map(|(feature, _)| *feature).collect();
    let flags: Vec<String> = on.iter().map(|(_, flag)| format!("{flag} off")).collect();
    let what = format!("{} on: joined packets are too large to be sent on", names.join(" and "));
    Some(Finding::fail(about, what, format!("`ethtool -K {name} {}`", flags.join(" "))))
}

/// Only packets that the program hands to the host are looked at by the kernel; strictness loses some of those.
fn reverse_path(about: &str, name: &str) -> Option<Finding> {
    let of = |scope: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{scope}/rp_filter");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u8>().ok())
    };
    let strict = of("all")?.max(of(name)?) == 1;
    strict.then(|| {
        let what = "strict reverse path filtering: answers of workers that ask for this host by another way are lost";
        let fix = format!("`sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{name}.rp_filter=2`");
        Finding::warn(about, what, fix)
    })
}

/// VIPs on an interface other than loopback: whoever asks on that link is answered by this host, and by it alone.
async fn vips(handle: &Handle, status: &Status, services: &[ServiceInfo]) -> Vec<Finding> {
    let wanted: BTreeSet<IpAddr> = services.iter().map(|s| s.spec.vip).collect();
    let announced = status.announcement.is_some();
    let mut found = Vec::new();
    let mut addresses = handle.address().get().execute();
    while let Ok(Some(message)) = addresses.try_next().await {
        let address = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        let Some(vip) = address.filter(|ip| wanted.contains(ip)) else { continue };
        if message.header.index != LOOPBACK && !announced {
            let fix = "let routers lead to it through this host, or announce it; then `ip address del` takes it off";
            let what =
                "is an address of an interface of this host, whose stack answers what the program passes";
            found.push(Finding::warn(format!("VIP {vip}"), what, fix));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn offloads_that_join_packets_are_named_with_their_switch() {
        let text = "Features for eth0:\n\tgeneric-receive-offload: on\nlarge-receive-offload: on\nrx-gro-hw: off [fixed]\n";
        let found = joining("interface eth0", "eth0", text).expect("something is said");
        assert_eq!(found.level, Level::Fail);
        assert_eq!(found.fix.as_deref(), Some("`ethtool -K eth0 lro off`"));
        let text = "large-receive-offload: off [fixed]\nrx-gro-hw: off [fixed]\n";
        assert_eq!(joining("", "eth0", text).map(|f| f.level), Some(Level::Ok));
    }
}
