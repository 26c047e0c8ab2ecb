//! Report of a replica about itself: the answer of `GET /replica` (protocol 1), strictly parsed.
//!
//! Input: bytes from the network, which may be anything. Output: a [`Report`] with every number in
//! bounds, or a [`ReportError`] that names the field. Pure; called by `replica`; `policy` computes a load
//! score from it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// Newest supported protocol. A report without a protocol is of the first.
pub const PROTOCOL: u32 = 1;
/// Largest report, in bytes.
pub const REPORT_LIMIT: usize = 64 * 1024;
/// Largest credible number of requests of a replica: running, waiting or capacity.
pub const MOST_REQUESTS: u32 = 1_000_000;
/// Longest name of a model or version, in bytes.
const LONGEST_NAME: usize = 256;
/// Largest credible rate of a replica, in tokens per second.
const MOST_TOKENS: f64 = 1e9;
/// Largest credible number of answers, or of milliseconds for them.
const MOST_ANSWERS: f64 = 1e15;
/// Largest credible GPU memory of one replica, in bytes.
const MOST_MEMORY: f64 = (1u64 << 50) as f64;

/// Phase in the life of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The model is not loaded yet.
    Loading,
    /// The replica serves.
    Ready,
    /// The replica finishes its requests, and wants no new ones.
    Draining,
    /// The replica cannot serve, and does not expect to recover by itself.
    Failed,
}

/// Readiness of a replica: its reported phase, or that its state is unknown or lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readiness {
    /// No report so far, or the service has no replica source.
    #[default]
    Unknown,
    /// The replica reports that it serves.
    Ready,
    /// The replica reports that its model is not loaded yet: no new flows.
    Loading,
    /// The replica reports that it drains: no new flows, as if the operator had asked for it.
    Draining,
    /// The replica reports that it cannot serve: no new flows.
    Failed,
    /// The stream broke and a probe failed: treated as an unhealthy backend.
    Lost,
}

impl Readiness {
    /// Name of the readiness.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Ready => "ready",
            Self::Loading => "loading",
            Self::Draining => "draining",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }

    /// Whether the replica itself asks for no new flows.
    pub fn declines(self) -> bool {
        matches!(self, Self::Loading | Self::Draining | Self::Failed)
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl From<Phase> for Readiness {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Loading => Self::Loading,
            Phase::Ready => Self::Ready,
            Phase::Draining => Self::Draining,
            Phase::Failed => Self::Failed,
        }
    }
}

/// Memory of a replica's GPUs, summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuMemory {
    /// Memory in use.
    pub used_bytes: u64,
    /// Total memory.
    pub total_bytes: u64,
}

/// State of a replica at one time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Phase.
    pub phase: Phase,
    /// Name of the model, as clients use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Version of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Requests being computed.
    pub running: u32,
    /// Requests waiting to be computed.
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache_usage: Option<f64>,
    /// Requests that can run at once; at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u32>,
    /// Requests that can wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
    /// Tokens generated per second, recently.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// GPU memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<GpuMemory>,
    /// Clock of the replica when it made the report, in milliseconds since 1970 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_ms: Option<u64>,
    /// Requests answered since the start of the replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<Answers>,
}

/// Counters of a replica since its start, by which a roll-out is judged. Optional in protocol 1; a replica without
/// counters sends none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// Requests that have ended.
    pub finished: u64,
    /// Requests that failed because of the replica: not client errors, nor requests that the client gave up.
    pub failed: u64,
    /// Sum of the times from arrival to first token, in milliseconds.
    pub first_token_ms: f64,
    /// Number of these times.
    pub first_tokens: u64,
}

/// Why a report was refused. The last valid report stays in use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// The report is too large.
    #[error("the report has more than {limit} bytes")]
    TooLarge {
        /// Limit in bytes.
        limit: usize,
    },
    /// The report is not JSON.
    #[error("not JSON: {what}")]
    NotJson {
        /// Message of the parser.
        what: String,
    },
    /// The report is JSON, but not an object.
    #[error("not a JSON object, but {found}")]
    NotObject {
        /// What was found instead.
        found: &'static str,
    },
    /// The report has a later protocol.
    #[error("protocol {found} is not supported: this lbd supports up to {PROTOCOL}")]
    Protocol {
        /// Protocol of the report.
        found: String,
    },
    /// A field is missing or out of bounds.
    #[error("{field} is {found}, must be {rule}")]
    Field {
        /// Name of the field.
        field: String,
        /// Value of the field.
        found: String,
        /// Values that the field may have.
        rule: String,
    },
    /// The clock of the report does not advance or went back: an old report, or a replica that hangs.
    #[error("stale: {what}")]
    Stale {
        /// How the clock went wrong.
        what: String,
    },
    /// A line of a metrics page is invalid.
    #[error("line {line} is not a valid metric: {what}")]
    NotMetrics {
        /// Line, from 1.
        line: usize,
        /// What is wrong with the line.
        what: String,
    },
    /// A metrics page lacks a required metric.
    #[error(
        "the page has no metric {name}: check that it is a {kind} page, or set the metric's name with `metrics`"
    )]
    Missing {
        /// Name of the missing metric.
        name: String,
        /// Kind of the page, as configured.
        kind: &'static str,
    },
}

/// Text of a value for an error: short, and without control characters.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    let mut short: String = text.chars().take(40).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(40).is_some() {
        short.push_str("...");
    }
    short
}

fn field(name: &str, found: impl Into<String>, rule: impl Into<String>) -> ReportError {
    ReportError::Field { field: name.to_owned(), found: found.into(), rule: rule.into() }
}

/// A number from 0 to `most`; none where the field is absent or null.
fn number(object: &Map<String, Value>, name: &str, most: f64) -> Result<Option<f64>, ReportError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(n) => bounded(name, n, most).map(Some),
            None => Err(field(name, shown(value), "a number")),
        },
    }
}

/// Checks that `n` is finite and 0 to `most`.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn bounded(what: &str, n: f64, most: f64) -> Result<f64, ReportError> {
    if n.is_finite() && (0.0..=most).contains(&n) {
        return Ok(n);
    }
    Err(field(what, n.to_string(), format!("0 to {most}")))
}

/// Checks a number of requests, and rounds it up.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn requests(what: &str, n: f64) -> Result<u32, ReportError> {
    let n = bounded(what, n, f64::from(MOST_REQUESTS))?;
    // Averaged gauges are not whole; half a request counts as one.
    Ok(n.ceil() as u32)
}

/// Checks a share of the KV cache.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn share(what: &str, n: f64) -> Result<f64, ReportError> {
    // Some servers count blocks twice for a moment, or round.
    bounded(what, n, 1.01).map(|n| n.min(1.0)).map_err(|_| field(what, n.to_string(), "0 to 1"))
}

/// Checks a rate in tokens per second.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn tokens(what: &str, n: f64) -> Result<f64, ReportError> {
    bounded(what, n, MOST_TOKENS)
}

/// Checks used and total GPU memory.
///
/// # Errors
/// [`ReportError::Field`], naming the one that is wrong.
pub fn gpu_memory(used: f64, total: f64) -> Result<GpuMemory, ReportError> {
    let total = bounded("gpu_memory total", total, MOST_MEMORY)?;
    let used = bounded("gpu_memory used", used, total)?;
    Ok(GpuMemory { used_bytes: used as u64, total_bytes: total as u64 })
}

/// Checks that a name can be shown: short, and printable.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn name(what: &str, text: &str) -> Result<String, ReportError> {
    if text.len() <= LONGEST_NAME && !text.chars().any(char::is_control) {
        return Ok(text.to_owned());
    }
    let rule = format!("at most {LONGEST_NAME} bytes without control characters");
    Err(field(what, format!("{} bytes", text.len()), rule))
}

fn text(object: &Map<String, Value>, key: &str) -> Result<Option<String>, ReportError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => name(key, text).map(Some),
        Some(other) => Err(field(key, shown(other), "text")),
    }
}

fn phase(object: &Map<String, Value>) -> Result<Phase, ReportError> {
    let rule = "loading, ready, draining or failed";
    let value = object.get("phase").ok_or_else(|| field("phase", "missing", rule))?;
    serde_json::from_value(value.clone()).map_err(|_| field("phase", shown(value), rule))
}

/// Parses the counters of the replica, if present.
fn answers(object: &Map<String, Value>) -> Result<Option<Answers>, ReportError> {
    if object.get("answers").is_none_or(Value::is_null) {
        return Ok(None);
    }
    let all = part(object, "answers")?;
    let count = |key: &str| -> Result<u64, ReportError> {
        Ok(number(&all, key, MOST_ANSWERS)?.unwrap_or(0.0) as u64)
    };
    let answers = Answers {
        finished: count("finished")?,
        failed: count("failed")?,
        first_token_ms: number(&all, "first_token_ms", MOST_ANSWERS)?.unwrap_or(0.0),
        first_tokens: count("first_tokens")?,
    };
    if answers.failed > answers.finished {
        return Err(field(
            "answers.failed",
            answers.failed.to_string(),
            format!("0 to {}", answers.finished),
        ));
    }
    Ok(Some(answers))
}

/// Returns an object inside the report, or an empty one.
fn part(object: &Map<String, Value>, key: &str) -> Result<Map<String, Value>, ReportError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(part)) => Ok(part.clone()),
        Some(other) => Err(field(key, shown(other), "an object")),
    }
}

impl Report {
    /// Parses a report of protocol 1. Unknown fields are ignored: a later replica may report more.
    ///
    /// # Errors
    /// Names the first problem.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        if bytes.len() > REPORT_LIMIT {
            return Err(ReportError::TooLarge { limit: REPORT_LIMIT });
        }
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| ReportError::NotJson { what: e.to_string() })?;
        let Value::Object(object) = value else {
            let found = match value {
                Value::Array(_) => "an array",
                Value::String(_) => "text",
                _ => "a bare value",
            };
            return Err(ReportError::NotObject { found });
        };
        match object.get("protocol") {
            None => {}
            Some(value) if value.as_u64().is_some_and(|n| (1..=u64::from(PROTOCOL)).contains(&n)) => {}
            Some(other) => return Err(ReportError::Protocol { found: shown(other) }),
        }
        let count = |object: &Map<String, Value>, key: &str| {
            let n = number(object, key, f64::from(MOST_REQUESTS))?;
            n.map(|n| requests(key, n)).transpose()
        };
        let needed = |key: &str| -> Result<u32, ReportError> {
            count(&object, key)?.ok_or_else(|| field(key, "missing", "a number of requests"))
        };
        let room = part(&object, "capacity")?;
        let capacity = match count(&room, "running")? {
            Some(0) => return Err(field("capacity.running", "0", "at least 1")),
            other => other,
        };
        let memory = part(&object, "gpu_memory")?;
        let memory =
            match (number(&memory, "used_bytes", MOST_MEMORY)?, number(&memory, "total_bytes", MOST_MEMORY)?)
            {
                (Some(used), Some(total)) => Some(gpu_memory(used, total)?),
                _ => None,
            };
        let kv = number(&object, "kv_cache_usage", f64::INFINITY)?;
        Ok(Self {
            phase: phase(&object)?,
            model: text(&object, "model")?,
            version: text(&object, "version")?,
            running: needed("running")?,
            waiting: needed("waiting")?,
            kv_cache_usage: kv.map(|n| share("kv_cache_usage", n)).transpose()?,
            capacity,
            queue: count(&room, "waiting")?,
            tokens_per_second: number(&object, "tokens_per_second", MOST_TOKENS)?,
            gpu_memory: memory,
            // A time beyond the year 5000 is not a valid clock.
            time_ms: number(&object, "time_ms", 1e14)?.map(|n| n as u64),
            answers: answers(&object)?,
        })
    }
}

/// Longest time for which a replica's clock may stand still while it reports, in milliseconds.
const STUCK_MS: u64 = 5_000;

/// Monitors the clock of one stream: reports must come in order, and from a clock that runs. The difference
/// to our clock does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockWatch {
    /// Latest `time_ms`, and our clock when it was first seen.
    last: Option<(u64, u64)>,
}

impl ClockWatch {
    /// Checks a report that came at `now_ms` of our own steady clock.
    ///
    /// # Errors
    /// [`ReportError::Stale`].
    pub fn check(&mut self, report: &Report, now_ms: u64) -> Result<(), ReportError> {
        let Some(time) = report.time_ms else { return Ok(()) };
        match self.last {
            Some((last, _)) if time < last => {
                let what = format!("its clock went back by {} ms since the previous report", last - time);
                Err(ReportError::Stale { what })
            }
            Some((last, since)) if time == last => {
                let still = now_ms.saturating_sub(since);
                if still <= STUCK_MS {
                    return Ok(());
                }
                Err(ReportError::Stale { what: format!("its clock has stood still for {still} ms") })
            }
            _ => {
                self.last = Some((time, now_ms));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"protocol":1,"phase":"ready","model":"m","version":"2","running":3,"waiting":1,
        "kv_cache_usage":0.25,"capacity":{"running":8,"waiting":64},"tokens_per_second":71.5,
        "gpu_memory":{"used_bytes":1024,"total_bytes":4096},"time_ms":1795233593000,
        "answers":{"finished":7,"failed":2,"first_token_ms":812.5,"first_tokens":5},"later":{"any":[1]}}"#;

    #[test]
    fn a_good_report_is_read_whole() {
        let report = Report::parse(GOOD.as_bytes()).unwrap();
        let expected = Report {
            phase: Phase::Ready,
            model: Some("m".into()),
            version: Some("2".into()),
            running: 3,
            waiting: 1,
            kv_cache_usage: Some(0.25),
            capacity: Some(8),
            queue: Some(64),
            tokens_per_second: Some(71.5),
            gpu_memory: Some(GpuMemory { used_bytes: 1_024, total_bytes: 4_096 }),
            time_ms: Some(1_795_233_593_000),
            answers: Some(Answers { finished: 7, failed: 2, first_token_ms: 812.5, first_tokens: 5 }),
        };
        assert_eq!(report, expected);
        let least = Report::parse(br#"{"phase":"loading","running":0,"waiting":0,"model":null}"#).unwrap();
        assert_eq!((least.phase, least.capacity, least.model), (Phase::Loading, None, None));
    }

    #[test]
    fn a_lie_is_refused_by_name() {
        let with = |key: &str, value: &str| {
            let mut object: Map<String, Value> = serde_json::from_str(GOOD).unwrap();
            object.insert(key.to_owned(), serde_json::from_str(value).unwrap());
            Report::parse(&serde_json::to_vec(&object).unwrap()).unwrap_err().to_string()
        };
        for (key, value, expected) in [
            ("running", "-3", "running is -3, must be 0 to 1000000"),
            ("waiting", "1e18", "waiting is 1000000000000000000, must be 0 to 1000000"),
            ("waiting", "\"4\"", "waiting is \"4\", must be a number"),
            ("running", "null", "running is missing, must be a number of requests"),
            ("kv_cache_usage", "1.5", "kv_cache_usage is 1.5, must be 0 to 1"),
            ("kv_cache_usage", "-0.1", "kv_cache_usage is -0.1, must be 0 to"),
            ("tokens_per_second", "1e300", "tokens_per_second is 1"),
            ("capacity", "{\"running\":0}", "capacity.running is 0, must be at least 1"),
            ("capacity", "7", "capacity is 7, must be an object"),
            ("gpu_memory", "{\"used_bytes\":2,\"total_bytes\":1}", "gpu_memory used is 2, must be 0 to 1"),
            ("phase", "\"fine\"", "phase is \"fine\", must be loading, ready, draining or failed"),
            ("phase", "null", "phase is null"),
            ("protocol", "2", "protocol 2 is not supported: this lbd supports up to 1"),
            ("protocol", "\"x\"", "protocol \"x\" is not supported"),
            ("model", "\"a\\u001b[2Jb\"", "model is 6 bytes, must be at most 256 bytes without control"),
            ("model", "[\"a\"]", "model is [\"a\"], must be text"),
            ("time_ms", "-1", "time_ms is -1"),
            ("answers", "{\"finished\":1,\"failed\":2}", "answers.failed is 2, must be 0 to 1"),
            ("answers", "{\"finished\":-1}", "finished is -1"),
            ("answers", "[]", "answers is [], must be an object"),
        ] {
            let error = with(key, value);
            assert!(error.starts_with(expected), "{key} = {value}: {error}");
        }
        for (bytes, expected) in [
            (&b"{\"running\": NaN}"[..], "not JSON: "),
            (b"{\"phase\":\"ready\",\"running\":1e999,\"waiting\":0}", "not JSON: number out of range"),
            (b"[]", "not a JSON object, but an array"),
            (b"", "not JSON: EOF"),
            (b"{\"running\":1,\"waiting\":0}", "phase is missing"),
            (b"\xff\xfe", "not JSON: "),
        ] {
            let error = Report::parse(bytes).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let deep = "[".repeat(30_000);
        assert!(Report::parse(deep.as_bytes()).unwrap_err().to_string().contains("recursion limit"));
        let huge = format!("{{\"phase\":\"{}\"}}", "x".repeat(10 << 20));
        assert_eq!(Report::parse(huge.as_bytes()), Err(ReportError::TooLarge { limit: REPORT_LIMIT }));
    }

    #[test]
    fn a_clock_must_run_and_go_forward() {
        let at = |time_ms| Report { time_ms, ..Report::parse(GOOD.as_bytes()).unwrap() };
        let mut watch = ClockWatch::default();
        let mut say = |time, now| watch.check(&at(time), now).map_err(|e| e.to_string());
        assert_eq!(say(None, 0), Ok(()));
        assert_eq!(say(Some(1_000), 10), Ok(()));
        assert_eq!(say(Some(1_000), 20), Ok(()), "two reports in one millisecond");
        assert_eq!(say(Some(1_500), 500), Ok(()));
        assert_eq!(
            say(Some(900), 600),
            Err("stale: its clock went back by 600 ms since the previous report".into())
        );
        assert_eq!(say(Some(1_500), 5_500), Ok(()));
        assert_eq!(say(Some(1_500), 5_501), Err("stale: its clock has stood still for 5001 ms".into()));
        assert_eq!(say(Some(9_000_000), 5_600), Ok(()), "a step forward is allowed");
    }
}
