//! Health checks of a service.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// Kind of a health check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthKind {
    /// No setting was given: a new service gets its default check, see [`super::defaults`]. Elsewhere the same as `None`.
    Unset,
    /// No check: always healthy.
    None,
    /// A TCP connection opens.
    Tcp,
    /// A TLS handshake succeeds.
    Tls(TlsCheck),
    /// An HTTP/1.1 GET is answered as expected.
    Http(HttpCheck),
    /// The gRPC health service (grpc.health.v1) says SERVING.
    Grpc(GrpcCheck),
}

/// An HTTP GET and the answer that it expects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCheck {
    /// Path and query.
    pub path: String,
    /// `Host` header; the VIP if none.
    pub host: Option<String>,
    /// Status codes that count as healthy, bounds included.
    pub status: (u16, u16),
    /// Additional headers.
    pub headers: BTreeMap<String, String>,
    /// Text that the first 64 KiB of the body must contain.
    pub body: Option<String>,
    /// TLS settings; plain HTTP if none.
    pub tls: Option<TlsCheck>,
}

impl Default for HttpCheck {
    fn default() -> Self {
        let (path, status) = (DEFAULT_PATH.to_owned(), DEFAULT_STATUS);
        Self { path, host: None, status, headers: BTreeMap::new(), body: None, tls: None }
    }
}

/// A request to the gRPC health service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrpcCheck {
    /// Name of the service; the empty name is the whole server.
    pub service: String,
    /// Authority; the VIP if none.
    pub host: Option<String>,
    /// TLS settings; no TLS if none.
    pub tls: Option<TlsCheck>,
}

/// TLS settings of a check.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TlsCheck {
    /// Server name that is sent and checked against the certificate; the check's host if none, else the VIP.
    pub sni: Option<String>,
    /// File of trusted certificates (PEM); the host's own if none.
    pub ca: Option<PathBuf>,
    /// Whether the certificate is verified.
    pub verify: bool,
    /// Files of a client certificate and its private key (PEM).
    pub client: Option<(PathBuf, PathBuf)>,
}

impl Default for TlsCheck {
    fn default() -> Self {
        Self { sni: None, ca: None, verify: true, client: None }
    }
}

impl HealthKind {
    /// Name of the kind in configuration files.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unset | Self::None => "none",
            Self::Tcp => "tcp",
            Self::Tls(_) => "tls",
            Self::Http(HttpCheck { tls: None, .. }) => "http",
            Self::Http(_) => "https",
            Self::Grpc(GrpcCheck { tls: None, .. }) => "grpc",
            Self::Grpc(_) => "grpcs",
        }
    }

    /// Whether nothing is checked.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::Unset | Self::None)
    }

    /// TLS settings of the kind, if it uses TLS.
    pub fn tls(&self) -> Option<&TlsCheck> {
        match self {
            Self::Unset | Self::None | Self::Tcp => None,
            Self::Tls(tls) => Some(tls),
            Self::Http(http) => http.tls.as_ref(),
            Self::Grpc(grpc) => grpc.tls.as_ref(),
        }
    }
}

/// Default path of an HTTP check.
pub const DEFAULT_PATH: &str = "/";
/// Default status codes of an HTTP check.
pub const DEFAULT_STATUS: (u16, u16) = (200, 299);

/// Path of probes to a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// Not named: [`super::defaults`] chooses for a new check; else direct, as earlier versions stored it.
    #[default]
    #[serde(skip)]
    Unset,
    /// To the backend's own address.
    Direct,
    /// The path of traffic: encapsulated to the backend, for the VIP.
    Tunnel,
}

impl Via {
    fn is_unset(&self) -> bool {
        *self == Self::Unset
    }
}

/// Health check of a service's backends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct HealthCheck {
    /// Kind of the check.
    pub kind: HealthKind,
    /// Port that is checked; the service's port if none (required for `any` and ranges).
    pub port: Option<u16>,
    /// Path of probes.
    pub via: Via,
    /// Time between two probes of one backend, in milliseconds.
    pub interval_ms: u32,
    /// Random variation of each interval, both ways, in percent.
    pub jitter_percent: u8,
    /// Time after which a probe without a connection fails, and one without an answer is late, in milliseconds.
    pub timeout_ms: u32,
    /// Time after which a late probe without any answer fails, in milliseconds. If not above `timeout_ms`, late probes fail.
    pub busy_timeout_ms: u32,
    /// Successes in a row that make a backend healthy.
    pub rise: u8,
    /// Failures in a row that make a backend unhealthy.
    pub fall: u8,
    /// Flap damping: whether a backend that falls repeatedly must pass more probes each time.
    pub damping: bool,
    /// Passive checks: whether ICMP errors and refused connections start a probe at once.
    pub signs: bool,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            kind: HealthKind::None,
            port: None,
            via: Via::Unset,
            interval_ms: 1_000,
            jitter_percent: 10,
            timeout_ms: 500,
            busy_timeout_ms: 60_000,
            rise: 2,
            fall: 3,
            damping: true,
            signs: true,
        }
    }
}

impl HealthCheck {
    /// The check of a service that names none.
    pub fn unset() -> Self {
        Self { kind: HealthKind::Unset, ..Self::default() }
    }

    /// Whether the service names no check.
    pub fn is_unset(&self) -> bool {
        self.kind == HealthKind::Unset
    }
}

/// [`HealthCheck`] in its written form: one flat table, so that an unknown key is refused (serde cannot do
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
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    headers: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sni: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    verify: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_cert: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_key: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(default, skip_serializing_if = "Via::is_unset")]
    via: Via,
    #[serde(default = "interval_ms")]
    interval_ms: u32,
    #[serde(default = "jitter_percent")]
    jitter_percent: u8,
    #[serde(default = "timeout_ms")]
    timeout_ms: u32,
    // The default is not written: hosts of versions without this key read the same state.
    #[serde(default = "busy_timeout_ms", skip_serializing_if = "is_busy_timeout_ms")]
    busy_timeout_ms: u32,
    #[serde(default = "rise")]
    rise: u8,
    #[serde(default = "fall")]
    fall: u8,
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    damping: bool,
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    signs: bool,
}

fn yes() -> bool {
    true
}
fn is_yes(value: &bool) -> bool {
    *value
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    None,
    Tcp,
    Tls,
    Http,
    Https,
    Grpc,
    Grpcs,
}

impl Word {
    fn label(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Http => "http",
            Self::Https => "https",
            Self::Grpc => "grpc",
            Self::Grpcs => "grpcs",
        }
    }
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
fn busy_timeout_ms() -> u32 {
    HealthCheck::default().busy_timeout_ms
}
fn is_busy_timeout_ms(value: &u32) -> bool {
    *value == busy_timeout_ms()
}
fn rise() -> u8 {
    HealthCheck::default().rise
}
fn fall() -> u8 {
    HealthCheck::default().fall
}

/// Why the keys of a health check were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HealthError {
    /// A key that does not belong to the kind of check.
    #[error("{key} is for kind {goes} only, but kind is {kind:?}")]
    Key {
        /// The key.
        key: &'static str,
        /// Kinds that the key belongs to.
        goes: &'static str,
        /// Kind of the check.
        kind: &'static str,
    },
    /// Only one of client_cert and client_key was given.
    #[error("client_cert and client_key belong together: give both or neither")]
    Pair,
}

/// Kinds that a key belongs to, and their names in an error.
const HTTP: (&[&str], &str) = (&["http", "https"], "\"http\" or \"https\"");
const GRPC: (&[&str], &str) = (&["grpc", "grpcs"], "\"grpc\" or \"grpcs\"");
const HOSTS: (&[&str], &str) =
    (&["http", "https", "grpc", "grpcs"], "\"http\", \"https\", \"grpc\" or \"grpcs\"");
const TLS: (&[&str], &str) = (&["tls", "https", "grpcs"], "\"tls\", \"https\" or \"grpcs\"");

impl Fields {
    fn check(&self) -> Result<(), HealthError> {
        let kind = self.kind.label();
        for (key, given, (kinds, goes)) in [
            ("path", self.path.is_some(), HTTP),
            ("host", self.host.is_some(), HOSTS),
            ("status", self.status.is_some(), HTTP),
            ("headers", !self.headers.is_empty(), HTTP),
            ("body", self.body.is_some(), HTTP),
            ("service", self.service.is_some(), GRPC),
            ("sni", self.sni.is_some(), TLS),
            ("ca", self.ca.is_some(), TLS),
            ("verify", self.verify.is_some(), TLS),
            ("client_cert", self.client_cert.is_some(), TLS),
            ("client_key", self.client_key.is_some(), TLS),
        ] {
            if given && !kinds.contains(&kind) {
                return Err(HealthError::Key { key, goes, kind });
            }
        }
        if self.client_cert.is_some() != self.client_key.is_some() {
            return Err(HealthError::Pair);
        }
        Ok(())
    }
}

impl TryFrom<Fields> for HealthCheck {
    type Error = HealthError;
    fn try_from(f: Fields) -> Result<Self, HealthError> {
        f.check()?;
        let tls = || TlsCheck {
            sni: f.sni.clone(),
            ca: f.ca.clone(),
            verify: f.verify.unwrap_or(true),
            client: f.client_cert.clone().zip(f.client_key.clone()),
        };
        let http = |tls| {
            HealthKind::Http(HttpCheck {
                path: f.path.clone().unwrap_or_else(|| DEFAULT_PATH.to_owned()),
                host: f.host.clone(),
                status: f.status.unwrap_or(DEFAULT_STATUS),
                headers: f.headers.clone(),
                body: f.body.clone(),
                tls,
            })
        };
        let grpc = |tls| {
            let service = f.service.clone().unwrap_or_default();
            HealthKind::Grpc(GrpcCheck { service, host: f.host.clone(), tls })
        };
        let kind = match f.kind {
            Word::None => HealthKind::None,
            Word::Tcp => HealthKind::Tcp,
            Word::Tls => HealthKind::Tls(tls()),
            Word::Http => http(None),
            Word::Https => http(Some(tls())),
            Word::Grpc => grpc(None),
            Word::Grpcs => grpc(Some(tls())),
        };
        Ok(Self {
            kind,
            port: f.port,
            via: f.via,
            interval_ms: f.interval_ms,
            jitter_percent: f.jitter_percent,
            timeout_ms: f.timeout_ms,
            busy_timeout_ms: f.busy_timeout_ms,
            rise: f.rise,
            fall: f.fall,
            damping: f.damping,
            signs: f.signs,
        })
    }
}

impl From<HealthCheck> for Fields {
    fn from(h: HealthCheck) -> Self {
        let tls = h.kind.tls().cloned();
        let is_tls = tls.is_some();
        let tls = tls.unwrap_or_default();
        let (client_cert, client_key) = tls.client.unzip();
        let mut fields = Self {
            kind: Word::None,
            path: None,
            host: None,
            status: None,
            headers: BTreeMap::new(),
            body: None,
            service: None,
            sni: tls.sni,
            ca: tls.ca,
            verify: Some(false).filter(|_| !tls.verify),
            client_cert,
            client_key,
            port: h.port,
            via: h.via,
            interval_ms: h.interval_ms,
            jitter_percent: h.jitter_percent,
            timeout_ms: h.timeout_ms,
            busy_timeout_ms: h.busy_timeout_ms,
            rise: h.rise,
            fall: h.fall,
            damping: h.damping,
            signs: h.signs,
        };
        match h.kind {
            HealthKind::Unset | HealthKind::None => {}
            HealthKind::Tcp => fields.kind = Word::Tcp,
            HealthKind::Tls(_) => fields.kind = Word::Tls,
            HealthKind::Http(http) => {
                fields.kind = if is_tls { Word::Https } else { Word::Http };
                fields.path = Some(http.path);
                fields.host = http.host;
                fields.status = Some(http.status);
                fields.headers = http.headers;
                fields.body = http.body;
            }
            HealthKind::Grpc(grpc) => {
                fields.kind = if is_tls { Word::Grpcs } else { Word::Grpc };
                fields.service = Some(grpc.service).filter(|s| !s.is_empty());
                fields.host = grpc.host;
            }
        }
        fields
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
            (
                r#"{"kind":"tcp","path":"/"}"#,
                "path is for kind \"http\" or \"https\" only, but kind is \"tcp\"",
            ),
            (r#"{"interval_ms":5}"#, "missing field `kind`"),
            (r#"{"kind":"udp"}"#, "unknown variant `udp`"),
            (r#"{"kind":"http","ca":"/x"}"#, "ca is for kind \"tls\", \"https\" or \"grpcs\" only"),
            (r#"{"kind":"grpc","body":"x"}"#, "body is for kind \"http\" or \"https\" only"),
            (r#"{"kind":"https","service":"x"}"#, "service is for kind \"grpc\" or \"grpcs\" only"),
            (r#"{"kind":"tls","client_cert":"/x"}"#, "client_cert and client_key belong together"),
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
            r#"{"kind":"https","headers":{"x-a":"b"},"body":"ok","sni":"a.example","ca":"/ca.pem"}"#,
            r#"{"kind":"grpc","service":"a.B","host":"h"}"#,
            r#"{"kind":"grpcs","verify":false}"#,
            r#"{"kind":"tls","client_cert":"/c","client_key":"/k"}"#,
            r#"{"kind":"tcp","damping":false,"signs":false}"#,
            r#"{"kind":"http","busy_timeout_ms":0}"#,
        ] {
            let one = parse(json).unwrap();
            assert_eq!(parse(&serde_json::to_string(&one).unwrap()).unwrap(), one);
        }
        assert_eq!(parse(r#"{"kind":"none"}"#).unwrap(), HealthCheck::default());
    }
}
