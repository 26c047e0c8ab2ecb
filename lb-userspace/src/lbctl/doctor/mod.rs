//! `lbctl doctor`: checks this host, its interfaces, and the path to each worker, and suggests fixes.
//!
//! Input: lbd's own reports (none if it cannot be reached), and the host. Output: [`Finding`]s. Changes nothing; sends
//! pings to the workers and one connection attempt through each tunnel, for which it needs `CAP_NET_RAW`.
//! Called by `commands`.

mod host;
mod links;
mod mtu;
mod packet;
mod tunnel;

use crate::{
    desired::model::{ForwardingMode, Health, Name, Protocol, Service},
    serve::api::types::{BackendInfo, ServiceInfo, Status},
};
use lb_common::{backend::mode, mapped};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

/// Severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// No problem.
    Ok,
    /// Works but could be better, or could not be checked.
    Warn,
    /// Something does not work.
    Fail,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Severity.
    pub level: Level,
    /// What was checked.
    pub about: String,
    /// What was found.
    pub what: String,
    /// How to fix the problem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    fn ok(about: impl Into<String>, what: impl Into<String>) -> Self {
        Self { level: Level::Ok, about: about.into(), what: what.into(), fix: None }
    }

    fn warn(about: impl Into<String>, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { level: Level::Warn, about: about.into(), what: what.into(), fix: Some(fix.into()) }
    }

    fn fail(about: impl Into<String>, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { level: Level::Fail, ..Self::warn(about, what, fix) }
    }
}

/// lbd's state, as its API reports it.
#[derive(Clone, Debug)]
pub struct DaemonView {
    /// `GET /v1/status`.
    pub status: Status,
    /// `GET /v1/services`.
    pub services: Vec<ServiceInfo>,
    /// `GET /v1/backends`.
    pub backends: Vec<BackendInfo>,
}

/// What to check.
#[derive(Clone, Debug)]
pub struct DoctorPlan {
    /// Directory in which lbd pins its programs and maps.
    pub pin_path: PathBuf,
    /// Whether to send packets to the workers.
    pub probe: bool,
}

/// Runs all checks. Takes some seconds if workers do not answer.
pub async fn examine(plan: &DoctorPlan, view: Option<&DaemonView>) -> Vec<Finding> {
    let mut found = host::examine(&plan.pin_path);
    let Some(view) = view else { return found };
    found.extend(host::daemon(&view.status));
    found.extend(links::examine(&view.status, &view.services).await);
    found.extend(backends(view));
    if plan.probe {
        let paths = worker_paths(view);
        let probed = tokio::task::spawn_blocking(move || probe(&paths)).await;
        found.extend(probed.unwrap_or_default());
    }
    found
}

/// Checks the backends as lbd sees them.
fn backends(view: &DaemonView) -> Vec<Finding> {
    let mut found = Vec::new();
    let forwards = host::forwards();
    let mut reachable: BTreeMap<&Name, usize> = BTreeMap::new();
    for backend in &view.backends {
        let about = format!("backend {}/{}", backend.service, backend.name);
        let is_local =
            view.services.iter().any(|s| s.name == backend.service && s.spec.mode == ForwardingMode::Local);
        match (&backend.status.problem, &backend.status.next_hop) {
            (Some(problem), _) => {
                let fix = "check `ip route get` and `ip neigh` for its address: lbd follows both";
                found.push(Finding::fail(&about, problem, fix));
            }
            (None, None) if !is_local => {
                let fix = format!("run `ping {}` on this host, and check `ip neigh`", backend.spec.address);
                found.push(Finding::warn(
                    &about,
                    "its next hop is not resolved: each packet needs a kernel route lookup",
                    fix,
                ));
                if !forwards(backend.spec.address.is_ipv4()) {
                    let fix = "`sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1`";
                    let what = "the kernel route lookup refuses packets: forwarding is off on this host";
                    found.push(Finding::fail(about, what, fix));
                }
            }
            _ if backend.status.health == Health::Unhealthy => {
                let why =
                    backend.status.last_probe.as_ref().map_or(String::new(), |p| format!(": {}", p.reason));
                let fix =
                    format!("`lbctl backend show {} {}` shows its probes", backend.service, backend.name);
                found.push(Finding::warn(about, format!("unhealthy{why}"), fix));
            }
            _ => *reachable.entry(&backend.service).or_default() += 1,
        }
    }
    // One line for all backends without a problem: there may be thousands.
    found.extend(reachable.into_iter().map(|(service, count)| {
        let all = view.backends.iter().filter(|b| b.service == *service).count();
        Finding::ok(
            format!("backends of {service}"),
            format!("{count} of {all} are reachable, as far as lbd knows"),
        )
    }));
    if view.backends.is_empty() {
        found.push(Finding::ok("backends", "none"));
    }
    found
}

/// The path of one service's packets to a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerPath {
    service: Name,
    spec: Service,
    backend: Name,
    address: IpAddr,
    /// MTU of the first link; 1,500 if it is not known.
    mtu: u16,
    /// Bytes that the forwarding mode adds to a packet.
    overhead: usize,
}

/// Returns the paths that leave this host.
fn worker_paths(view: &DaemonView) -> Vec<WorkerPath> {
    let specs: BTreeMap<&Name, &Service> = view.services.iter().map(|s| (&s.name, &s.spec)).collect();
    let path = |b: &BackendInfo| {
        let spec = *specs.get(&b.service)?;
        let overhead = overhead(spec, b.spec.address)?;
        Some(WorkerPath {
            service: b.service.clone(),
            spec: spec.clone(),
            backend: b.name.clone(),
            address: b.spec.address,
            mtu: b.status.next_hop.map_or(1_500, |hop| hop.mtu),
            overhead,
        })
    };
    view.backends.iter().filter_map(path).collect()
}

/// Bytes that a service's mode adds to a packet to this address; None if packets do not leave this host.
fn overhead(service: &Service, address: IpAddr) -> Option<usize> {
    let mode = match service.mode {
        ForwardingMode::Ipip => mode::IPIP,
        ForwardingMode::Gue if service.has_second_chance() => mode::GUE_CHAIN,
        ForwardingMode::Gue => mode::GUE,
        // L2 forwarding and NAT add no header; translation between families adds at most the larger IP header.
        ForwardingMode::L2 | ForwardingMode::Nat => return Some(0),
        ForwardingMode::Local => return None,
    };
    let address = match address {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    };
    lb_ebpf::forward::overhead(&lb_common::Backend { address, mode, ..Default::default() })
}

/// Measures each worker's path, and tries each tunnel.
fn probe(workers: &[WorkerPath]) -> Vec<Finding> {
    let mut targets: BTreeMap<IpAddr, u16> = BTreeMap::new();
    for worker in workers {
        let mtu = targets.entry(worker.address).or_insert(worker.mtu);
        *mtu = worker.mtu.max(*mtu);
    }
    let paths = match mtu::measure(&targets) {
        Ok(paths) => paths,
        Err(error) => {
            let fix = "run `lbctl doctor` as root (sudo), or with CAP_NET_RAW";
            return vec![Finding::warn("paths", format!("not measured: {error}"), fix)];
        }
    };
    let mut found: Vec<Finding> = paths.iter().map(|(address, path)| mtu::finding(*address, *path)).collect();
    let services: BTreeSet<&Name> = workers.iter().map(|worker| &worker.service).collect();
    for service in services {
        found.extend(largest_packet(service, workers, &paths));
    }
    found.extend(tunnel::examine(workers));
    found
}

/// Reports the largest packet that reaches all workers of a service, and the MSS that fits.
fn largest_packet(
    service: &Name,
    workers: &[WorkerPath],
    paths: &BTreeMap<IpAddr, mtu::Path>,
) -> Option<Finding> {
    let of_service = workers.iter().filter(|worker| worker.service == *service);
    let inner = |worker: &WorkerPath| match paths.get(&worker.address)? {
        mtu::Path::Takes(mtu) => Some(usize::from(*mtu).saturating_sub(worker.overhead)),
        mtu::Path::Silent => None,
    };
    let (least, worker) =
        of_service.filter_map(|worker| Some((inner(worker)?, worker))).min_by_key(|(least, _)| *least)?;
    let about = format!("service {service}");
    Some(mss_finding(about, least, worker))
}

/// Largest packet of a client whose own links have the usual MTU.
const USUAL_MTU: usize = 1_500;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;

fn mss_finding(about: String, least: usize, worker: &WorkerPath) -> Finding {
    let (headers, family) = if worker.spec.vip.is_ipv4() { (40, "-4") } else { (60, "-6") };
    let mss = least.saturating_sub(headers);
    let what = format!(
        "packets of up to {least} bytes reach its workers ({} bytes of headers are added for {})",
        worker.overhead, worker.backend
    );
    if least >= USUAL_MTU {
        let mss = if worker.spec.protocol == Protocol::Udp { String::new() } else { format!(": MSS {mss}") };
        return Finding::ok(about, format!("{what}{mss}"));
    }
    let what = format!("{what}; larger packets are answered with ICMP \"too big\"");
    let needed = USUAL_MTU + worker.overhead;
    let raise = format!(
        "raise the MTU between this host and the workers to {needed} (if the driver refuses this while a program is attached, \
         as igb does: `lbd detach`, `ip link set dev IFACE mtu {needed}`, then start lbd)"
    );
    let fix = if worker.spec.protocol == Protocol::Udp {
        let payload = least.saturating_sub(headers - TCP_HEADER + UDP_HEADER);
        format!("{raise}; or have clients and servers send datagrams of at most {payload} bytes")
    } else {
        format!(
            "have each worker offer clients an MSS of {mss}: `ip {family} route change default via ROUTER advmss {mss}` \
             (or TCP_MAXSEG {mss} on its listener); or {raise}"
        )
    };
    Finding::warn(about, what, fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(vip: &str, mode: &str, address: &str) -> WorkerPath {
        let text = format!(
            "[[service]]\nname = \"web\"\nvip = \"{vip}\"\nport = 80\nprotocol = \"tcp\"\nmode = \"{mode}\"\n\
             [[service.backend]]\nname = \"w1\"\naddress = \"{address}\"\n"
        );
        let file = crate::desired::config::File::parse(&text).expect("it is sound");
        let desired = file.desired.expect("it has services");
        let (name, spec) = desired.services.iter().next().expect("one");
        let address = address.parse().expect("an address");
        let overhead = overhead(spec, address).expect("it leaves this host");
        let backend = spec.backends.keys().next().expect("one").clone();
        WorkerPath { service: name.clone(), spec: (**spec).clone(), backend, address, mtu: 1_500, overhead }
    }

    #[test]
    fn what_fits_is_the_path_without_the_headers_of_the_mode() {
        for (vip, mode, address, overhead) in [
            ("192.0.2.1", "ipip", "10.0.0.1", 20),
            ("192.0.2.1", "ipip", "fd00::1", 40),
            ("2001:db8::1", "ipip", "fd00::1", 40),
            ("192.0.2.1", "l2", "10.0.0.1", 0),
            ("192.0.2.1", "nat", "10.0.0.1", 0),
        ] {
            assert_eq!(worker(vip, mode, address).overhead, overhead, "{mode} to {address}");
        }
    }

    #[test]
    fn the_number_is_what_advmss_takes() {
        let paths = |address: &str, mtu| {
            BTreeMap::from([(address.parse().expect("an address"), mtu::Path::Takes(mtu))])
        };
        let found = |worker: &WorkerPath, mtu| {
            largest_packet(
                &worker.service,
                std::slice::from_ref(worker),
                &paths(&worker.address.to_string(), mtu),
            )
            .expect("it was measured")
        };
        let v4 = worker("192.0.2.1", "ipip", "10.0.0.1");
        let short = found(&v4, 1_400);
        assert_eq!(short.level, Level::Warn);
        assert!(short.fix.as_deref().is_some_and(|f| f.contains("advmss 1340")), "{short:?}");
        assert!(short.fix.as_deref().is_some_and(|f| f.contains("to 1520")), "{short:?}");
        let v6 = worker("2001:db8::1", "ipip", "fd00::1");
        assert!(found(&v6, 1_400).fix.is_some_and(|f| f.contains("advmss 1300")));
        assert_eq!(found(&v4, 1_520).level, Level::Ok);
        let mut udp = v4.clone();
        udp.spec.protocol = Protocol::Udp;
        let fix = found(&udp, 1_400).fix.expect("it is short");
        assert!(
            !fix.contains("MSS") && fix.contains("at most 1352 bytes") && fix.contains("detach"),
            "{fix}"
        );
        assert!(!found(&udp, 1_520).what.contains("MSS"));
        assert_eq!(found(&v4, 9_000).level, Level::Ok);
    }
}
