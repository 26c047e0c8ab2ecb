//! Checks of the interfaces that the program runs on, and of VIPs that are addresses of this host.

use super::Finding;
use crate::{
    apply::offloads::{self, OffloadProblem},
    serve::api::types::{Interface, ServiceInfo, Status},
};
use futures_util::TryStreamExt;
use rtnetlink::{
    Handle,
    packet_route::{address::AddressAttribute, link::LinkAttribute, link::State},
};
use std::{collections::BTreeSet, fs, net::IpAddr};

/// Index of the loopback interface: the first in every network namespace.
const LOOPBACK: u32 = 1;

/// Checks each interface, and the VIPs.
pub async fn examine(status: &Status, services: &[ServiceInfo]) -> Vec<Finding> {
    let mut found = Vec::new();
    let Ok((connection, handle, _)) = rtnetlink::new_connection() else {
        return vec![Finding::warn(
            "interfaces",
            "cannot open a netlink socket",
            "run `lbctl doctor` as root (sudo)",
        )];
    };
    let connection = tokio::spawn(connection);
    for interface in &status.interfaces {
        found.extend(one(&handle, interface).await);
    }
    for waiting in &status.loaded.waiting {
        let fix = "lbd tries again every second";
        found.push(Finding::fail(format!("interface {}", waiting.name), &waiting.reason, fix));
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
        let fix = "restart lbd once the interface is back, or remove it from `iface`";
        return vec![Finding::fail(about, "does not exist", fix)];
    };
    let state = link
        .attributes
        .iter()
        .find_map(|a| if let LinkAttribute::OperState(s) = a { Some(*s) } else { None });
    match state {
        Some(State::Up | State::Unknown) | None => {}
        Some(state) => {
            let fix = format!("`ip link set dev {} up`, and check its cable or peer", interface.name);
            found.push(Finding::fail(&about, format!("is {state:?}").to_lowercase(), fix));
        }
    }
    found.push(if interface.mode == "driver" {
        Finding::ok(&about, "the program runs in the driver")
    } else {
        let what = "the program runs in generic mode, at a fraction of the speed";
        match &interface.why_generic {
            Some(why) => Finding::warn(&about, what, why),
            None => {
                let fix =
                    "use a NIC whose driver supports native XDP; after `lbd detach`, the log of the next start says why it is not used";
                Finding::warn(&about, what, fix)
            }
        }
    });
    // In generic mode the kernel has already restored VLAN tags.
    if interface.mode == "driver" {
        found.extend(offloads(&about, &interface.name));
    }
    found.extend(reverse_path(&about, &interface.name));
    found
}

/// Checks for offloads that are incompatible with XDP.
fn offloads(about: &str, name: &str) -> Vec<Finding> {
    match offloads::examine(name) {
        None => vec![Finding::warn(about, "offloads not checked", "check `ethtool -k` for lro and rxvlan")],
        Some(problems) if problems.is_empty() => {
            vec![Finding::ok(about, "no offload changes packets before the program")]
        }
        Some(problems) => problems.into_iter().map(|problem| offload_finding(about, problem)).collect(),
    }
}

fn offload_finding(about: &str, problem: OffloadProblem) -> Finding {
    let fix = format!("{}, or set `fix_offloads = true` in [lbd]", problem.fix);
    if problem.is_certain {
        Finding::fail(about, problem.what, fix)
    } else {
        Finding::warn(about, problem.what, fix)
    }
}

/// Checks reverse path filtering, which applies to packets that the program passes to the host and can drop some.
fn reverse_path(about: &str, name: &str) -> Option<Finding> {
    let of = |scope: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{scope}/rp_filter");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u8>().ok())
    };
    let strict = of("all")?.max(of(name)?) == 1;
    strict.then(|| {
        let what = "strict reverse path filtering: responses of workers that arrive on another interface are dropped";
        let fix = format!("`sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{name}.rp_filter=2`");
        Finding::warn(about, what, fix)
    })
}

/// Checks for VIPs on an interface other than loopback: on that link this host alone answers ARP and NDP for them.
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
            let fix = "route the VIP through this host, or use --announce; then remove the address with `ip address del`";
            let what = "is an address of an interface of this host, so its stack answers packets that the program passes";
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
    fn offloads_fail_where_packets_are_wrong_for_certain() {
        let problem = |is_certain| OffloadProblem {
            feature: crate::apply::ethtool::RX_VLAN,
            what: "rx-vlan-offload is on".to_owned(),
            fix: "`ethtool -K eth0 rxvlan off`".to_owned(),
            is_certain,
        };
        let certain = offload_finding("interface eth0", problem(true));
        assert_eq!(certain.level, Level::Fail);
        assert!(
            certain
                .fix
                .is_some_and(|f| f.contains("ethtool -K eth0 rxvlan off") && f.contains("fix_offloads"))
        );
        assert_eq!(offload_finding("interface eth0", problem(false)).level, Level::Warn);
    }
}
