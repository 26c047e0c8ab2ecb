//! What a replica says of itself: the report of `GET /replica` (protocol 1), strictly read.
//!
//! Input: bytes from the network, which may be anything. Output: a [`Report`] whose every number is in
//! bounds, or a [`ReportError`] that names the field. Pure; called by `replica`, and `policy` makes a load
//! score of it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// Newest protocol that is understood. A report that names none is of the first.
pub const PROTOCOL: u32 = 1;
/// Largest report, in bytes.
pub const REPORT_LIMIT: usize = 64 * 1024;
/// Most requests that a replica may claim to have, running or waiting, or to have room for.
pub const MOST_REQUESTS: u32 = 1_000_000;
/// Longest name of a model or version, in bytes.
const LONGEST_NAME: usize = 256;
/// Fastest believable replica, in tokens per second.
const MOST_TOKENS: f64 = 1e9;
/// Most answers, or milliseconds of them, that are believable.
const MOST_ANSWERS: f64 = 1e15;
/// Largest believable GPU memory of one replica, in bytes.
const MOST_MEMORY: f64 = (1u64 << 50) as f64;

/// Where a replica stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its model is not there yet.
    Loading,
    /// It serves.
    Ready,
    /// It finishes what it has, and wants no more.
    Draining,
    /// It cannot serve, and does not expect to by itself.
    Failed,
}

/// What the policy makes of a replica: its own word, or that it cannot be heard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readiness {
    /// Nothing was heard of it yet, or the service asks for no replica state.
    #[default]
    Unknown,
    /// It says that it serves.
    Ready,
    /// It says that its model is not there yet: no new flows.
    Loading,
    /// It says that it drains: no new flows, as if the operator had asked for it.
    Draining,
    /// It says that it cannot serve: no new flows.
    Failed,
    /// Its stream broke and a probe failed: as good as an unhealthy backend.
    Lost,
}

impl Readiness {
    /// The word for it.
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
    /// In use.
    pub used_bytes: u64,
    /// There is.
    pub total_bytes: u64,
}

/// A replica's state at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Phase.
    pub phase: Phase,
    /// Model, as clients name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The model's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Requests being computed.
    pub running: u32,
    /// Requests waiting to be.
    pub waiting: u32,
    /// Share of the KV cache in use, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache_usage: Option<f64>,
    /// Requests that it can run at once; at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u32>,
    /// Requests that it lets wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
    /// Tokens generated per second, of late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// GPU memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<GpuMemory>,
    /// The replica's own clock when it made the report, in milliseconds since 1970 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_ms: Option<u64>,
    /// What it has answered since it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<Answers>,
}

/// Counters of a replica since it started: by them a roll-out is judged. Optional in protocol 1; a replica that does
/// not count sends none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// Requests that have ended.
    pub finished: u64,
    /// Those of them that failed for a reason of the replica's own: not what the client got wrong or gave up.
    pub failed: u64,
    /// Times from arrival to first token, summed, in milliseconds.
    pub first_token_ms: f64,
    /// How many of those times there are.
    pub first_tokens: u64,
}

/// Why a report was not believed. The last good one stands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// More bytes than a report may have.
    #[error("more than {limit} bytes: a report is refused whole")]
    TooLarge {
        /// Limit.
        limit: usize,
    },
    /// Not JSON.
    #[error("not JSON: {what}")]
    NotJson {
        /// What the parser said.
        what: String,
    },
    /// JSON, and no object.
    #[error("not a JSON object, but {found}")]
    NotObject {
        /// What it is.
        found: &'static str,
    },
    /// A later protocol.
    #[error("protocol {found}: this lbd knows up to {PROTOCOL}")]
    Protocol {
        /// What the report names.
        found: String,
    },
    /// A field that is missing or out of bounds.
    #[error("{field} is {found}, must be {rule}")]
    Field {
        /// Which.
        field: String,
        /// What it is.
        found: String,
        /// What it must be.
        rule: String,
    },
    /// Its clock stands still or went back: an old report, or a replica that hangs.
    #[error("stale: {what}")]
    Stale {
        /// How that shows.
        what: String,
    },
    /// A metrics page that is none.
    #[error("line {line} is no metric: {what}")]
    NotMetrics {
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A metrics page of something else.
    #[error("no metric {name} on the page: is it a {kind} page? give its name with `metrics`")]
    Missing {
        /// What was looked for.
        name: String,
        /// What it was taken for.
        kind: &'static str,
    },
}

/// Text for an error: short, and without what could confuse a terminal.
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

/// A number within bounds, bounds included; none where the field is absent or null.
fn number(object: &Map<String, Value>, name: &str, most: f64) -> Result<Option<f64>, ReportError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(n) => bounded(name, n, most).map(Some),
            None => Err(field(name, shown(value), "a number")),
        },
    }
}

/// `n` if it is finite and 0 to `most`.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn bounded(what: &str, n: f64, most: f64) -> Result<f64, ReportError> {
    if n.is_finite() && (0.0..=most).contains(&n) {
        return Ok(n);
    }
    Err(field(what, n.to_string(), format!("0 to {most}")))
}

/// A count of requests: a whole number in bounds.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn requests(what: &str, n: f64) -> Result<u32, ReportError> {
    let n = bounded(what, n, f64::from(MOST_REQUESTS))?;
    // Averaged gauges are not whole; whoever has half a request has one.
    Ok(n.ceil() as u32)
}

/// A share of the KV cache.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn share(what: &str, n: f64) -> Result<f64, ReportError> {
    // Some servers count blocks twice for a moment, or round.
    bounded(what, n, 1.01).map(|n| n.min(1.0)).map_err(|_| field(what, n.to_string(), "0 to 1"))
}

/// Tokens per second.
///
/// # Errors
/// [`ReportError::Field`], naming `what`.
pub fn tokens(what: &str, n: f64) -> Result<f64, ReportError> {
    bounded(what, n, MOST_TOKENS)
}

/// Used and total GPU memory.
///
/// # Errors
/// [`ReportError::Field`], naming the one that is wrong.
pub fn gpu_memory(used: f64, total: f64) -> Result<GpuMemory, ReportError> {
    let total = bounded("gpu_memory total", total, MOST_MEMORY)?;
    let used = bounded("gpu_memory used", used, total)?;
    Ok(GpuMemory { used_bytes: used as u64, total_bytes: total as u64 })
}

/// A name that may be shown: short, and printable.
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

/// Counters of the replica, if it has them.
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

/// An object inside the report, or an empty one.
fn part(object: &Map<String, Value>, key: &str) -> Result<Map<String, Value>, ReportError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(part)) => Ok(part.clone()),
        Some(other) => Err(field(key, shown(other), "an object")),
    }
}

impl Report {
    /// Reads a report of protocol 1. Fields that are not known are skipped: a later replica may say more.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
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
            // Beyond the year 5000 it is no clock.
            time_ms: number(&object, "time_ms", 1e14)?.map(|n| n as u64),
            answers: answers(&object)?,
        })
    }
}

/// Longest time that a replica's clock may stand still while it reports, in milliseconds.
const STUCK_MS: u64 = 5_000;

/// Watches one stream's clock: reports must come in order, and from a clock that runs. How far that clock
/// is from ours does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockWatch {
    /// Latest `time_ms`, and our clock when it was first seen.
    last: Option<(u64, u64)>,
}

impl ClockWatch {
    /// Takes a report that came at `now_ms` of our own steady clock.
    ///
    /// # Errors
    /// [`ReportError::Stale`].
    pub fn check(&mut self, report: &Report, now_ms: u64) -> Result<(), ReportError> {
        let Some(time) = report.time_ms else { return Ok(()) };
        match self.last {
            Some((last, _)) if time < last => {
                let what = format!("its clock went back by {} ms since the report before", last - time);
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
            ("protocol", "2", "protocol 2: this lbd knows up to 1"),
            ("protocol", "\"x\"", "protocol \"x\": this lbd"),
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
            Err("stale: its clock went back by 600 ms since the report before".into())
        );
        assert_eq!(say(Some(1_500), 5_500), Ok(()));
        assert_eq!(say(Some(1_500), 5_501), Err("stale: its clock has stood still for 5001 ms".into()));
        assert_eq!(say(Some(9_000_000), 5_600), Ok(()), "a step forward is no lie");
    }
}
