//! Health checks of a service.

use serde::{Deserialize, Serialize};

/// What is asked of a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum HealthKind {
    /// No check: always healthy.
    None,
    /// A TCP connection opens.
    Tcp,
    /// An HTTP/1.1 GET answers with an expected status.
    Http {
        /// Path and query.
        #[serde(default = "default_path")]
        path: String,
        /// `Host` header; the VIP if none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        host: Option<String>,
        /// Statuses that mean healthy, bounds included.
        #[serde(default = "default_status")]
        status: (u16, u16),
    },
}

fn default_path() -> String {
    "/".to_owned()
}

fn default_status() -> (u16, u16) {
    (200, 299)
}

/// How a service's backends are probed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthCheck {
    /// What is asked.
    #[serde(flatten)]
    pub kind: HealthKind,
    /// Port asked; the service's own port if none (which `any` and ranges must therefore name).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Time between two probes of one backend, in milliseconds.
    pub interval_ms: u32,
    /// Each wait is varied by up to this share of the interval either way, in percent.
    pub jitter_percent: u8,
    /// A probe fails after this many milliseconds.
    pub timeout_ms: u32,
    /// Successes in a row that make a backend healthy.
    pub rise: u8,
    /// Failures in a row that make it unhealthy.
    pub fall: u8,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            kind: HealthKind::None,
            port: None,
            interval_ms: 1_000,
            jitter_percent: 10,
            timeout_ms: 500,
            rise: 2,
            fall: 3,
        }
    }
}
