//! Rules for a single service, independent of the others.
//!
//! Input: a [`Service`]. Output: every violated rule. Called by the check of the whole state.

use super::{
    Backend, ForwardingMode, HealthKind, HttpCheck, Name, Ports, Protocol, Scheduler, Service, Via,
    check::Invalid, region_list,
};
use lb_common::limits::TABLE_SIZES;
use std::{collections::BTreeMap, net::IpAddr};

/// Idle times of TCP flows, in seconds: below ten a sweep could not keep up, and a week is longer than any keep-alive.
const MIN_TCP_TIMEOUT_S: u32 = 10;
const MAX_TCP_TIMEOUT_S: u32 = 604_800;
/// Largest load cap, in flows: scores have 32 bits.
const MAX_LOAD_CAP: u32 = u32::MAX / lb_common::load::FLOW;

/// Spelling of a value in the configuration file.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Why an address can be neither a VIP nor a backend, if so.
fn check_address(address: IpAddr) -> Option<String> {
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Some(format!("{address} is an IPv4 address in IPv6 form: write {v4}"));
    }
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || broadcast {
        return Some(format!("{address} is not a unicast address"));
    }
    if address.is_loopback() {
        return Some(format!("{address} is a loopback address, which packets from outside cannot reach"));
    }
    if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
        return Some(format!("{address} is link-local: use a global or unique local address"));
    }
    None
}

impl Service {
    /// Appends the violated rules of this service.
    pub fn check(&self, name: &Name, found: &mut Vec<Invalid>) {
        let mut setting = |what: String| found.push(Invalid::Setting { service: name.clone(), what });
        if let Some(what) = check_address(self.vip) {
            setting(format!("vip {what}"));
        }
        self.check_ranges(&mut setting);
        self.check_combinations(&mut setting);
        self.check_quic(&mut setting);
        self.check_limits(&mut setting);
        self.check_health(&mut setting);
        self.check_regions(&mut setting);
        if let Some(replica) = &self.replica {
            replica.check(matches!(self.port, Ports::One(_)), &mut setting);
        }
        self.check_seating(&mut setting);
        self.check_backends(name, found);
    }

    /// Reports settings that are out of their range.
    fn check_ranges(&self, setting: &mut dyn FnMut(String)) {
        if let Some(size) = self.table_size
            && !TABLE_SIZES.contains(&size)
        {
            setting(format!("table_size {size} is not one of {TABLE_SIZES:?}"));
        }
        if let Some(percent) = self.panic_percent.filter(|percent| *percent > 100) {
            setting(format!("panic_percent {percent} is above 100"));
        }
        if let Some(percent) = self.max_ejection_percent.filter(|percent| *percent > 100) {
            setting(format!("max_ejection_percent {percent} is above 100"));
        }
        if self.ejection_window_s == 0 || self.ejection_window_s > 86_400 {
            setting(format!("ejection_window_s {} is not within 1 to 86400 (a day)", self.ejection_window_s));
        }
        if self.slow_start_s > 86_400 {
            setting(format!("slow_start_s {} is above 86400 (a day)", self.slow_start_s));
        }
        if self.udp_timeout_s == 0 {
            setting("udp_timeout_s is 0: give at least 1".to_owned());
        }
        if !(MIN_TCP_TIMEOUT_S..=MAX_TCP_TIMEOUT_S).contains(&self.tcp_timeout_s) {
            setting(format!(
                "tcp_timeout_s {} is out of range: {MIN_TCP_TIMEOUT_S} to {MAX_TCP_TIMEOUT_S}",
                self.tcp_timeout_s
            ));
        }
    }

    /// Reports settings that contradict protocol, scheduler or mode.
    fn check_combinations(&self, setting: &mut dyn FnMut(String)) {
        if self.udp_stateless && self.protocol != Protocol::Udp {
            setting("udp_stateless is for UDP services only".to_owned());
        }
        if self.udp_stateless && !matches!(self.scheduler, Scheduler::Maglev | Scheduler::SourceHash) {
            setting(format!(
                "udp_stateless tracks no flows, which scheduler {} needs: use maglev or source-hash",
                word(&self.scheduler)
            ));
        }
        if self.load_cap.is_some() && (self.scheduler != Scheduler::SourceHash || self.udp_stateless) {
            setting("load_cap is for scheduler source-hash only, without udp_stateless".to_owned());
        }
        if self.load_cap.is_some_and(|cap| cap == 0 || cap > MAX_LOAD_CAP) {
            setting(format!("load_cap is out of range: 1 to {MAX_LOAD_CAP}"));
        }
        if self.second_chance == Some(true) && self.mode != ForwardingMode::Gue {
            setting("second_chance needs mode gue".to_owned());
        }
        if self.second_chance == Some(true) && !self.scheduler.is_by_pair() {
            setting(format!(
                "second_chance cannot find a flow when scheduler {} may place it on any backend: use maglev, p2c or source-hash",
                word(&self.scheduler)
            ));
        }
        if self.gue_port == 0 {
            setting("gue_port is 0: give 1 to 65535".to_owned());
        }
        if self.mode == ForwardingMode::Local && self.backends.len() > 1 {
            setting("mode local hands packets to this host's own stack: give at most one backend".to_owned());
        }
    }

    /// Reports wrong weights and seats.
    fn check_seating(&self, setting: &mut dyn FnMut(String)) {
        if !self.backends.is_empty() && self.backends.values().all(|b| b.weight == 0) {
            setting("all weights are 0: give at least one backend a weight".to_owned());
        }
        if let Some((seat, _)) = self.seating.iter().find(|turn| turn.0 >= super::MAX_SEATS) {
            setting(format!("seating names seat {seat}, above {}", super::MAX_SEATS - 1));
        }
        if let Some((seat, weight)) = self.seating.iter().find(|turn| turn.1 > 65_535) {
            setting(format!("seating gives seat {seat} weight {weight}, above 65535"));
        }
    }

    /// Appends the violated rules of the backends.
    fn check_backends(&self, name: &Name, found: &mut Vec<Invalid>) {
        let mut addresses = BTreeMap::new();
        let mut server_ids = BTreeMap::new();
        let mut seats = BTreeMap::new();
        for (backend, b) in &self.backends {
            let mut refuse = |what: String| {
                found.push(Invalid::Backend { service: name.clone(), backend: backend.clone(), what });
            };
            self.check_backend(b, &mut refuse);
            if let Some(other) = addresses.insert(b.address, backend) {
                refuse(format!("address {} is already that of backend {other}", b.address));
            }
            if let Some(id) = &b.server_id
                && let Some(other) = server_ids.insert(id, backend)
            {
                refuse(format!("server_id {id} is already that of backend {other}"));
            }
            if let Some(seat) = b.seat
                && let Some(other) = seats.insert(seat, backend)
            {
                refuse(format!("seat {seat} is already that of backend {other}: leave one of them out"));
            }
        }
    }

    fn check_backend(&self, b: &Backend, refuse: &mut dyn FnMut(String)) {
        if b.weight > 65_535 {
            refuse(format!("weight {} is above 65535", b.weight));
        }
        if let Some(seat) = b.seat.filter(|&seat| seat >= super::MAX_SEATS) {
            refuse(format!("seat {seat} is above {}", super::MAX_SEATS - 1));
        }
        if let Some(id) = &b.server_id
            && !self.quic.iter().any(|config| usize::from(config.server_id_bytes) == id.as_bytes().len())
        {
            let len = id.as_bytes().len();
            refuse(format!(
                "server_id {id} has {len} bytes, but the service's quic has no config for this length: \
                 add one, as in `lbctl service set NAME --quic 0:{len}:8`"
            ));
        }
        if self.mode == ForwardingMode::Local {
            // An address of this host: its own, the VIP, or loopback.
            if let Some(what) = check_address(b.address).filter(|_| !b.address.is_loopback()) {
                refuse(format!("address {what}"));
            }
        } else if let Some(what) = check_address(b.address) {
            refuse(format!("address {what}"));
        } else if b.address == self.vip {
            refuse(format!("address {} is the service's own VIP: give the worker's own address", b.address));
        } else if self.vip.is_ipv6() && b.address.is_ipv4() && self.mode != ForwardingMode::L2 {
            refuse(format!(
                "address {} is IPv4, but the service is IPv6, and IPv6 is not carried in IPv4: give an IPv6 address",
                b.address
            ));
        } else if self.vip.is_ipv4() && b.address.is_ipv6() && self.mode == ForwardingMode::Nat {
            refuse(format!(
                "address {} is IPv6, but the service is IPv4, and mode nat does not translate between them: give an IPv4 address",
                b.address
            ));
        }
        match b.port {
            Some(0) => refuse("port is 0: give 1 to 65535".to_owned()),
            Some(_) if self.mode != ForwardingMode::Nat => {
                refuse("port is for mode nat only: the other modes do not change ports".to_owned());
            }
            Some(_) if !matches!(self.port, Ports::One(_)) => {
                refuse(format!(
                    "port needs a service with exactly one port, but the service has {}",
                    self.port
                ));
            }
            _ => {}
        }
    }

    fn check_regions(&self, setting: &mut dyn FnMut(String)) {
        if let Some(rules) = &self.regions {
            rules.check(setting);
            let allowed = rules.allowed.iter().flatten();
            if rules.allowed.as_ref().is_some_and(|names| !names.is_empty())
                && !self.backends.is_empty()
                && !self.backends.values().any(|b| rules.allows(b))
            {
                setting(format!(
                    "no backend is in a region that the residency allows ({}): give a backend one of these regions, or change \
                     regions.allowed",
                    region_list(allowed)
                ));
            }
        }
        if let Some(rollout) = &self.rollout {
            rollout.check(setting);
            if self.replica.is_none() {
                setting(
                    "a rollout needs replica state, which reports the versions of the replicas: set replica"
                        .to_owned(),
                );
            }
            if matches!(self.scheduler, Scheduler::Rr | Scheduler::Lc) {
                setting(format!(
                    "a rollout's share is enforced by weights, which scheduler {} ignores: use maglev, wrr or random",
                    word(&self.scheduler)
                ));
            }
        }
    }

    fn check_quic(&self, setting: &mut dyn FnMut(String)) {
        if !self.quic.is_empty() && self.protocol != Protocol::Udp {
            setting("quic is for UDP services only".to_owned());
        }
        if !self.quic.is_empty() && self.mode == ForwardingMode::Nat {
            setting(
                "quic is not possible with mode nat, which is bound to addresses: use another mode"
                    .to_owned(),
            );
        }
        for (i, config) in self.quic.iter().enumerate() {
            if self.quic[..i].iter().any(|earlier| earlier.id == config.id) {
                setting(format!("quic has two configs with id {}: give each its own id", config.id));
            }
        }
    }

    fn check_health(&self, setting: &mut dyn FnMut(String)) {
        let health = &self.health;
        if health.kind.is_none() {
            return;
        }
        if health.port.is_none() && !matches!(self.port, Ports::One(_)) {
            setting(format!("health needs a port, because the service has {}", self.port));
        }
        if health.port == Some(0) {
            setting("health: port is 0: give 1 to 65535".to_owned());
        }
        if health.interval_ms < 10 || health.timeout_ms == 0 || health.rise == 0 || health.fall == 0 {
            setting(
                "health: interval_ms must be at least 10; timeout_ms, rise and fall must be at least 1"
                    .to_owned(),
            );
        }
        if health.busy_timeout_ms > MAX_BUSY_TIMEOUT_MS {
            setting(format!(
                "health: busy_timeout_ms {} is above {MAX_BUSY_TIMEOUT_MS} (an hour)",
                health.busy_timeout_ms
            ));
        }
        if health.via == Via::Tunnel && !self.mode.has_probe_tunnel() {
            setting("health: via tunnel is for modes ipip, gue and l2: use via direct, which takes the path of traffic in the other modes".to_owned());
        }
        if health.jitter_percent > 50 {
            setting(format!("health: jitter_percent {} is above 50", health.jitter_percent));
        }
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        let (host, sni) = match &health.kind {
            HealthKind::Http(http) => {
                check_http(http, setting);
                (&http.host, http.tls.as_ref())
            }
            HealthKind::Grpc(grpc) => (&grpc.host, grpc.tls.as_ref()),
            other => (&None, other.tls()),
        };
        let sni = sni.and_then(|tls| tls.sni.as_ref());
        for (key, name) in host.iter().map(|name| ("host", name)).chain(sni.map(|name| ("sni", name))) {
            if !plain(name) {
                setting(format!("health: {key} {name:?} is not a valid host name"));
            }
        }
    }
}

/// Longest time that a check waits for a late answer.
const MAX_BUSY_TIMEOUT_MS: u32 = 3_600_000;

fn check_http(http: &HttpCheck, setting: &mut dyn FnMut(String)) {
    let HttpCheck { path, status: (first, last), headers, body, .. } = http;
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) {
        setting(format!(
            "health: path {path:?} must start with '/' and contain neither blanks nor control characters"
        ));
    }
    if !(100..=599).contains(first) || !(100..=599).contains(last) || first > last {
        setting(format!("health: status [{first}, {last}] is not a valid range within 100 to 599"));
    }
    for (name, value) in headers {
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        let ours = ["host", "connection", "content-length", "transfer-encoding", "user-agent"];
        if name.is_empty() || !name.bytes().all(token) || ours.contains(&name.to_ascii_lowercase().as_str()) {
            setting(format!(
                "health: header {name:?} is not a valid header name, or is one that lbd sets itself"
            ));
        }
        if !value.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
            setting(format!(
                "health: header {name}: {value:?} contains characters that are not allowed in a header"
            ));
        }
    }
    if body.as_ref().is_some_and(|text| text.is_empty() || text.len() > 4_096) {
        setting("health: body must have 1 to 4096 bytes".to_owned());
    }
}
