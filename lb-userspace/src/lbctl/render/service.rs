//! Output of `lbctl service`.

use super::{
    Out, Tone, fields,
    table::{TextTable, plain, toned},
    units,
};
use crate::{
    desired::model::{HealthKind, Protocol, ReplicaSource, Service, WhenAllDown},
    serve::api::types::{BackendInfo, ServiceInfo},
};
use lb_common::flow::TCP_IDLE_S;
use std::{io, net::IpAddr};

/// Formats a VIP with its ports: `10.0.0.1:80`, `[fd00::1]:any`.
fn vip(service: &Service) -> String {
    match service.vip {
        IpAddr::V4(v4) => format!("{v4}:{}", service.port),
        IpAddr::V6(v6) => format!("[{v6}]:{}", service.port),
    }
}

fn mode(service: &Service) -> String {
    format!("{:?}", service.mode).to_lowercase()
}

/// Prints a table of services.
///
/// # Errors
/// Writing failed.
pub fn services(out: &mut Out<'_>, list: &[ServiceInfo]) -> io::Result<()> {
    let headings = [
        "NAME",
        "VIP",
        "PROTOCOL",
        "~MODE",
        "~HEALTH",
        "BACKENDS",
        "~>SLOTS",
        ">NEW FLOWS",
        "~>PACKETS",
        "~>BYTES",
    ];
    let mut table = TextTable::new(&headings, out.colour);
    for s in list {
        let (eligible, all) = (s.status.eligible, s.spec.backends.len());
        let backends = format!("{eligible}/{all}");
        let tone = if eligible == 0 {
            Tone::Bad
        } else if eligible < all {
            Tone::Warn
        } else {
            Tone::Good
        };
        table.row([
            toned(&s.name, Tone::Strong),
            plain(vip(&s.spec)),
            plain(s.spec.protocol),
            plain(mode(&s.spec)),
            plain(s.spec.health.kind.label()),
            toned(backends, tone),
            plain(s.status.table_size),
            plain(s.status.flows),
            plain(s.status.packets),
            plain(units::bytes(s.status.bytes)),
        ]);
    }
    table.print(out)
}

/// Prints one service in full.
///
/// # Errors
/// Writing failed.
pub fn service(out: &mut Out<'_>, s: &ServiceInfo, backends: &[BackendInfo]) -> io::Result<()> {
    let mut pairs = vec![
        ("service", s.name.to_string()),
        ("vip", format!("{} {}", vip(&s.spec), s.spec.protocol)),
        ("mode", mode(&s.spec)),
        ("scheduler", scheduler(&s.spec)),
        ("health check", health_check(&s.spec)),
        ("drain time", units::span(s.spec.drain_s.into())),
        ("on down", format!("{:?} established flows", s.spec.on_down).to_lowercase()),
        ("when all down", when_all_down(s.spec.when_all_down).to_owned()),
        ("table", format!("{} slots, {} in transition", s.status.table_size, s.status.transition_slots)),
        ("eligible", format!("{} of {} backends", s.status.eligible, s.spec.backends.len())),
        ("forwarded", format!("{} packets, {}", s.status.packets, units::bytes(s.status.bytes))),
        ("new flows", s.status.flows.to_string()),
    ];
    if let Some(vip) = &s.status.vip {
        pairs.insert(2, ("announced", super::host::vip_state(vip)));
    }
    pairs.extend(optional_settings(s));
    fields(out, &pairs)?;
    out.line("")?;
    super::backend::backends(out, backends)
}

/// Formats what happens without a backend.
fn when_all_down(when: WhenAllDown) -> &'static str {
    match when {
        WhenAllDown::Keep => "keep the VIP",
        WhenAllDown::Withdraw => "withdraw the VIP",
        WhenAllDown::Reset => "keep the VIP, reset new connections",
    }
}

/// Formats a service's health check.
fn health_check(spec: &Service) -> String {
    let health = &spec.health;
    match &health.kind {
        HealthKind::Unset | HealthKind::None => "none".to_owned(),
        kind => {
            let port = health.port.map_or_else(|| "the service's port".to_owned(), |p| format!("port {p}"));
            let what = match kind {
                HealthKind::Http(http) => {
                    let (a, b) = http.status;
                    let body =
                        http.body.as_ref().map_or(String::new(), |text| format!(", body contains {text:?}"));
                    format!("{} {} (status {a} to {b}{body})", kind.label(), http.path)
                }
                HealthKind::Grpc(grpc) if !grpc.service.is_empty() => {
                    format!("{} service {}", kind.label(), grpc.service)
                }
                other => other.label().to_owned(),
            };
            format!(
                "{what} on {port}, every {} ms ±{} %, timeout {} ms, rise {}, fall {}",
                health.interval_ms, health.jitter_percent, health.timeout_ms, health.rise, health.fall
            )
        }
    }
}

/// Formats the settings of a service that it may not have.
fn optional_settings(s: &ServiceInfo) -> Vec<(&'static str, String)> {
    let mut pairs = Vec::new();
    if s.spec.has_second_chance() {
        pairs.push(("second chance", "packets name the other backends that may have their flow".to_owned()));
    }
    if s.spec.slow_start_s > 0 {
        pairs.push(("slow start", units::span(s.spec.slow_start_s.into())));
    }
    if s.spec.protocol == Protocol::Tcp && s.spec.tcp_timeout_s != TCP_IDLE_S {
        pairs.push(("tcp timeout", units::span(s.spec.tcp_timeout_s.into())));
    }
    if let Some(rate) = s.spec.new_flow_rate {
        let burst = rate.burst(s.spec.new_flow_burst);
        pairs.push(("new flow limit", format!("{rate}, burst {burst}")));
    }
    if let Some(rate) = s.spec.source_rate {
        let (burst, v4, v6) =
            (rate.burst(s.spec.source_burst), s.spec.source_prefix_v4, s.spec.source_prefix_v6);
        pairs.push(("source limit", format!("{rate}, burst {burst}; a source is a /{v4} or a /{v6}")));
    }
    if let Some(source) = &s.spec.replica {
        pairs.push(("replica state", replica_source(source)));
    }
    if let Some(rules) = &s.spec.regions {
        pairs.push(("regions", super::region::rules(rules)));
    }
    if s.spec.panic_threshold() > 0 {
        let holds = if s.status.panic { ", active now" } else { "" };
        pairs.push(("panic rule", format!("below {} % healthy{holds}", s.spec.panic_threshold())));
    }
    if let Some(percent) = s.spec.max_ejection_percent {
        let window = units::span(s.spec.ejection_window_s.into());
        pairs.push(("ejection limit", format!("{percent} % of the weight within {window}")));
    }
    pairs
}

/// Formats a service's scheduler as the configuration spells it, with its load cap.
fn scheduler(spec: &Service) -> String {
    let word = serde_json::to_value(spec.scheduler).ok().and_then(|v| v.as_str().map(str::to_owned));
    let cap = spec.load_cap.map_or_else(String::new, |cap| format!(", up to {cap} flows of load"));
    word.unwrap_or_default() + &cap
}

fn replica_source(source: &ReplicaSource) -> String {
    let port = source.port.map_or_else(|| "the service's port".to_owned(), |p| format!("port {p}"));
    let (kind, path) = (source.kind.label(), source.path());
    let mut text =
        format!("{kind} {path} on {port}, every {} ms, timeout {} ms", source.interval_ms, source.timeout_ms);
    for (quantity, selector) in &source.metrics {
        text.push_str(&format!(", {} is {selector}", quantity.label()));
    }
    text
}
