//! Health checks of a service.

use serde::{Deserialize, Serialize};

/// What is asked of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthKind {
    /// No check: always healthy.
    None,
    /// A TCP connection opens.
    Tcp,
    /// An HTTP/1.1 GET answers with an expected status.
    Http {
        /// Path and query.
        path: String,
        /// `Host` header; the VIP if none.
        host: Option<String>,
        /// Statuses that mean healthy, bounds included.
        status: (u16, u16),
    },
}

impl HealthKind {
    /// The word for it in configuration files.
    pub fn label(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tcp => "tcp",
            Self::Http { .. } => "http",
        }
    }
}

/// Path of an HTTP check that names none.
pub const DEFAULT_PATH: &str = "/";
/// Statuses of an HTTP check that names none.
pub const DEFAULT_STATUS: (u16, u16) = (200, 299);

/// How a service's backends are probed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct HealthCheck {
    /// What is asked.
    pub kind: HealthKind,
    /// Port asked; the service's own port if none (which `any` and ranges must therefore name).
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

/// [`HealthCheck`] as it is written: one flat table, so that an unknown key is refused (serde cannot do
/// that through `flatten`).
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    kind: Word,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<(u16, u16)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    #[serde(default = "jitter_percent")]
    jitter_percent: u8,
    #[serde(default = "timeout_ms")]
    timeout_ms: u32,
    #[serde(default = "rise")]
    rise: u8,
    #[serde(default = "fall")]
    fall: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    None,
    Tcp,
    Http,
}

fn interval_ms() -> u32 {
    HealthCheck::default().interval_ms
}
fn jitter_percent() -> u8 {
    HealthCheck::default().jitter_percent
}
fn timeout_ms() -> u32 {
    HealthCheck::default().timeout_ms
}
fn rise() -> u8 {
    HealthCheck::default().rise
}
fn fall() -> u8 {
    HealthCheck::default().fall
}

/// A key that does not go with the kind of check.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} goes with kind \"http\" only, and kind is {kind:?}")]
pub struct HealthError {
    /// The key.
    pub key: &'static str,
    /// The kind.
    pub kind: &'static str,
}

impl TryFrom<Fields> for HealthCheck {
    type Error = HealthError;
    fn try_from(f: Fields) -> Result<Self, HealthError> {
        let only_http = |kind: HealthKind| {
            let given =
                [("path", f.path.is_some()), ("host", f.host.is_some()), ("status", f.status.is_some())];
            match given.iter().find(|(_, given)| *given) {
                Some(&(key, _)) => Err(HealthError { key, kind: kind.label() }),
                None => Ok(kind),
            }
        };
        let kind = match f.kind {
            Word::None => only_http(HealthKind::None)?,
            Word::Tcp => only_http(HealthKind::Tcp)?,
            Word::Http => HealthKind::Http {
                path: f.path.unwrap_or_else(|| DEFAULT_PATH.to_owned()),
                host: f.host,
                status: f.status.unwrap_or(DEFAULT_STATUS),
            },
        };
        Ok(Self {
            kind,
            port: f.port,
            interval_ms: f.interval_ms,
            jitter_percent: f.jitter_percent,
            timeout_ms: f.timeout_ms,
            rise: f.rise,
            fall: f.fall,
        })
    }
}

impl From<HealthCheck> for Fields {
    fn from(h: HealthCheck) -> Self {
        let (kind, path, host, status) = match h.kind {
            HealthKind::None => (Word::None, None, None, None),
            HealthKind::Tcp => (Word::Tcp, None, None, None),
            HealthKind::Http { path, host, status } => (Word::Http, Some(path), host, Some(status)),
        };
        Self {
            kind,
            path,
            host,
            status,
            port: h.port,
            interval_ms: h.interval_ms,
            jitter_percent: h.jitter_percent,
            timeout_ms: h.timeout_ms,
            rise: h.rise,
            fall: h.fall,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<HealthCheck, String> {
        serde_json::from_str(json).map_err(|e| e.to_string())
    }

    #[test]
    fn keys_are_checked() {
        for (json, expected) in [
            (r#"{"kind":"tcp","intervall_ms":5}"#, "unknown field `intervall_ms`"),
            (r#"{"kind":"tcp","path":"/"}"#, "path goes with kind \"http\" only, and kind is \"tcp\""),
            (r#"{"interval_ms":5}"#, "missing field `kind`"),
            (r#"{"kind":"grpc"}"#, "unknown variant `grpc`"),
            (r#"{"kind":"http","interval_ms":"1s"}"#, "invalid type: string"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(expected), "{json}: {error}");
        }
    }

    #[test]
    fn round_trips() {
        for json in [
            r#"{"kind":"none"}"#,
            r#"{"kind":"tcp","port":8080,"rise":1}"#,
            r#"{"kind":"http","path":"/healthz?x=1","host":"a.example","status":[200,399],"interval_ms":50}"#,
        ] {
            let one = parse(json).unwrap();
            assert_eq!(parse(&serde_json::to_string(&one).unwrap()).unwrap(), one);
        }
        assert_eq!(parse(r#"{"kind":"none"}"#).unwrap(), HealthCheck::default());
    }
}
