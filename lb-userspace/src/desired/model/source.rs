//! Source of a service's replica state: the worker's own stream, or a server's metrics page.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, str::FromStr};

/// Kind of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// `GET /replica`, as an event stream or as JSON.
    Stream,
    /// Metrics page of vLLM.
    Vllm,
    /// Metrics page of SGLang.
    Sglang,
    /// Metrics page of Text Generation Inference.
    Tgi,
    /// Metrics page of Triton, with or without TensorRT-LLM.
    Triton,
    /// Any metrics page; `metrics` names its metrics.
    Custom,
}

impl SourceKind {
    /// Name of the kind in configuration files.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Tgi => "tgi",
            Self::Triton => "triton",
            Self::Custom => "custom",
        }
    }
}

/// Quantity that a metric reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Requests being computed.
    Running,
    /// Requests waiting.
    Waiting,
    /// Share of the KV cache in use, 0 to 1.
    KvCacheUsage,
    /// Requests that can run at once.
    Capacity,
    /// Tokens generated so far: a counter.
    TokensTotal,
    /// Tokens generated per second: a gauge.
    TokensPerSecond,
    /// GPU memory in use, in bytes.
    GpuMemoryUsed,
    /// Total GPU memory, in bytes.
    GpuMemoryTotal,
    /// 0 while the model sleeps.
    Awake,
}

impl Quantity {
    /// All quantities.
    pub const ALL: [Self; 9] = [
        Self::Running,
        Self::Waiting,
        Self::KvCacheUsage,
        Self::Capacity,
        Self::TokensTotal,
        Self::TokensPerSecond,
        Self::GpuMemoryUsed,
        Self::GpuMemoryTotal,
        Self::Awake,
    ];

    /// Name of the quantity in configuration files.
    pub fn label(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::KvCacheUsage => "kv_cache_usage",
            Self::Capacity => "capacity",
            Self::TokensTotal => "tokens_total",
            Self::TokensPerSecond => "tokens_per_second",
            Self::GpuMemoryUsed => "gpu_memory_used",
            Self::GpuMemoryTotal => "gpu_memory_total",
            Self::Awake => "awake",
        }
    }
}

/// A metric, as in PromQL: `name` or `name{label="value",other=value}`. A label with an empty value may be missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selector {
    /// Name, with its `_total` or `_sum`.
    pub name: String,
    /// Labels that a sample must have.
    pub labels: Vec<(String, String)>,
}

/// A text that is not a valid [`Selector`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid metric: write name, or name{{label=\"value\"}}")]
pub struct SelectorError {
    text: String,
}

/// Whether a text is a valid name of a metric (with colons) or of a label.
fn is_name(text: &str, colon: bool) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_' || (colon && c == ':');
    text.starts_with(first) && text.chars().all(|c| first(c) || c.is_ascii_digit())
}

impl FromStr for Selector {
    type Err = SelectorError;
    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let bad = || SelectorError { text: text.chars().take(80).collect() };
        let (name, rest) = text.trim().split_once('{').map_or((text.trim(), None), |(n, r)| (n, Some(r)));
        let mut labels = Vec::new();
        if let Some(rest) = rest {
            let inside = rest.trim_end().strip_suffix('}').ok_or_else(bad)?;
            for pair in inside.split(',').map(str::trim).filter(|p| !p.is_empty()) {
                let (label, value) = pair.split_once('=').ok_or_else(bad)?;
                let value = value.trim();
                let quoted = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
                let value = quoted.unwrap_or(value);
                if !is_name(label.trim(), false) || value.contains(['"', '{', '}', '\\']) {
                    return Err(bad());
                }
                labels.push((label.trim().to_owned(), value.to_owned()));
            }
        }
        if !is_name(name.trim(), true) || text.len() > 512 {
            return Err(bad());
        }
        Ok(Self { name: name.trim().to_owned(), labels })
    }
}

impl TryFrom<String> for Selector {
    type Error = SelectorError;
    fn try_from(text: String) -> Result<Self, SelectorError> {
        text.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.to_string()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for (i, (label, value)) in self.labels.iter().enumerate() {
            write!(f, "{}{label}=\"{value}\"", if i == 0 { "{" } else { "," })?;
        }
        if self.labels.is_empty() { Ok(()) } else { f.write_str("}") }
    }
}

/// Settings of the source of a service's replica state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaSource {
    /// Kind of the source.
    pub kind: SourceKind,
    /// Port of the worker; the service's port if none (required for `any` and ranges).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Path and query; `/replica` or `/metrics` if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Time between two requests where there is no stream, in milliseconds.
    #[serde(default = "interval_ms")]
    pub interval_ms: u32,
    /// Time after which a request fails, in milliseconds; a stream fails when it is silent for this time and three intervals.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u32,
    /// Requests that a replica runs at once, where it does not report that itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u32>,
    /// Names of metrics that differ from the usual ones.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<Quantity, Selector>,
}

fn interval_ms() -> u32 {
    1_000
}

fn timeout_ms() -> u32 {
    1_000
}

impl ReplicaSource {
    /// A source with default settings.
    pub fn new(kind: SourceKind) -> Self {
        Self {
            kind,
            port: None,
            path: None,
            interval_ms: interval_ms(),
            timeout_ms: timeout_ms(),
            capacity: None,
            metrics: BTreeMap::new(),
        }
    }

    /// Path and query of the requests.
    pub fn path(&self) -> &str {
        let usual = if self.kind == SourceKind::Stream { "/replica" } else { "/metrics" };
        self.path.as_deref().unwrap_or(usual)
    }

    /// Calls `refuse` for each rule that these settings break. `own_port`: whether the service has exactly one port.
    pub fn check(&self, own_port: bool, refuse: &mut dyn FnMut(String)) {
        if self.port.is_none() && !own_port {
            refuse("replica needs a port, because the service has more than one".to_owned());
        }
        if self.port == Some(0) {
            refuse("replica: port is 0: give 1 to 65535".to_owned());
        }
        if !(10..=3_600_000).contains(&self.interval_ms) || !(1..=3_600_000).contains(&self.timeout_ms) {
            refuse("replica: interval_ms must be 10 to 3600000, timeout_ms 1 to 3600000".to_owned());
        }
        if self.capacity.is_some_and(|n| n == 0 || n > super::MOST_REQUESTS) {
            refuse(format!("replica: capacity must be 1 to {}", super::MOST_REQUESTS));
        }
        let path = self.path();
        if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) {
            let what = "must start with '/' and contain neither blanks nor control characters";
            refuse(format!("replica: path {path:?} {what}"));
        }
        if self.kind == SourceKind::Stream && !self.metrics.is_empty() {
            refuse("replica: metrics is for a metrics page, but kind is \"stream\"".to_owned());
        }
        let loads = [Quantity::Running, Quantity::Waiting, Quantity::KvCacheUsage];
        if self.kind == SourceKind::Custom && !loads.iter().any(|q| self.metrics.contains_key(q)) {
            let needed = "metrics must name at least one of running, waiting and kv_cache_usage";
            refuse(format!("replica: kind is \"custom\", so {needed}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_parsed_and_printed_alike() {
        for (text, shown) in [
            ("vllm:num_requests_running", "vllm:num_requests_running"),
            (" a{b=c, d=\"e f\",} ", "a{b=\"c\",d=\"e f\"}"),
            ("a{}", "a"),
            ("q{priority=\"\"}", "q{priority=\"\"}"),
        ] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.to_string(), shown);
            assert_eq!(shown.parse::<Selector>().unwrap(), selector);
        }
        for bad in ["", "{a=b}", "a{b", "a{b}", "1a", "a b", "a{b=\"c\\\"\"}", "a{b=c}d", "a{1=c}"] {
            assert!(bad.parse::<Selector>().is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_checked_and_settings_round_trip() {
        let parse = |json: &str| serde_json::from_str::<ReplicaSource>(json).map_err(|e| e.to_string());
        let all = r#"{"kind":"custom","port":9,"path":"/m","interval_ms":200,"timeout_ms":100,"capacity":4,
            "metrics":{"running":"r","kv_cache_usage":"k{t=\"x\"}"}}"#;
        let source = parse(all).unwrap();
        assert_eq!(parse(&serde_json::to_string(&source).unwrap()).unwrap(), source);
        assert_eq!(parse(r#"{"kind":"vllm"}"#).unwrap(), ReplicaSource::new(SourceKind::Vllm));
        for (json, expected) in [
            (r#"{"kind":"ollama"}"#, "unknown variant `ollama`"),
            (r#"{"kind":"vllm","prot":1}"#, "unknown field `prot`"),
            (r#"{"kind":"vllm","metrics":{"runing":"a"}}"#, "unknown variant `runing`"),
            (r#"{"kind":"vllm","metrics":{"running":"a b"}}"#, "\"a b\" is not a valid metric: write name"),
        ] {
            assert!(parse(json).unwrap_err().contains(expected), "{json}: {:?}", parse(json));
        }
    }

    #[test]
    fn rules_say_what_is_wrong() {
        let broken = |json: &str, own_port| {
            let mut found = Vec::new();
            let source: ReplicaSource = serde_json::from_str(json).unwrap();
            source.check(own_port, &mut |what| found.push(what));
            found
        };
        assert!(broken(r#"{"kind":"stream"}"#, true).is_empty());
        for (json, own_port, expected) in [
            (r#"{"kind":"stream"}"#, false, "needs a port"),
            (r#"{"kind":"stream","port":0}"#, true, "port is 0"),
            (r#"{"kind":"stream","interval_ms":1}"#, true, "interval_ms must be 10"),
            (r#"{"kind":"stream","path":"x"}"#, true, "must start with '/'"),
            (r#"{"kind":"stream","metrics":{"running":"a"}}"#, true, "is for a metrics page"),
            (r#"{"kind":"custom","metrics":{"capacity":"a"}}"#, true, "at least one of running"),
            (r#"{"kind":"vllm","capacity":0}"#, true, "capacity must be 1 to"),
        ] {
            let found = broken(json, own_port);
            assert!(found.len() == 1 && found[0].contains(expected), "{json}: {found:?}");
        }
    }
}
