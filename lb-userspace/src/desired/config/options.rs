//! The daemon's settings: from flags, environment (`LBD_*`), the file's `[lbd]`, and defaults, in this order.
//!
//! [`Options`] is one source's answer, [`Settings`] the resolved whole.

use super::shared::{Shared, name, place};
use crate::desired::{
    model::Name,
    store::{Address, etcd::Access},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::{
    limits,
    settings::{IngressSettings, NAT_PORTS, features},
};
use serde::{Deserialize, Serialize};
use std::{net::SocketAddr, path::PathBuf};

/// What becomes of the VIPs when lbd stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// They stay, as the dataplane goes on forwarding.
    #[default]
    Keep,
    /// They are taken off.
    Withdraw,
}

/// How much is logged.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// What is amiss.
    Warn,
    /// What changed.
    #[default]
    Info,
    /// Why.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The word for it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Settings as one source gives them: flags with their environment variables (clap), or `[lbd]` (serde).
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Interface to attach to; may be repeated
    #[arg(long, value_name = "IFACE", env = "LBD_IFACE", value_delimiter = ',')]
    #[serde(default)]
    pub iface: Vec<String>,
    /// Directory in a bpf filesystem where programs, maps and links are pinned [default: /sys/fs/bpf/lb]
    #[arg(long, value_name = "DIR", env = "LBD_PIN_PATH")]
    pub pin_path: Option<PathBuf>,
    /// Directory of the store [default: /var/lib/lb]
    #[arg(long, value_name = "DIR", env = "LBD_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where the desired state is: file:///DIRECTORY, or etcd://HOST:PORT,HOST:PORT[/PREFIX], shared by several
    /// hosts (etcds:// for TLS) [default: in state_dir]
    #[arg(long, value_name = "URL", env = "LBD_STORE")]
    pub store: Option<String>,
    /// Certificates that etcd's are checked against [default: the system's]
    #[arg(long, value_name = "FILE", env = "LBD_STORE_CA")]
    pub store_ca: Option<PathBuf>,
    /// Certificate that this host shows to etcd
    #[arg(long, value_name = "FILE", env = "LBD_STORE_CERT")]
    pub store_cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", env = "LBD_STORE_KEY")]
    pub store_key: Option<PathBuf>,
    /// User of etcd, with store_password_file
    #[arg(long, value_name = "NAME", env = "LBD_STORE_USER")]
    pub store_user: Option<String>,
    /// File with that user's password
    #[arg(long, value_name = "FILE", env = "LBD_STORE_PASSWORD_FILE")]
    pub store_password_file: Option<PathBuf>,
    /// Id that the shared store's data must have [default: that of the last time, or whatever is found]
    #[arg(long, value_name = "ID", env = "LBD_STORE_ID")]
    pub store_id: Option<String>,
    /// Name of this host among those that share the store [default: its host name]
    #[arg(long, value_name = "NAME", env = "LBD_HOST")]
    pub host: Option<String>,
    /// Region that this host is in [default: default]
    #[arg(long, value_name = "NAME", env = "LBD_REGION")]
    pub region: Option<String>,
    /// Zone within the region [default: default]
    #[arg(long, value_name = "NAME", env = "LBD_ZONE")]
    pub zone: Option<String>,
    /// Put VIPs on this interface while they are served, and take them off when not, for a routing daemon to announce
    #[arg(long, value_name = "IFACE", env = "LBD_ANNOUNCE")]
    pub announce: Option<String>,
    /// What becomes of those VIPs when lbd stops [default: keep]
    #[arg(long, value_name = "WHAT", env = "LBD_ANNOUNCE_ON_STOP")]
    pub announce_on_stop: Option<OnStop>,
    /// Unix socket of the API [default: /run/lb/lbd.sock]
    #[arg(long, value_name = "PATH", env = "LBD_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Permissions of the socket, octal; 0666 lets everyone read, and still only root and the group write [default: 0660]
    #[arg(long, value_name = "MODE", env = "LBD_SOCKET_MODE")]
    pub socket_mode: Option<String>,
    /// Group of the socket, which may change things beside root [default: root's]
    #[arg(long, value_name = "GROUP", env = "LBD_SOCKET_GROUP")]
    pub socket_group: Option<String>,
    /// Address on which metrics are served over HTTP at /metrics, or off [default: 127.0.0.1:9464]
    #[arg(long, value_name = "ADDRESS", env = "LBD_METRICS")]
    pub metrics: Option<String>,
    /// Attach in generic mode (slow) where the driver has no XDP support
    #[arg(long, env = "LBD_ALLOW_GENERIC", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub allow_generic: Option<bool>,
    /// Switch off offloads of the NICs that do not go with XDP (LRO, VLAN tags taken off) before attaching [default: false]
    #[arg(long, env = "LBD_FIX_OFFLOADS", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub fix_offloads: Option<bool>,
    /// Let other XDP programs run before and after ours: their places are 0 and 5 of STAGES in the pin path [default: false]
    #[arg(long, env = "LBD_CHAIN", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub chain: Option<bool>,
    /// Prefix from which the outer source of ipip packets is taken, varied by flow; one per family
    #[arg(long, value_name = "NET", env = "LBD_IPIP_SOURCE", value_delimiter = ',')]
    #[serde(default)]
    pub ipip_source: Vec<IpNet>,
    /// Addresses of this host that clients' packets get as source in mode nat, one prefix per family [default: the route's]
    #[arg(long, value_name = "NET", env = "LBD_NAT_SOURCE", value_delimiter = ',')]
    #[serde(default)]
    pub nat_source: Vec<IpNet>,
    /// Source ports of mode nat [default: 10240-32767]
    #[arg(long, value_name = "FIRST-LAST", env = "LBD_NAT_PORTS")]
    pub nat_ports: Option<String>,
    /// Room for services [default: 4096]
    #[arg(long, value_name = "N", env = "LBD_MAX_SERVICES")]
    pub max_services: Option<u32>,
    /// Room for backends over all services [default: 49152]
    #[arg(long, value_name = "N", env = "LBD_MAX_BACKENDS")]
    pub max_backends: Option<u32>,
    /// Room for Maglev slots, live and being written, 8 bytes each [default: 8388608]
    #[arg(long, value_name = "N", env = "LBD_MAX_SLOTS")]
    pub max_slots: Option<u32>,
    /// Room for tracked flows, TCP exceptions and UDP each [default: 1048576]
    #[arg(long, value_name = "N", env = "LBD_MAX_FLOWS")]
    pub max_flows: Option<u32>,
    /// Room for flows in mode nat [default: 262144]
    #[arg(long, value_name = "N", env = "LBD_MAX_NAT_FLOWS")]
    pub max_nat_flows: Option<u32>,
    /// Room for entries of the deny and allow lists together, 128 bytes each as they are made [default: 1048576]
    #[arg(long, value_name = "N", env = "LBD_MAX_GUARD_ENTRIES")]
    pub max_guard_entries: Option<u32>,
    /// Balance IPv6 [default: true]
    #[arg(long, value_name = "BOOL", env = "LBD_IPV6")]
    pub ipv6: Option<bool>,
    /// Look through VLAN tags [default: true]
    #[arg(long, value_name = "BOOL", env = "LBD_VLAN")]
    pub vlan: Option<bool>,
    /// TTL or hop limit of outer headers [default: 64]
    #[arg(long, value_name = "N", env = "LBD_OUTER_TTL")]
    pub outer_ttl: Option<u8>,
    /// Too-big messages sent to clients per second and CPU, 0 for none [default: 1000]
    #[arg(long, value_name = "N", env = "LBD_ICMP_PER_S")]
    pub icmp_per_s: Option<u32>,
    /// Parts of the XDP program that may be needed, a list, or all, or none; what is off costs nothing [default: all]
    #[arg(long, value_name = "FEATURE", env = "LBD_FEATURES", value_delimiter = ',')]
    #[serde(default)]
    pub features: Vec<String>,
    /// Health probes in flight at once [default: 512]
    #[arg(long, value_name = "N", env = "LBD_PROBES")]
    pub probes: Option<u32>,
    /// Revisions of the desired state that are kept [default: 10000]
    #[arg(long, value_name = "N", env = "LBD_REVISIONS")]
    pub revisions: Option<u64>,
    /// How much is logged [default: info]
    #[arg(long, value_name = "LEVEL", env = "LBD_LOG_LEVEL")]
    pub log_level: Option<LogLevel>,
    /// How log lines look [default: text]
    #[arg(long, value_name = "FORMAT", env = "LBD_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// What the XDP program logs, per packet; needs a reload of the program [default: off]
    #[arg(long, value_name = "LEVEL", env = "LBD_XDP_LOG_LEVEL")]
    pub xdp_log_level: Option<LogLevel>,
}

/// The daemon's settings, resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Interfaces, at least one.
    pub iface: Vec<String>,
    /// Pins.
    pub pin_path: PathBuf,
    /// What belongs to this host, and the store if it is a file.
    pub state_dir: PathBuf,
    /// Where the desired state is.
    pub store: Address,
    /// Access to it, if it is shared; its members and TLS go with the address.
    pub store_access: Access,
    /// Id that its data must have.
    pub store_id: Option<String>,
    /// Name of this host; its host name if none.
    pub host: Option<String>,
    /// Its region.
    pub region: Name,
    /// Its zone.
    pub zone: Name,
    /// Interface that VIPs are put on, if any.
    pub announce: Option<String>,
    /// What becomes of them when lbd stops.
    pub announce_on_stop: OnStop,
    /// API socket.
    pub socket: PathBuf,
    /// Its permissions.
    pub socket_mode: u32,
    /// Its group.
    pub socket_group: Option<String>,
    /// Address for metrics.
    pub metrics: Option<SocketAddr>,
    /// Whether someone asked for that address.
    pub metrics_required: bool,
    /// Whether generic XDP will do.
    pub allow_generic: bool,
    /// See [`Options::fix_offloads`].
    pub fix_offloads: bool,
    /// See [`Options::chain`].
    pub chain: bool,
    /// Outer IPv4 sources of ipip.
    pub ipip_source_v4: Option<Ipv4Net>,
    /// Outer IPv6 sources of ipip.
    pub ipip_source_v6: Option<Ipv6Net>,
    /// IPv4 sources of nat.
    pub nat_source_v4: Option<Ipv4Net>,
    /// IPv6 sources of nat.
    pub nat_source_v6: Option<Ipv6Net>,
    /// Whether someone asked for the ports of nat.
    pub nat_ports_required: bool,
    /// Room in the maps.
    pub max_services: u32,
    /// Room in the maps.
    pub max_backends: u32,
    /// Room in the maps.
    pub max_slots: u32,
    /// Room in the maps.
    pub max_flows: u32,
    /// Room in the maps.
    pub max_nat_flows: u32,
    /// Room in the maps.
    pub max_guard_entries: u32,
    /// Global of the program.
    pub ingress: IngressSettings,
    /// Health probes at once.
    pub probes: usize,
    /// Revisions kept.
    pub revisions: u64,
    /// Log level.
    pub log_level: LogLevel,
    /// Log format.
    pub log_format: LogFormat,
    /// The program's log level.
    pub xdp_log_level: LogLevel,
}

/// Sources of mode nat by family, one each.
fn nat_sources(nets: &[IpNet]) -> Result<(Option<Ipv4Net>, Option<Ipv6Net>), SettingsError> {
    let refuse = |what| Err(SettingsError { setting: "nat_source", what });
    let (mut v4, mut v6) = (None, None);
    for net in nets {
        let second = match *net {
            IpNet::V4(net) => v4.replace(net.trunc()).is_some(),
            IpNet::V6(net) => v6.replace(net.trunc()).is_some(),
        };
        if second {
            return refuse(format!("{net} is a second prefix of its family: give one"));
        }
        // Each port of each address is one more that a worker's answers must find back by.
        if net.max_prefix_len() - net.prefix_len() > 16 {
            return refuse(format!("{net} holds more than 65536 addresses: give a longer prefix"));
        }
    }
    Ok((v4, v6))
}

/// `FIRST-LAST`.
fn parse_nat_ports(text: &str) -> Result<(u16, u16), SettingsError> {
    let range =
        text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    match range {
        Some((first, last)) if first >= 1_024 && first <= last => Ok((first, last)),
        _ => Err(SettingsError {
            setting: "nat_ports",
            what: format!("{text:?} is no range FIRST-LAST within 1024 to 65535"),
        }),
    }
}

/// The bits of named features; all of them if none is named.
fn parse_features(named: &[String]) -> Result<u32, SettingsError> {
    let refuse = |what| Err(SettingsError { setting: "features", what });
    match named {
        [] => return Ok(features::ALL),
        [one] if one == "all" => return Ok(features::ALL),
        [one] if one == "none" => return Ok(0),
        _ => {}
    }
    let mut bits = 0;
    for name in named {
        match features::NAMES.iter().find(|(known, _)| known == name) {
            Some((_, bit)) => bits |= bit,
            None => {
                let known: Vec<&str> = features::NAMES.iter().map(|(name, _)| *name).collect();
                return refuse(format!(
                    "{name:?} is none of {}; or give all, or none, alone",
                    known.join(", ")
                ));
            }
        }
    }
    Ok(bits)
}

/// Why settings were refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {what}")]
pub struct SettingsError {
    /// Setting, as in the file.
    pub setting: &'static str,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl Options {
    /// These, and where they say nothing, `other`.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let list = |a: Vec<_>, b| if a.is_empty() { b } else { a };
        Self {
            iface: if self.iface.is_empty() { other.iface } else { self.iface },
            pin_path: self.pin_path.or(other.pin_path),
            state_dir: self.state_dir.or(other.state_dir),
            store: self.store.or(other.store),
            store_ca: self.store_ca.or(other.store_ca),
            store_cert: self.store_cert.or(other.store_cert),
            store_key: self.store_key.or(other.store_key),
            store_user: self.store_user.or(other.store_user),
            store_password_file: self.store_password_file.or(other.store_password_file),
            store_id: self.store_id.or(other.store_id),
            host: self.host.or(other.host),
            region: self.region.or(other.region),
            zone: self.zone.or(other.zone),
            announce: self.announce.or(other.announce),
            announce_on_stop: self.announce_on_stop.or(other.announce_on_stop),
            socket: self.socket.or(other.socket),
            socket_mode: self.socket_mode.or(other.socket_mode),
            socket_group: self.socket_group.or(other.socket_group),
            metrics: self.metrics.or(other.metrics),
            allow_generic: self.allow_generic.or(other.allow_generic),
            fix_offloads: self.fix_offloads.or(other.fix_offloads),
            chain: self.chain.or(other.chain),
            ipip_source: list(self.ipip_source, other.ipip_source),
            nat_source: list(self.nat_source, other.nat_source),
            nat_ports: self.nat_ports.or(other.nat_ports),
            max_services: self.max_services.or(other.max_services),
            max_backends: self.max_backends.or(other.max_backends),
            max_slots: self.max_slots.or(other.max_slots),
            max_flows: self.max_flows.or(other.max_flows),
            max_nat_flows: self.max_nat_flows.or(other.max_nat_flows),
            max_guard_entries: self.max_guard_entries.or(other.max_guard_entries),
            ipv6: self.ipv6.or(other.ipv6),
            vlan: self.vlan.or(other.vlan),
            outer_ttl: self.outer_ttl.or(other.outer_ttl),
            icmp_per_s: self.icmp_per_s.or(other.icmp_per_s),
            features: if self.features.is_empty() { other.features } else { self.features },
            probes: self.probes.or(other.probes),
            revisions: self.revisions.or(other.revisions),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
            xdp_log_level: self.xdp_log_level.or(other.xdp_log_level),
        }
    }

    /// Fills in defaults and checks values.
    ///
    /// # Errors
    /// Names the first setting that cannot be used. No interface is not an error here: `lbd detach`
    /// needs none.
    pub fn resolve(self) -> Result<Settings, SettingsError> {
        let refuse = |setting, what: String| Err(SettingsError { setting, what });
        let socket_mode = match self.socket_mode.as_deref() {
            None => 0o660,
            Some(text) => match u32::from_str_radix(text, 8) {
                Ok(mode) if mode <= 0o777 => mode,
                _ => return refuse("socket_mode", format!("{text:?} is no octal mode, such as 0660")),
            },
        };
        let metrics = match self.metrics.as_deref() {
            None => Some(SocketAddr::from(([127, 0, 0, 1], 9464))),
            Some("off") => None,
            Some(text) => match text.parse() {
                Ok(address) => Some(address),
                Err(_) => return refuse("metrics", format!("{text:?} is neither ADDRESS:PORT nor off")),
            },
        };
        let (mut ipip_source_v4, mut ipip_source_v6) = (None, None);
        for net in &self.ipip_source {
            let second = match *net {
                IpNet::V4(net) => ipip_source_v4.replace(net.trunc()).is_some(),
                IpNet::V6(net) => ipip_source_v6.replace(net.trunc()).is_some(),
            };
            if second {
                return refuse("ipip_source", format!("{net} is a second prefix of its family: give one"));
            }
        }
        for (name, value) in [
            ("max_services", self.max_services),
            ("max_backends", self.max_backends),
            ("max_slots", self.max_slots),
            ("max_flows", self.max_flows),
            ("max_nat_flows", self.max_nat_flows),
            ("max_guard_entries", self.max_guard_entries),
            ("probes", self.probes),
        ] {
            if value == Some(0) {
                return refuse(name, "0 leaves no room: at least 1".to_owned());
            }
        }
        if self.max_backends.is_some_and(|n| n > limits::MAX_BACKEND_INDEX) {
            return refuse("max_backends", format!("at most {}", limits::MAX_BACKEND_INDEX));
        }
        if self.outer_ttl == Some(0) {
            return refuse("outer_ttl", "0 would drop every packet at the first router: 1 to 255".to_owned());
        }
        let state_dir = self.state_dir.unwrap_or_else(|| "/var/lib/lb".into());
        let shared = Shared {
            url: self.store,
            ca: self.store_ca,
            cert: self.store_cert,
            key: self.store_key,
            user: self.store_user,
            password_file: self.store_password_file,
            id: self.store_id,
        };
        let (store, store_access, store_id) = shared.resolve(&state_dir)?;
        let host = self.host.map(|host| name("host", host)).transpose()?;
        let region = place("region", self.region)?;
        let zone = place("zone", self.zone)?;
        let (nat_source_v4, nat_source_v6) = nat_sources(&self.nat_source)?;
        let (nat_first, nat_last) = match self.nat_ports.as_deref() {
            None => NAT_PORTS,
            Some(text) => parse_nat_ports(text)?,
        };
        let default = IngressSettings::DEFAULT;
        let icmp_per_s = self.icmp_per_s.unwrap_or(default.icmp_per_s);
        let ingress = IngressSettings {
            ipv6: self.ipv6.map_or(default.ipv6, u8::from),
            vlan: self.vlan.map_or(default.vlan, u8::from),
            outer_ttl: self.outer_ttl.unwrap_or(default.outer_ttl),
            icmp_per_s,
            icmp_burst: default.icmp_burst.min(icmp_per_s),
            features: parse_features(&self.features)?,
            nat_first,
            nat_last,
            ..default
        };
        Ok(Settings {
            iface: self.iface,
            pin_path: self.pin_path.unwrap_or_else(|| "/sys/fs/bpf/lb".into()),
            state_dir,
            store,
            store_access,
            store_id,
            host,
            region,
            zone,
            announce: self.announce,
            announce_on_stop: self.announce_on_stop.unwrap_or_default(),
            socket: self.socket.unwrap_or_else(|| crate::DEFAULT_SOCKET.into()),
            socket_mode,
            socket_group: self.socket_group,
            metrics,
            metrics_required: self.metrics.is_some(),
            allow_generic: self.allow_generic.unwrap_or(false),
            fix_offloads: self.fix_offloads.unwrap_or(false),
            chain: self.chain.unwrap_or(false),
            ipip_source_v4,
            ipip_source_v6,
            nat_source_v4,
            nat_source_v6,
            nat_ports_required: self.nat_ports.is_some(),
            max_services: self.max_services.unwrap_or(limits::SERVICES),
            max_backends: self.max_backends.unwrap_or(limits::BACKENDS),
            max_slots: self.max_slots.unwrap_or(limits::SLOTS),
            max_flows: self.max_flows.unwrap_or(limits::FLOWS),
            max_nat_flows: self.max_nat_flows.unwrap_or(limits::NAT_FLOWS),
            max_guard_entries: self.max_guard_entries.unwrap_or(limits::GUARD_ENTRIES),
            ingress,
            probes: self.probes.unwrap_or(512) as usize,
            revisions: self.revisions.unwrap_or(10_000).max(2),
            log_level: self.log_level.unwrap_or_default(),
            log_format: self.log_format.unwrap_or_default(),
            xdp_log_level: self.xdp_log_level.unwrap_or(LogLevel::Off),
        })
    }
}
