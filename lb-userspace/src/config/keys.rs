//! Known keys of each table, so that an unknown one is answered with the nearest.
//!
//! A test compares these lists with what serde accepts.

/// Tables at the top.
pub const TOP: &[&str] = &["lbd", "service"];

/// `[lbd]`.
pub const LBD: &[&str] = &[
    "iface",
    "pin_path",
    "state_dir",
    "socket",
    "socket_mode",
    "socket_group",
    "metrics",
    "allow_generic",
    "chain",
    "ipip_source",
    "max_services",
    "max_backends",
    "max_slots",
    "max_flows",
    "ipv6",
    "vlan",
    "outer_ttl",
    "icmp_per_s",
    "features",
    "probes",
    "revisions",
    "log_level",
    "log_format",
    "xdp_log_level",
];

/// `[[service]]`.
pub const SERVICE: &[&str] = &[
    "name",
    "vip",
    "port",
    "protocol",
    "mode",
    "scheduler",
    "table_size",
    "seed",
    "drain_s",
    "udp_stateless",
    "udp_timeout_s",
    "quic",
    "gue_port",
    "on_down",
    "panic_percent",
    "seating",
    "health",
    "backend",
];

/// `[service.health]`.
pub const HEALTH: &[&str] = &[
    "kind",
    "path",
    "host",
    "status",
    "port",
    "interval_ms",
    "jitter_percent",
    "timeout_ms",
    "rise",
    "fall",
];

/// `[[service.backend]]`.
pub const BACKEND: &[&str] = &["name", "address", "weight", "state", "seat", "server_id"];
