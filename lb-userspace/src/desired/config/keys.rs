//! Known keys of each table, from which an unknown key gets its suggestion.
//!
//! A test compares these lists with the keys that serde accepts.

/// Top-level tables and keys.
pub const TOP: &[&str] = &["revision", "lbd", "hook", "region", "service"];

/// `[lbd]`: the table of [`super::Options`] defines its keys.
pub const LBD: &[&str] = super::Options::KEYS;

/// `[[hook]]`.
pub const HOOK: &[&str] = &["on", "run", "timeout_s"];

/// `[[service]]`.
pub const SERVICE: &[&str] = &[
    "name",
    "vip",
    "port",
    "protocol",
    "mode",
    "scheduler",
    "load_cap",
    "second_chance",
    "table_size",
    "seed",
    "drain_s",
    "slow_start_s",
    "udp_stateless",
    "udp_timeout_s",
    "tcp_timeout_s",
    "quic",
    "gue_port",
    "new_flow_rate",
    "new_flow_burst",
    "source_rate",
    "source_burst",
    "source_prefix_v4",
    "source_prefix_v6",
    "on_down",
    "when_all_down",
    "panic_percent",
    "max_ejection_percent",
    "ejection_window_s",
    "seating",
    "health",
    "replica",
    "regions",
    "rollout",
    "backend",
];

/// `[service.health]`.
pub const HEALTH: &[&str] = &[
    "kind",
    "path",
    "host",
    "status",
    "headers",
    "body",
    "service",
    "sni",
    "ca",
    "verify",
    "client_cert",
    "client_key",
    "port",
    "via",
    "interval_ms",
    "jitter_percent",
    "timeout_ms",
    "busy_timeout_ms",
    "rise",
    "fall",
    "damping",
    "signs",
];

/// `[service.replica]`.
pub const REPLICA: &[&str] = &["kind", "port", "path", "interval_ms", "timeout_ms", "capacity", "metrics"];

/// `[service.replica.metrics]`.
pub const METRICS: &[&str] = &[
    "running",
    "waiting",
    "kv_cache_usage",
    "capacity",
    "tokens_total",
    "tokens_per_second",
    "gpu_memory_used",
    "gpu_memory_total",
    "awake",
];

/// `[service.regions]`.
pub const REGIONS: &[&str] = &[
    "policy",
    "allowed",
    "weights",
    "spill_at_percent",
    "spill_until_percent",
    "spill_most_percent",
    "hold_s",
    "zone_first",
];

/// `[service.rollout]`.
pub const ROLLOUT: &[&str] = &[
    "model",
    "version",
    "permille",
    "regions",
    "state",
    "since_ms",
    "reason",
    "most_errors_percent",
    "most_latency_percent",
    "least_requests",
];

/// `[[region]]`.
pub const REGION: &[&str] = &["name", "state"];

/// `[[service.backend]]`.
pub const BACKEND: &[&str] =
    &["name", "address", "port", "weight", "state", "seat", "server_id", "region", "zone"];
