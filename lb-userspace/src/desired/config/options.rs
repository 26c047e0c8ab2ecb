//! The table of the daemon's settings: [`Options`] as one source gives them, their help texts and their defaults.
//!
//! [`super::resolve`] checks them and makes [`super::Settings`].

use ipnet::IpNet;
use lb_common::{
    limits,
    settings::{IngressSettings, NAT_PORTS},
};
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf};

/// What happens to announced VIPs when lbd stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// VIPs stay on the interface: the dataplane goes on forwarding
    #[default]
    Keep,
    /// VIPs are removed from the interface
    Withdraw,
}

/// Most verbose level of messages that are logged.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing
    Off,
    /// Failures
    Error,
    /// Problems that lbd works around
    Warn,
    /// Changes of state
    #[default]
    Info,
    /// Reasons for decisions
    Debug,
    /// Every step
    Trace,
}

impl LogLevel {
    /// Name of the level in settings.
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

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text for people
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// Implements `Display` as the word that stands in settings.
macro_rules! display_as_setting {
    ($($ty:ty),+) => { $(impl fmt::Display for $ty {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let value = clap::ValueEnum::to_possible_value(self);
            f.write_str(value.as_ref().map_or("", |value| value.get_name()))
        }
    })+ };
}
display_as_setting!(OnStop, LogLevel, LogFormat);

/// `or` for lists, as `Option` has it for single values: an empty list was not given.
trait ListOr {
    /// This list, or `other` if this one is empty.
    fn or(self, other: Self) -> Self;
}

impl<T> ListOr for Vec<T> {
    fn or(self, other: Self) -> Self {
        if self.is_empty() { other } else { self }
    }
}

/// Help text of a setting: its documentation, and its default where the table has one.
fn help(documentation: &str, default: Option<String>) -> String {
    match default {
        Some(default) => format!("{} [default: {default}]", documentation.trim()),
        None => documentation.trim().to_owned(),
    }
}

/// Declares [`Options`], its keys, its merge and its [`Defaults`] from one table. A row is: help text, key (which is the
/// flag's name too), type, default if it is a value, name of the value in help, environment variable, and attributes
/// of the flag. A default that depends on the host is part of the help text.
macro_rules! options {
    ($(
        $(#[doc = $doc:literal])+
        $key:ident: $kind:ident<$inner:ty> $(= $default:expr)?, $value:literal, $env:literal $([$($arg:tt)+])?;
    )+) => {
        /// Settings as one source gives them: flags with their environment variables (clap), or `[lbd]` (serde).
        #[derive(Clone, Debug, Default, PartialEq, clap::Args, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Options {
            $(
                $(#[doc = $doc])+
                #[arg(long, value_name = $value, env = $env,
                    help = help(concat!($($doc),+), options!(@text $($default)?)) $(, $($arg)+)?)]
                pub $key: $kind<$inner>,
            )+
        }

        impl Options {
            /// Keys of `[lbd]`, in the order of the table.
            pub const KEYS: &'static [&'static str] = &[$(stringify!($key)),+];

            /// These options, completed by `other` where they leave a setting out.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self { $($key: self.$key.or(other.$key)),+ }
            }
        }

        /// Default of each setting that has a fixed one; the functions bear the names of the settings.
        pub(super) struct Defaults;

        impl Defaults {
            $($(
                #[doc = concat!("Default of `", stringify!($key), "`.")]
                pub fn $key() -> $inner { $default.into() }
            )?)+
        }
    };
    (@text) => { None };
    (@text $default:expr) => { Some($default.to_string()) };
}

options! {
    /// Network interface to attach to; may be repeated
    iface: Vec<String>, "IFACE", "LBD_IFACE" [value_delimiter = ','];
    /// Directory in a bpf filesystem where programs, maps and links are pinned
    pin_path: Option<PathBuf> = "/sys/fs/bpf/lb", "DIR", "LBD_PIN_PATH";
    /// Directory for the data of this host
    state_dir: Option<PathBuf> = "/var/lib/lb", "DIR", "LBD_STATE_DIR";
    /// Store of the desired state: file:///DIRECTORY, or etcd://HOST:PORT,HOST:PORT[/PREFIX] (etcds:// for TLS), which
    /// several hosts can share [default: in state_dir]
    store: Option<String>, "URL", "LBD_STORE";
    /// File of CA certificates (PEM) that verify etcd's certificate [default: the system's]
    store_ca: Option<PathBuf>, "FILE", "LBD_STORE_CA";
    /// File of the client certificate (PEM) that this host presents to etcd; needs store_key
    store_cert: Option<PathBuf>, "FILE", "LBD_STORE_CERT";
    /// File of the private key (PEM) of store_cert
    store_key: Option<PathBuf>, "FILE", "LBD_STORE_KEY";
    /// User name for etcd; needs store_password_file
    store_user: Option<String>, "NAME", "LBD_STORE_USER";
    /// File that holds the password of store_user
    store_password_file: Option<PathBuf>, "FILE", "LBD_STORE_PASSWORD_FILE";
    /// Id that the shared store must have, 16 hexadecimal digits [default: the id seen at the last start, or any]
    store_id: Option<String>, "ID", "LBD_STORE_ID";
    /// Name of this host among those that share the store [default: its host name]
    host: Option<String>, "NAME", "LBD_HOST";
    /// Region that this host is in
    region: Option<String> = "default", "NAME", "LBD_REGION";
    /// Zone of the region that this host is in
    zone: Option<String> = "default", "NAME", "LBD_ZONE";
    /// Interface on which lbd puts each VIP while it is served, for a routing daemon to announce
    announce: Option<String>, "IFACE", "LBD_ANNOUNCE";
    /// What happens to announced VIPs when lbd stops
    announce_on_stop: Option<OnStop> = OnStop::default(), "WHAT", "LBD_ANNOUNCE_ON_STOP";
    /// Unix socket of the API
    socket: Option<PathBuf> = crate::DEFAULT_SOCKET, "PATH", "LBD_SOCKET";
    /// Permissions of the socket, octal; with 0666 every user may read, but only root and socket_group may write
    socket_mode: Option<String> = "0660", "MODE", "LBD_SOCKET_MODE";
    /// Group of the socket, whose members may make changes as root may [default: root's]
    socket_group: Option<String>, "GROUP", "LBD_SOCKET_GROUP";
    /// Address and port on which metrics are served over HTTP at /metrics, or off
    metrics: Option<String> = "127.0.0.1:9464", "ADDRESS", "LBD_METRICS";
    /// Attach in generic mode, which is slow, when the driver does not support XDP
    allow_generic: Option<bool> = false, "BOOL", "LBD_ALLOW_GENERIC" [num_args = 0..=1, default_missing_value = "true"];
    /// Before attaching, switch off NIC offloads that XDP cannot work with (LRO, VLAN tag stripping)
    fix_offloads: Option<bool> = false, "BOOL", "LBD_FIX_OFFLOADS" [num_args = 0..=1, default_missing_value = "true"];
    /// Run other XDP programs before and after lbd's: entries 0 and 5 of the program array STAGES in pin_path
    chain: Option<bool> = false, "BOOL", "LBD_CHAIN" [num_args = 0..=1, default_missing_value = "true"];
    /// Prefix for the outer source addresses of ipip packets, which vary by flow; one prefix per family
    ipip_source: Vec<IpNet>, "NET", "LBD_IPIP_SOURCE" [value_delimiter = ','];
    /// Source addresses of packets to workers in mode nat, one prefix of this host per family [default: the route's]
    nat_source: Vec<IpNet>, "NET", "LBD_NAT_SOURCE" [value_delimiter = ','];
    /// Range of source ports of packets to workers in mode nat, within 1024 to 65535
    nat_ports: Option<String> = format!("{}-{}", NAT_PORTS.0, NAT_PORTS.1), "FIRST-LAST", "LBD_NAT_PORTS";
    /// Maximum number of services
    max_services: Option<u32> = limits::SERVICES, "N", "LBD_MAX_SERVICES";
    /// Maximum number of backends over all services
    max_backends: Option<u32> = limits::BACKENDS, "N", "LBD_MAX_BACKENDS";
    /// Maximum number of Maglev slots, live ones and those being written, 8 bytes each
    max_slots: Option<u32> = limits::SLOTS, "N", "LBD_MAX_SLOTS";
    /// Maximum number of tracked flows, for each of the two tables: TCP exceptions, and UDP
    max_flows: Option<u32> = limits::FLOWS, "N", "LBD_MAX_FLOWS";
    /// Maximum number of flows in mode nat
    max_nat_flows: Option<u32> = limits::NAT_FLOWS, "N", "LBD_MAX_NAT_FLOWS";
    /// Maximum number of entries of the deny and allow lists together; each entry in use takes 128 bytes
    max_guard_entries: Option<u32> = limits::GUARD_ENTRIES, "N", "LBD_MAX_GUARD_ENTRIES";
    /// Balance IPv6
    ipv6: Option<bool> = IngressSettings::DEFAULT.ipv6 != 0, "BOOL", "LBD_IPV6";
    /// Balance packets with VLAN tags
    vlan: Option<bool> = IngressSettings::DEFAULT.vlan != 0, "BOOL", "LBD_VLAN";
    /// TTL or hop limit of outer headers, 1 to 255
    outer_ttl: Option<u8> = IngressSettings::DEFAULT.outer_ttl, "N", "LBD_OUTER_TTL";
    /// Maximum rate of ICMP packet-too-big messages to clients, per second and CPU; 0 sends none
    icmp_per_s: Option<u32> = IngressSettings::DEFAULT.icmp_per_s, "N", "LBD_ICMP_PER_S";
    /// Parts of the XDP program to load: a list, all, or none; a part that is not loaded costs nothing [default: all]
    features: Vec<String>, "FEATURE", "LBD_FEATURES" [value_delimiter = ','];
    /// Maximum number of health probes in flight at once
    probes: Option<u32> = 512u32, "N", "LBD_PROBES";
    /// Number of revisions of the desired state that are kept, at least 2
    revisions: Option<u64> = 10_000u64, "N", "LBD_REVISIONS";
    /// Most verbose level of messages that are logged
    log_level: Option<LogLevel> = LogLevel::default(), "LEVEL", "LBD_LOG_LEVEL";
    /// Format of log lines
    log_format: Option<LogFormat> = LogFormat::default(), "FORMAT", "LBD_LOG_FORMAT";
    /// Most verbose level of messages that the XDP program logs per packet; a change reloads the program
    xdp_log_level: Option<LogLevel> = LogLevel::Off, "LEVEL", "LBD_XDP_LOG_LEVEL";
}
