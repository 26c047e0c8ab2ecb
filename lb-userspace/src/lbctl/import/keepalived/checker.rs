//! Checkers of real servers.

use super::{
    super::{Notes, assemble::ServiceDraft},
    syntax::Node,
};
use crate::desired::model::{HealthCheck, HealthKind, HttpCheck, TlsCheck};

/// Time between checks, in seconds, unless delay_loop says another.
const DELAY_LOOP_S: f64 = 60.0;
/// Timeout of a connection, in seconds, unless connect_timeout says another.
const CONNECT_TIMEOUT_S: f64 = 5.0;

/// Whether a setting of a virtual server is handled, or says nothing that could be lost.
pub(super) fn of_server(keyword: &str) -> bool {
    let handled = [
        "lb_algo",
        "lvs_sched",
        "lb_kind",
        "lvs_method",
        "protocol",
        "persistence_timeout",
        "persistence_granularity",
        "ops",
        "quorum",
        "real_server",
        "sh-port",
        "sh-fallback",
        "mh-port",
        "mh-fallback",
        "hashed",
        "ip_family",
        "delay_loop",
        "virtualhost",
        "inhibit_on_failure",
        "weight",
        "retry",
        "connect_timeout",
        "nat_mask",
    ];
    handled.contains(&keyword)
}

/// Whether a setting of a real server is handled.
pub(super) fn of_real(keyword: &str) -> bool {
    let handled = [
        "weight",
        "lvs_method",
        "lb_kind",
        "inhibit_on_failure",
        "virtualhost",
        "delay_loop",
        "retry",
        "connect_timeout",
    ];
    handled.contains(&keyword) || keyword.ends_with("_CHECK") || keyword.ends_with("_GET")
}

/// The check of a real server. All of its checkers would have to pass; one is kept.
pub(super) fn health(
    server: &Node,
    real: &Node,
    port: Option<u16>,
    draft: &ServiceDraft,
    notes: &mut Notes,
) -> Option<HealthCheck> {
    let is_checker = |n: &&Node| n.keyword().ends_with("_CHECK") || n.keyword().ends_with("_GET");
    let mut kept: Option<HealthCheck> = None;
    for checker in real.children.iter().filter(is_checker) {
        let Some(found) = one(server, real, checker, port, draft, notes) else { continue };
        match &kept {
            None => kept = Some(found),
            Some(_) => notes.add(
                checker.line,
                format!("{} as a second check", checker.keyword()),
                "a service has one health check",
                "the first check of the server is used",
            ),
        }
    }
    kept
}

fn one(
    server: &Node,
    real: &Node,
    checker: &Node,
    port: Option<u16>,
    draft: &ServiceDraft,
    notes: &mut Notes,
) -> Option<HealthCheck> {
    let keyword = checker.keyword();
    let kind = match keyword {
        "TCP_CHECK" => HealthKind::Tcp,
        "HTTP_GET" | "SSL_GET" => http(server, real, checker, notes)?,
        "SMTP_CHECK" => {
            notes.add(
                checker.line,
                keyword,
                "the dialogue of SMTP is not checked",
                "a check that a TCP connection opens is used",
            );
            HealthKind::Tcp
        }
        _ => {
            let (why, instead) = match keyword {
                "MISC_CHECK" => (
                    "no scripts are run",
                    "a check of kind http, grpc, tls or tcp; let the worker answer it by the script",
                ),
                "DNS_CHECK" => (
                    "there is no check by a DNS query",
                    "a check of kind tcp on port 53, or http on another port",
                ),
                "UDP_CHECK" => {
                    ("there is no check by a datagram", "a check of kind http or tcp on another port")
                }
                "PING_CHECK" => ("there is no check by ICMP echo", "a check of kind tcp"),
                _ => ("it is not a check that is known", "a check of kind http, grpc, tls or tcp"),
            };
            notes.add(checker.line, keyword, why, instead);
            return None;
        }
    };
    let mut check = HealthCheck { kind, rise: 1, ..HealthCheck::default() };
    timing(server, real, checker, &mut check, notes);
    // An option may be in a block of its own, host or connection.
    let nested = |key: &str| {
        let inside = checker.children.iter().filter(|n| !n.children.is_empty() && n.keyword() != "url");
        checker.child(key).or_else(|| inside.rev().find_map(|n| n.child(key)))
    };
    if let Some(child) = nested("connect_port")
        && let Ok(number) = child.word(1).parse::<u16>()
    {
        let own = match draft.service.port {
            crate::desired::model::Ports::One(own) => Some(own),
            _ => None,
        };
        check.port = Some(number).filter(|n| Some(*n) != port.or(own));
    } else if !matches!(draft.service.port, crate::desired::model::Ports::One(_)) {
        check.port = port;
    }
    for (key, why) in [
        ("connect_ip", "the check goes to the backend's own address"),
        ("bindto", "the source address of checks is the route's"),
        ("bind_if", "checks follow the routes"),
        ("bind_port", "the source port of checks is chosen by the system"),
        ("fwmark", "checks carry no mark"),
    ] {
        if let Some(child) = nested(key).filter(|n| key != "connect_ip" || n.word(1) != real.word(1)) {
            notes.add(
                child.line,
                format!("{keyword} {}", child.words.join(" ")),
                why,
                "nothing, or a check on another port",
            );
        }
    }
    Some(check)
}

fn seconds(node: Option<&Node>) -> Option<f64> {
    let text = node?.word(1);
    text.trim_end_matches('s').parse::<f64>().ok().filter(|s| s.is_finite() && *s >= 0.0)
}

fn milliseconds(seconds: f64, least: u32) -> u32 {
    (seconds * 1_000.0).round().clamp(f64::from(least), 86_400_000.0) as u32
}

fn timing(server: &Node, real: &Node, checker: &Node, check: &mut HealthCheck, notes: &mut Notes) {
    let of = |key: &str| [checker, real, server].into_iter().find_map(|n| n.child(key));
    let interval = seconds(of("delay_loop")).unwrap_or(DELAY_LOOP_S);
    check.interval_ms = milliseconds(interval, 10);
    check.timeout_ms = milliseconds(seconds(of("connect_timeout")).unwrap_or(CONNECT_TIMEOUT_S), 1);
    let default = if checker.keyword().ends_with("_GET") { 3 } else { 1 };
    let retries =
        of("retry").or_else(|| checker.child("nb_get_retry")).and_then(|n| n.word(1).parse::<u32>().ok());
    check.fall = retries.unwrap_or(default).saturating_add(1).min(255) as u8;
    if let Some(child) = checker.child("delay_before_retry")
        && seconds(Some(child)) != Some(interval)
    {
        notes.add(
            child.line,
            "delay_before_retry",
            "a failed check is repeated after the interval of checks",
            "a shorter interval_ms finds failures sooner",
        );
    }
    if let Some(child) = checker.child("warmup").filter(|n| n.word(1) != "0") {
        notes.add(
            child.line,
            "warmup",
            "the first checks are spread by jitter",
            "jitter_percent of [service.health]",
        );
    }
}

fn http(server: &Node, real: &Node, checker: &Node, notes: &mut Notes) -> Option<HealthKind> {
    let urls: Vec<&Node> = checker.children.iter().filter(|n| n.keyword() == "url").collect();
    if let Some(second) = urls.get(1) {
        notes.add(
            second.line,
            "a second url of a check",
            "a check requests one path",
            "the first url is used",
        );
    }
    let empty = Node::default();
    let url = urls.first().copied().unwrap_or(&empty);
    let mut http = HttpCheck::default();
    let path = url.child("path").map_or("", |n| n.word(1));
    if !path.is_empty() {
        http.path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    }
    let host = [url, checker, real, server].into_iter().find_map(|n| n.child("virtualhost"));
    http.host = host.map(|n| n.word(1).to_owned()).filter(|h| !h.is_empty());
    if let Some(child) = url.child("status_code") {
        status(child, &mut http, notes);
    }
    if let Some(child) = url.child("digest") {
        notes.add(
            child.line,
            "digest",
            "the whole response is not hashed",
            "body looks for text in the response",
        );
    }
    if let Some(child) = url.child("regex") {
        let text = child.word(1);
        let is_plain = !text.chars().any(|c| r"\.*+?()[]{}|^$".contains(c));
        if is_plain && (1..=4_096).contains(&text.len()) && url.child("regex_no_match").is_none() {
            http.body = Some(text.to_owned());
        } else {
            notes.add(
                child.line,
                format!("regex {text}"),
                "the body is not matched with a regular expression",
                "body looks for plain text in the response",
            );
        }
    }
    if let Some(child) = url.child("regex_no_match") {
        notes.add(
            child.line,
            "regex_no_match",
            "the body is not matched with a regular expression",
            "body looks for plain text in the response",
        );
    }
    if checker.keyword() == "SSL_GET" {
        let sni = checker.child("enable_sni").or_else(|| url.child("enable_sni")).and(http.host.clone());
        // keepalived does not verify certificates.
        http.tls = Some(TlsCheck { sni, verify: false, ..TlsCheck::default() });
    }
    Some(HealthKind::Http(http))
}

fn status(node: &Node, http: &mut HttpCheck, notes: &mut Notes) {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for text in &node.words[1..] {
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        match (low.parse(), high.parse()) {
            (Ok(low), Ok(high)) if (100..=599).contains(&low) && low <= high && high <= 599 => {
                ranges.push((low, high))
            }
            _ => notes.add(
                node.line,
                format!("status_code {text}"),
                "it is not a status code",
                "the code was left out",
            ),
        }
    }
    ranges.sort_unstable();
    let (Some(first), Some(last)) = (ranges.first(), ranges.iter().map(|r| r.1).max()) else { return };
    http.status = (first.0, last);
    if ranges.windows(2).any(|pair| pair[0].1 + 1 < pair[1].0) {
        notes.add(
            node.line,
            node.words.join(" "),
            "a check accepts one range of status codes",
            format!("status = [{}, {last}] is used", first.0),
        );
    }
}
