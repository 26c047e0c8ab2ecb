//! `lbctl service`.

use super::{
    Context, Exit, Failure, Force, WriteFlags,
    lists::ListFlags,
    words::{
        CheckSpec, Optional, OptionalBool, OptionalRate, ResidencySpec, Source, Statuses, Vip, header,
        metric, optional, optional_bool, optional_rate, quic, region_weight, regions, seconds, variant,
        variant_of,
    },
};
use crate::{
    desired::model::{
        ForwardingMode, Name, OnDown, Ports, Protocol, Quantity, QuicConfig, RegionPolicy, Scheduler,
        Selector, Via, WhenAllDown,
    },
    lbctl::render::{service as render, units::parse_duration},
    serve::api::types::{BackendInfo, ServiceInfo},
};
use clap::{Args, Subcommand};
use reqwest::Method;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::{path::PathBuf, time::Duration};

/// Subcommands of `lbctl service`.
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// Add a service
    #[command(after_help = "Example: lbctl service add web --vip 10.0.0.1:80/tcp --health http:/healthz")]
    Add(AddServiceArgs),
    /// List services
    #[command(visible_alias = "ls")]
    List(ListFlags),
    /// Show one service and its backends
    Show {
        /// Name of the service
        name: Name,
    },
    /// Change settings of a service; settings not given keep their values
    Set(Set),
    /// Remove a service and its backends
    #[command(visible_alias = "remove")]
    Rm {
        /// Name of the service
        name: Name,
        #[command(flatten)]
        write: WriteFlags,
    },
}

/// Arguments of `lbctl service add`.
#[derive(Debug, Args)]
pub struct AddServiceArgs {
    /// Name of the service, unique among services
    name: Name,
    /// Virtual address that clients connect to, optionally with port and protocol, such as 10.0.0.1:80/tcp
    #[arg(long, value_name = "ADDRESS[:PORT[/PROTOCOL]]")]
    vip: Vip,
    #[command(flatten)]
    settings: ServiceSettings,
    #[command(flatten)]
    force: Force,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `lbctl service set`.
#[derive(Debug, Args)]
pub struct Set {
    /// Name of the service
    name: Name,
    /// Virtual address that clients connect to, optionally with port and protocol
    #[arg(long, value_name = "ADDRESS[:PORT[/PROTOCOL]]")]
    vip: Option<Vip>,
    #[command(flatten)]
    settings: ServiceSettings,
    #[command(flatten)]
    force: Force,
    #[command(flatten)]
    write: WriteFlags,
}

/// Settings that `service add` and `service set` take.
#[derive(Debug, Args)]
struct ServiceSettings {
    /// Port, range of ports (FIRST-LAST), or any
    #[arg(long)]
    port: Option<Ports>,
    /// Protocol: tcp or udp
    #[arg(long)]
    protocol: Option<Protocol>,
    /// How packets are forwarded to backends: ipip, gue, l2, nat or local [default: ipip]
    #[arg(long, value_parser = variant::<ForwardingMode>())]
    mode: Option<ForwardingMode>,
    /// How new flows are assigned to backends: maglev, p2c, rr, wrr, random, lc or source-hash [default: maglev]
    #[arg(long, value_parser = variant::<Scheduler>())]
    scheduler: Option<Scheduler>,
    /// With source-hash: load, in flows, above which a new flow may go to the second choice; or none [default: none]
    #[arg(long, value_name = "N|none", value_parser = optional)]
    load_cap: Option<Optional>,
    /// With gue: name in each packet the other backends that may have its flow: true, false or auto [default: auto, for TCP]
    #[arg(long, value_name = "BOOL|auto", value_parser = optional_bool)]
    second_chance: Option<OptionalBool>,
    /// Limit of new flows of the service, such as 50, 50/s, 30/m or 100/h; or none [default: none]
    #[arg(long, value_name = "RATE|none", value_parser = optional_rate)]
    new_flow_rate: Option<OptionalRate>,
    /// New flows of the service accepted at once; auto for one second of --new-flow-rate [default: auto]
    #[arg(long, value_name = "N|auto", value_parser = optional)]
    new_flow_burst: Option<Optional>,
    /// Limit of new flows of each source, such as 50/s; or none [default: none]
    #[arg(long, value_name = "RATE|none", value_parser = optional_rate)]
    source_rate: Option<OptionalRate>,
    /// New flows of a source accepted at once; auto for one second of --source-rate [default: auto]
    #[arg(long, value_name = "N|auto", value_parser = optional)]
    source_burst: Option<Optional>,
    /// Prefix length, in bits, that identifies an IPv4 source [default: 32]
    #[arg(long, value_name = "BITS")]
    source_prefix_v4: Option<u8>,
    /// Prefix length, in bits, that identifies an IPv6 source [default: 64]
    #[arg(long, value_name = "BITS")]
    source_prefix_v6: Option<u8>,
    /// Health check: none, tcp, tls, http, https, grpc or grpcs, or with details KIND:PORT, http:PORT/PATH or
    /// grpc:PORT/SERVICE [default: tcp for a TCP service with one port and without replica state, else none]
    #[arg(long, value_name = "CHECK")]
    health: Option<CheckSpec>,
    /// Host header of an http check, or authority of a grpc check [default: the VIP]
    #[arg(long, value_name = "HOST")]
    health_host: Option<String>,
    /// HTTP statuses that count as healthy [default: 200-299]
    #[arg(long, value_name = "FIRST-LAST")]
    health_status: Option<Statuses>,
    /// Additional header of an http check; may be repeated
    #[arg(long, value_name = "NAME: VALUE", value_parser = header)]
    health_header: Vec<(String, String)>,
    /// Text that the body of an http check's response must contain
    #[arg(long, value_name = "TEXT")]
    health_body: Option<String>,
    /// Server name that a tls, https or grpcs check sends and expects in the certificate [default: the host, or the VIP]
    #[arg(long, value_name = "NAME")]
    health_sni: Option<String>,
    /// File with the CA certificates that tls, https and grpcs checks trust [default: the host's own]
    #[arg(long, value_name = "FILE")]
    health_ca: Option<PathBuf>,
    /// Verify the server's certificate in tls, https and grpcs checks [default: true]
    #[arg(long, value_name = "BOOL")]
    health_verify: Option<bool>,
    /// File with the client certificate that lbd presents in tls, https and grpcs checks
    #[arg(long, value_name = "FILE", requires = "health_key")]
    health_cert: Option<PathBuf>,
    /// File with the private key of --health-cert
    #[arg(long, value_name = "FILE", requires = "health_cert")]
    health_key: Option<PathBuf>,
    /// Time between two checks of a backend [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    health_interval: Option<Duration>,
    /// Time after which a check without a connection fails, and one without an answer makes the backend busy [default: 500ms]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    health_timeout: Option<Duration>,
    /// Time after which a busy backend that has sent no answer fails its check; 0s: as soon as it is late [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    health_busy_timeout: Option<Duration>,
    /// Random variation of the interval, in percent [default: 10]
    #[arg(long, value_name = "PERCENT")]
    health_jitter: Option<u8>,
    /// Consecutive successes after which a backend is healthy [default: 2]
    #[arg(long, value_name = "N")]
    rise: Option<u8>,
    /// Consecutive failures after which a backend is unhealthy [default: 3]
    #[arg(long, value_name = "N")]
    fall: Option<u8>,
    /// Path of checks: direct to the backend's own address, or through the tunnel that traffic takes [default: tunnel with ipip, gue and l2 if the
    /// check is for the service's own port, else direct]
    #[arg(long, value_name = "direct|tunnel", value_parser = variant_of::<Via>(&["direct", "tunnel"]))]
    health_via: Option<Via>,
    /// Require more successes each time that a flapping backend recovers [default: true]
    #[arg(long, value_name = "BOOL")]
    health_damping: Option<bool>,
    /// Passive checks: ICMP errors and refused connections in traffic trigger an early check [default: true]
    #[arg(long, value_name = "BOOL", alias = "health-signs")]
    health_passive: Option<bool>,
    /// Time over which a new or recovered backend ramps up to its full share [default: 0s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    slow_start: Option<Duration>,
    /// Source of replica state: none, stream, vllm, sglang, tgi, triton or custom, or with details KIND:PORT or
    /// KIND:PORT/PATH [default: none]
    #[arg(long, value_name = "SOURCE")]
    replica: Option<Source>,
    /// Time between two polls of a source without a stream [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    replica_interval: Option<Duration>,
    /// Time after which a poll fails [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    replica_timeout: Option<Duration>,
    /// Requests that a replica runs at once, if it does not report this; or auto [default: auto]
    #[arg(long, value_name = "N|auto", value_parser = optional)]
    replica_capacity: Option<Optional>,
    /// Metric to read instead of the usual one, such as running=NAME or waiting=NAME{label="value"}; may be repeated
    #[arg(long, value_name = "QUANTITY=METRIC", value_parser = metric)]
    replica_metric: Vec<(Quantity, Selector)>,
    /// Residency: the only regions that may receive the service's packets, or any [default: any]
    #[arg(long, value_name = "REGION,...|any", value_parser = regions)]
    regions: Option<ResidencySpec>,
    /// How flows are spread over regions: active-active, active-passive or weighted [default: active-active]
    #[arg(long, value_parser = variant::<RegionPolicy>())]
    region_policy: Option<RegionPolicy>,
    /// With weighted: relative share of a region, such as eu=3; may be repeated
    #[arg(long, value_name = "REGION=N", value_parser = region_weight)]
    region_weight: Vec<(Name, u32)>,
    /// Hysteresis, upper threshold: use of the local capacity from which new flows spill to other regions [default: 90]
    #[arg(long, value_name = "PERCENT", alias = "spill-at")]
    spill_high: Option<u16>,
    /// Hysteresis, lower threshold: use of the local capacity below which flows stop spilling [default: 70]
    #[arg(long, value_name = "PERCENT", alias = "spill-until")]
    spill_low: Option<u16>,
    /// Largest share of new flows, in percent, that may spill [default: 90]
    #[arg(long, value_name = "PERCENT", alias = "spill-most")]
    spill_max: Option<u16>,
    /// Time for which the demand must be small before a spill is reduced [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    region_hold: Option<Duration>,
    /// Prefer backends in the host's own zone within the region [default: true]
    #[arg(long, value_name = "BOOL")]
    zone_first: Option<bool>,
    /// Drain time: how long established flows stay on a draining or removed backend [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    drain: Option<Duration>,
    /// Slots of the Maglev table, or auto [default: auto]
    #[arg(long, value_name = "N|auto", value_parser = optional)]
    table_size: Option<Optional>,
    /// Seed of the flow hash and the tables, or auto [default: auto]
    #[arg(long, value_name = "N|auto", value_parser = optional)]
    seed: Option<Optional>,
    /// Assign each UDP packet by hash alone, without tracking flows [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    udp_stateless: Option<bool>,
    /// Idle time after which a UDP flow expires [default: 2m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    udp_timeout: Option<Duration>,
    /// Idle time after which a tracked TCP flow is forgotten, from 10s [default: 2h4m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    tcp_timeout: Option<Duration>,
    /// Route UDP packets by QUIC connection ID (QUIC-LB): config ID, length of server ID and of nonce in bytes, and the
    /// key if they are encrypted; may be repeated; or off [default: off]
    #[arg(long, value_name = "ID:BYTES:BYTES[:KEY]|off", value_parser = quic, value_delimiter = ',')]
    quic: Vec<Option<QuicConfig>>,
    /// UDP destination port of GUE packets [default: 6080]
    #[arg(long, value_name = "PORT")]
    gue_port: Option<u16>,
    /// What happens to established flows of a backend that is down: keep or reset [default: keep]
    #[arg(long, value_parser = variant::<OnDown>())]
    on_down: Option<OnDown>,
    /// What happens to the VIP when no backend takes new flows and no other host serves it: keep announces it for the
    /// drain time and while flows remain, withdraw removes it at once, reset announces it and answers new connections with
    /// a TCP reset and datagrams with ICMP port unreachable [default: keep]
    #[arg(long, value_name = "keep|withdraw|reset", value_parser = variant_of::<WhenAllDown>(&["keep", "withdraw", "reset"]))]
    when_all_down: Option<WhenAllDown>,
    /// Ignore health while less than this share of the weight, in percent, is healthy; 0 for never [default: 10]
    #[arg(long, value_name = "PERCENT")]
    panic: Option<u8>,
    /// Largest share of the weight, in percent, that checks alone take out within --ejection-window [default: none]
    #[arg(long, value_name = "PERCENT|none", value_parser = optional)]
    max_ejection: Option<Optional>,
    /// Time for which an ejection counts towards --max-ejection [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    ejection_window: Option<Duration>,
}

/// Builds the merge patch of the flags about regions.
fn regions_patch(s: &ServiceSettings) -> Result<Map<String, Value>, Failure> {
    let mut patch = Map::new();
    let mut set = |key: &str, value: Option<Value>| value.map(|v| patch.insert(key.to_owned(), v));
    set("allowed", s.regions.as_ref().map(|r| json!(r.0)));
    set("policy", s.region_policy.map(|p| json!(p)));
    let weights: Map<String, Value> =
        s.region_weight.iter().map(|(name, weight)| (name.to_string(), json!(weight))).collect();
    set("weights", (!weights.is_empty()).then_some(Value::Object(weights)));
    set("spill_at_percent", s.spill_high.map(|p| json!(p)));
    set("spill_until_percent", s.spill_low.map(|p| json!(p)));
    set("spill_most_percent", s.spill_max.map(|p| json!(p)));
    set("hold_s", seconds(s.region_hold, "--region-hold")?.map(|s| json!(s)));
    set("zone_first", s.zone_first.map(|b| json!(b)));
    Ok(patch)
}

/// Builds the merge patch of the flags about replica state: null for `--replica none`, None without such flags.
fn replica_patch(s: &ServiceSettings) -> Result<Option<Value>, Failure> {
    let mut replica = Patch::default();
    let mut metrics = Map::new();
    match &s.replica {
        Some(Source(None)) => {
            let others =
                s.replica_interval.is_some() || s.replica_timeout.is_some() || s.replica_capacity.is_some();
            if others || !s.replica_metric.is_empty() {
                return Err(Failure::Usage {
                    what: "--replica none cannot be combined with other --replica-* flags".to_owned(),
                });
            }
            return Ok(Some(Value::Null));
        }
        Some(Source(Some((kind, port, path)))) => {
            // A new source starts from its own defaults, without the settings of the old source.
            replica.set("kind", Some(kind));
            replica.set("port", Some(port));
            replica.set("path", Some(path));
            metrics.extend(Quantity::ALL.map(|q| (q.label().to_owned(), Value::Null)));
        }
        None => {}
    }
    replica.set("interval_ms", s.replica_interval.map(|t| t.as_millis() as u64));
    replica.set("timeout_ms", s.replica_timeout.map(|t| t.as_millis() as u64));
    replica.set("capacity", s.replica_capacity.map(|n| n.0));
    metrics.extend(s.replica_metric.iter().map(|(q, selector)| (q.label().to_owned(), json!(selector))));
    replica.set("metrics", Some(metrics).filter(|m| !m.is_empty()));
    Ok(Some(replica.0).filter(|r| !r.is_empty()).map(Value::Object))
}

/// A JSON merge patch under construction.
#[derive(Default)]
struct Patch(Map<String, Value>);

impl Patch {
    fn set(&mut self, key: &str, value: Option<impl Serialize>) {
        if let Some(value) = value {
            self.0.insert(key.to_owned(), json!(value));
        }
    }
}

/// Builds the merge patch of the flags about health checks.
fn health_patch(s: &ServiceSettings) -> Map<String, Value> {
    let mut health = Patch::default();
    if let Some(check) = &s.health {
        // A new kind starts from its own defaults, without the settings of the old kind.
        health.set("kind", Some(check.kind));
        health.set("port", Some(check.port));
        health.set("path", Some(&check.path));
        health.set("service", Some(&check.service));
        for key in ["host", "status", "headers", "body", "sni", "ca", "verify", "client_cert", "client_key"] {
            health.set(key, Some(Value::Null));
        }
    }
    health.set("host", s.health_host.as_ref());
    health.set("status", s.health_status.as_ref().map(|s| (s.0, s.1)));
    let headers: Map<String, Value> = s.health_header.iter().map(|(n, v)| (n.clone(), json!(v))).collect();
    health.set("headers", Some(headers).filter(|h| !h.is_empty()));
    health.set("body", s.health_body.as_ref());
    health.set("sni", s.health_sni.as_ref());
    health.set("ca", s.health_ca.as_ref());
    health.set("verify", s.health_verify);
    health.set("client_cert", s.health_cert.as_ref());
    health.set("client_key", s.health_key.as_ref());
    health.set("via", s.health_via);
    health.set("damping", s.health_damping);
    health.set("signs", s.health_passive);
    health.set("interval_ms", s.health_interval.map(|t| t.as_millis() as u64));
    health.set("timeout_ms", s.health_timeout.map(|t| t.as_millis() as u64));
    health.set("busy_timeout_ms", s.health_busy_timeout.map(|t| t.as_millis() as u64));
    health.set("jitter_percent", s.health_jitter);
    health.set("rise", s.rise);
    health.set("fall", s.fall);
    health.0
}

/// Builds the merge patch of all flags.
fn patch(vip: Option<&Vip>, s: &ServiceSettings) -> Result<Map<String, Value>, Failure> {
    let mut patch = Patch::default();
    patch.set("vip", vip.map(|v| v.address));
    let twice = |flag: &str| Failure::Usage {
        what: format!("{flag} conflicts with the value in --vip: give only one"),
    };
    let (vip_port, vip_protocol) = vip.map_or((None, None), |v| (v.port, v.protocol));
    if vip_port.is_some() && s.port.is_some() {
        return Err(twice("--port"));
    }
    if vip_protocol.is_some() && s.protocol.is_some() {
        return Err(twice("--protocol"));
    }
    patch.set("port", s.port.or(vip_port));
    patch.set("protocol", s.protocol.or(vip_protocol));
    patch.set("mode", s.mode);
    patch.set("scheduler", s.scheduler);
    patch.set("load_cap", s.load_cap.map(|n| n.0));
    patch.set("second_chance", s.second_chance.map(|b| b.0));
    patch.set("drain_s", seconds(s.drain, "--drain")?);
    patch.set("slow_start_s", seconds(s.slow_start, "--slow-start")?);
    patch.set("table_size", s.table_size.map(|n| n.0));
    patch.set("seed", s.seed.map(|n| n.0));
    patch.set("udp_stateless", s.udp_stateless);
    patch.set("udp_timeout_s", seconds(s.udp_timeout, "--udp-timeout")?);
    patch.set("tcp_timeout_s", seconds(s.tcp_timeout, "--tcp-timeout")?);
    patch
        .set("quic", Some(&s.quic).filter(|q| !q.is_empty()).map(|q| q.iter().flatten().collect::<Vec<_>>()));
    patch.set("gue_port", s.gue_port);
    for (name, rate, burst) in
        [("new_flow", s.new_flow_rate, s.new_flow_burst), ("source", s.source_rate, s.source_burst)]
    {
        patch.set(&format!("{name}_rate"), rate.map(|rate| rate.0));
        // Removing a limit removes its burst too.
        let burst = burst.or_else(|| rate.filter(|rate| rate.0.is_none()).map(|_| Optional(None)));
        patch.set(&format!("{name}_burst"), burst.map(|n| n.0));
    }
    patch.set("source_prefix_v4", s.source_prefix_v4);
    patch.set("source_prefix_v6", s.source_prefix_v6);
    patch.set("on_down", s.on_down);
    patch.set("when_all_down", s.when_all_down);
    patch.set("panic_percent", s.panic);
    patch.set("max_ejection_percent", s.max_ejection.map(|n| n.0));
    patch.set("ejection_window_s", seconds(s.ejection_window, "--ejection-window")?);
    patch.set("health", Some(health_patch(s)).filter(|h| !h.is_empty()));
    patch.set("replica", replica_patch(s)?);
    patch.set("regions", Some(regions_patch(s)?).filter(|r| !r.is_empty()));
    Ok(patch.0)
}

/// Builds the body of `service add`, without unset values.
fn new_service(add: &AddServiceArgs) -> Result<Map<String, Value>, Failure> {
    let mut body = patch(Some(&add.vip), &add.settings)?;
    for (key, flag) in [("port", "--port"), ("protocol", "--protocol")] {
        if !body.contains_key(key) {
            let what = format!("the service needs a {key}: give {flag}, or --vip ADDRESS:PORT/PROTOCOL");
            return Err(Failure::Usage { what });
        }
    }
    if let Some(Value::Object(health)) = body.get_mut("health") {
        health.retain(|_, v| !v.is_null());
        if !health.contains_key("kind") {
            let what = "--health-* flags need a check: give --health tcp or --health http:/PATH, for example";
            return Err(Failure::Usage { what: what.to_owned() });
        }
    }
    if let Some(Value::Object(replica)) = body.get_mut("replica") {
        replica.retain(|_, v| !v.is_null());
        if let Some(Value::Object(metrics)) = replica.get_mut("metrics") {
            metrics.retain(|_, v| !v.is_null());
        }
        if !replica.contains_key("kind") {
            let what = "--replica-* flags need a source: give --replica stream, for example".to_owned();
            return Err(Failure::Usage { what });
        }
    }
    if let Some(Value::Object(regions)) = body.get_mut("regions") {
        regions.retain(|_, v| !v.is_null());
    }
    body.retain(|_, v| !v.is_null());
    Ok(body)
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: ServiceCommand) -> Result<Exit, Failure> {
    match command {
        ServiceCommand::Add(add) => {
            let body = new_service(&add)?;
            let name = add.name;
            let path = format!("/v1/services/{name}");
            let (what, query) = (format!("service {name} added"), add.write.query_with(add.force));
            context.write(&what, Method::POST, &path, &query, Some(&body)).await
        }
        ServiceCommand::Set(set) => {
            let body = patch(set.vip.as_ref(), &set.settings)?;
            if body.is_empty() {
                return Err(Failure::Usage { what: "nothing to set: give at least one setting".to_owned() });
            }
            let name = set.name;
            let path = format!("/v1/services/{name}");
            let (what, query) = (format!("service {name} set"), set.write.query_with(set.force));
            context.write(&what, Method::PATCH, &path, &query, Some(&body)).await
        }
        ServiceCommand::Rm { name, write } => {
            let path = format!("/v1/services/{name}");
            let what = format!("service {name} removed");
            context.write(&what, Method::DELETE, &path, &write.query(), None::<&()>).await
        }
        ServiceCommand::List(flags) => context.list(&flags, list).await,
        ServiceCommand::Show { name } => {
            let service: ServiceInfo = context.client.get(&format!("/v1/services/{name}"), &()).await?;
            if context.out.json {
                context.out.json(&service, false)?;
                return Ok(Exit::Ok);
            }
            let path = format!("/v1/services/{name}/backends");
            let backends: Vec<BackendInfo> = context.client.get(&path, &()).await?;
            render::service(&mut context.out, &service, &backends)?;
            Ok(Exit::Ok)
        }
    }
}

/// Lists the services.
async fn list(context: &mut Context<'_>) -> Result<Exit, Failure> {
    let list: Vec<ServiceInfo> = context.client.get("/v1/services", &()).await?;
    if context.out.json {
        context.out.json(&list, false)?;
    } else if list.is_empty() {
        say!("no services: add one with `lbctl service add` or `lbctl config apply`");
    } else {
        render::services(&mut context.out, &list)?;
    }
    Ok(Exit::Ok)
}
