//! Turns [`Options`] into [`Settings`]: fills in defaults and checks values.

use super::{
    LogFormat, LogLevel, OnStop, Options,
    options::Defaults,
    shared::{StoreOptions, host_name, place_name},
};
use crate::desired::{
    model::Name,
    store::{Address, etcd::Access},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::{
    limits,
    settings::{IngressSettings, features},
};
use std::{net::SocketAddr, path::PathBuf};

/// The daemon's settings, resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Interfaces to attach to; none for `lbd detach`.
    pub iface: Vec<String>,
    /// Directory of the pins.
    pub pin_path: PathBuf,
    /// Directory for the data of this host, and of the store if it is a file.
    pub state_dir: PathBuf,
    /// Address of the store of the desired state.
    pub store: Address,
    /// Credentials for a shared store, with its members and TLS, which come from the address.
    pub store_access: Access,
    /// Id that the store must have.
    pub store_id: Option<String>,
    /// Name of this host; if none, its host name.
    pub host: Option<String>,
    /// Region of this host.
    pub region: Name,
    /// Zone of this host.
    pub zone: Name,
    /// Interface that VIPs are put on, if any.
    pub announce: Option<String>,
    /// What happens to announced VIPs when lbd stops.
    pub announce_on_stop: OnStop,
    /// API socket.
    pub socket: PathBuf,
    /// Permissions of the API socket.
    pub socket_mode: u32,
    /// Group of the API socket.
    pub socket_group: Option<String>,
    /// Address for metrics.
    pub metrics: Option<SocketAddr>,
    /// Whether the operator set the address for metrics.
    pub metrics_required: bool,
    /// Whether generic XDP may be used.
    pub allow_generic: bool,
    /// See [`Options::fix_offloads`].
    pub fix_offloads: bool,
    /// See [`Options::chain`].
    pub chain: bool,
    /// Outer IPv4 sources of ipip.
    pub ipip_source_v4: Option<Ipv4Net>,
    /// Outer IPv6 sources of ipip.
    pub ipip_source_v6: Option<Ipv6Net>,
    /// IPv4 sources of mode nat.
    pub nat_source_v4: Option<Ipv4Net>,
    /// IPv6 sources of mode nat.
    pub nat_source_v6: Option<Ipv6Net>,
    /// Whether the operator set the ports of mode nat.
    pub nat_ports_required: bool,
    /// Maximum number of services.
    pub max_services: u32,
    /// Maximum number of backends.
    pub max_backends: u32,
    /// Maximum number of Maglev slots.
    pub max_slots: u32,
    /// Maximum number of tracked flows, TCP and UDP each.
    pub max_flows: u32,
    /// Maximum number of flows in mode nat.
    pub max_nat_flows: u32,
    /// Maximum number of entries of the deny and allow lists.
    pub max_guard_entries: u32,
    /// Read-only global of the ingress program.
    pub ingress: IngressSettings,
    /// Maximum number of health probes in flight.
    pub probes: usize,
    /// Number of revisions that are kept.
    pub revisions: u64,
    /// Log level.
    pub log_level: LogLevel,
    /// Log format.
    pub log_format: LogFormat,
    /// Log level of the XDP program.
    pub xdp_log_level: LogLevel,
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

impl SettingsError {
    fn refuse<T>(setting: &'static str, what: impl Into<String>) -> Result<T, Self> {
        Err(Self { setting, what: what.into() })
    }
}

impl Options {
    /// Fills in defaults and checks values.
    ///
    /// # Errors
    /// Names the first setting that cannot be used. No interface is not an error here: `lbd detach`
    /// needs none.
    pub fn resolve(self) -> Result<Settings, SettingsError> {
        let socket_mode = parse_mode(&self.socket_mode.clone().unwrap_or_else(Defaults::socket_mode))?;
        let metrics = parse_metrics(&self.metrics.clone().unwrap_or_else(Defaults::metrics))?;
        let (ipip_source_v4, ipip_source_v6) = one_per_family("ipip_source", &self.ipip_source)?;
        self.check_limits()?;
        let state_dir = self.state_dir.clone().unwrap_or_else(Defaults::state_dir);
        let store_options = StoreOptions {
            url: self.store.clone(),
            ca: self.store_ca.clone(),
            cert: self.store_cert.clone(),
            key: self.store_key.clone(),
            user: self.store_user.clone(),
            password_file: self.store_password_file.clone(),
            id: self.store_id.clone(),
        };
        let (store, store_access, store_id) = store_options.resolve(&state_dir)?;
        let host = self.host.clone().map(|host| host_name("host", host)).transpose()?;
        let region = place_name("region", &self.region.clone().unwrap_or_else(Defaults::region))?;
        let zone = place_name("zone", &self.zone.clone().unwrap_or_else(Defaults::zone))?;
        let (nat_source_v4, nat_source_v6) = nat_sources(&self.nat_source)?;
        let ingress = self.ingress_settings()?;
        Ok(Settings {
            iface: self.iface,
            pin_path: self.pin_path.unwrap_or_else(Defaults::pin_path),
            state_dir,
            store,
            store_access,
            store_id,
            host,
            region,
            zone,
            announce: self.announce,
            announce_on_stop: self.announce_on_stop.unwrap_or_else(Defaults::announce_on_stop),
            socket: self.socket.unwrap_or_else(Defaults::socket),
            socket_mode,
            socket_group: self.socket_group,
            metrics,
            metrics_required: self.metrics.is_some(),
            allow_generic: self.allow_generic.unwrap_or_else(Defaults::allow_generic),
            fix_offloads: self.fix_offloads.unwrap_or_else(Defaults::fix_offloads),
            chain: self.chain.unwrap_or_else(Defaults::chain),
            ipip_source_v4,
            ipip_source_v6,
            nat_source_v4,
            nat_source_v6,
            nat_ports_required: self.nat_ports.is_some(),
            max_services: self.max_services.unwrap_or_else(Defaults::max_services),
            max_backends: self.max_backends.unwrap_or_else(Defaults::max_backends),
            max_slots: self.max_slots.unwrap_or_else(Defaults::max_slots),
            max_flows: self.max_flows.unwrap_or_else(Defaults::max_flows),
            max_nat_flows: self.max_nat_flows.unwrap_or_else(Defaults::max_nat_flows),
            max_guard_entries: self.max_guard_entries.unwrap_or_else(Defaults::max_guard_entries),
            ingress,
            probes: self.probes.unwrap_or_else(Defaults::probes) as usize,
            revisions: self.revisions.unwrap_or_else(Defaults::revisions).max(2),
            log_level: self.log_level.unwrap_or_else(Defaults::log_level),
            log_format: self.log_format.unwrap_or_else(Defaults::log_format),
            xdp_log_level: self.xdp_log_level.unwrap_or_else(Defaults::xdp_log_level),
        })
    }

    /// Checks that limits and the outer TTL are within their bounds.
    fn check_limits(&self) -> Result<(), SettingsError> {
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
                return SettingsError::refuse(name, "0 is too small: give at least 1");
            }
        }
        if let Some(value) = self.max_backends.filter(|n| *n > limits::MAX_BACKEND_INDEX) {
            let what = format!("{value} is too large: give at most {}", limits::MAX_BACKEND_INDEX);
            return SettingsError::refuse("max_backends", what);
        }
        if self.outer_ttl == Some(0) {
            let what = "0 would make the first router drop every packet: give 1 to 255";
            return SettingsError::refuse("outer_ttl", what);
        }
        Ok(())
    }

    /// The read-only global of the ingress program.
    fn ingress_settings(&self) -> Result<IngressSettings, SettingsError> {
        let default = IngressSettings::DEFAULT;
        let (nat_first, nat_last) =
            parse_nat_ports(&self.nat_ports.clone().unwrap_or_else(Defaults::nat_ports))?;
        let icmp_per_s = self.icmp_per_s.unwrap_or_else(Defaults::icmp_per_s);
        Ok(IngressSettings {
            ipv6: self.ipv6.unwrap_or_else(Defaults::ipv6).into(),
            vlan: self.vlan.unwrap_or_else(Defaults::vlan).into(),
            outer_ttl: self.outer_ttl.unwrap_or_else(Defaults::outer_ttl),
            icmp_per_s,
            icmp_burst: default.icmp_burst.min(icmp_per_s),
            features: parse_features(&self.features)?,
            nat_first,
            nat_last,
            ..default
        })
    }
}

/// Parses octal permissions.
fn parse_mode(text: &str) -> Result<u32, SettingsError> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => {
            let what = format!("{text:?} is not a valid octal mode: give one such as 0660");
            SettingsError::refuse("socket_mode", what)
        }
    }
}

/// Parses the address for metrics; none for `off`.
fn parse_metrics(text: &str) -> Result<Option<SocketAddr>, SettingsError> {
    if text == "off" {
        return Ok(None);
    }
    match text.parse() {
        Ok(address) => Ok(Some(address)),
        Err(_) => SettingsError::refuse("metrics", format!("{text:?} is neither ADDRESS:PORT nor off")),
    }
}

/// Sorts prefixes by family and refuses a second one of a family.
fn one_per_family(
    setting: &'static str,
    nets: &[IpNet],
) -> Result<(Option<Ipv4Net>, Option<Ipv6Net>), SettingsError> {
    let (mut v4, mut v6) = (None, None);
    for net in nets {
        let is_second = match *net {
            IpNet::V4(net) => v4.replace(net.trunc()).is_some(),
            IpNet::V6(net) => v6.replace(net.trunc()).is_some(),
        };
        if is_second {
            let what = format!("{net} is a second prefix of its family: give one per family");
            return SettingsError::refuse(setting, what);
        }
    }
    Ok((v4, v6))
}

/// Sources of mode nat by family.
fn nat_sources(nets: &[IpNet]) -> Result<(Option<Ipv4Net>, Option<Ipv6Net>), SettingsError> {
    let sources = one_per_family("nat_source", nets)?;
    // Answers are looked up by address and port, so each address multiplies the keys that a worker's answer can have.
    match nets.iter().find(|net| net.max_prefix_len() - net.prefix_len() > 16) {
        Some(net) => {
            let what = format!("{net} holds more than 65536 addresses: give a longer prefix");
            SettingsError::refuse("nat_source", what)
        }
        None => Ok(sources),
    }
}

/// Parses `FIRST-LAST`.
fn parse_nat_ports(text: &str) -> Result<(u16, u16), SettingsError> {
    let range =
        text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    match range {
        Some((first, last)) if first >= 1_024 && first <= last => Ok((first, last)),
        _ => {
            let what = format!("{text:?} is not a valid port range: give FIRST-LAST within 1024 to 65535");
            SettingsError::refuse("nat_ports", what)
        }
    }
}

/// Bits of the named features; all features if none is named.
fn parse_features(named: &[String]) -> Result<u32, SettingsError> {
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
                let known = known.join(", ");
                let what = format!("{name:?} is not a feature: give all or none alone, or any of {known}");
                return SettingsError::refuse("features", what);
            }
        }
    }
    Ok(bits)
}
