//! `server` lines.

use super::{
    super::{
        Notes, Unreadable,
        assemble::{MemberDraft, ServiceDraft},
        ipvs::split_address,
    },
    check::CheckSettings,
    syntax::Statement,
};
use crate::desired::model::{BackendState, OnDown, Ports};

/// Options of a server without a value.
const FLAGS: [&str; 32] = [
    "agent-check",
    "allow-0rtt",
    "backup",
    "check",
    "check-send-proxy",
    "check-ssl",
    "check-via-socks4",
    "disabled",
    "enabled",
    "force-sslv3",
    "force-tlsv10",
    "force-tlsv11",
    "force-tlsv12",
    "force-tlsv13",
    "no-agent-check",
    "no-backup",
    "no-check",
    "no-check-ssl",
    "no-send-proxy",
    "no-send-proxy-v2",
    "no-ssl",
    "no-sslv3",
    "no-tfo",
    "no-tls-tickets",
    "no-verifyhost",
    "non-stick",
    "send-proxy",
    "send-proxy-v2",
    "send-proxy-v2-ssl",
    "send-proxy-v2-ssl-cn",
    "ssl",
    "stick",
];

/// Options that have no counterpart: why, and what to use.
const NO_COUNTERPART: [(&str, &str, &str); 18] = [
    (
        "maxconn",
        "a packet cannot wait in a queue",
        "new_flow_rate of the service, or load_cap with source-hash",
    ),
    (
        "minconn",
        "a packet cannot wait in a queue",
        "new_flow_rate of the service, or load_cap with source-hash",
    ),
    ("maxqueue", "a packet cannot wait in a queue", "new_flow_rate of the service"),
    (
        "agent-check",
        "there is no agent that is asked for weights",
        "replica state, which reports load and readiness",
    ),
    ("fastinter", "the interval of checks does not depend on their results", "a shorter interval_ms"),
    ("downinter", "the interval of checks does not depend on their results", "interval_ms"),
    (
        "send-proxy",
        "packets are forwarded as they are",
        "nothing: the worker sees the client's address (not in mode nat); switch the PROXY protocol off there",
    ),
    (
        "send-proxy-v2",
        "packets are forwarded as they are",
        "nothing: the worker sees the client's address (not in mode nat); switch the PROXY protocol off there",
    ),
    (
        "send-proxy-v2-ssl",
        "packets are forwarded as they are",
        "nothing: the worker sees the client's address (not in mode nat); switch the PROXY protocol off there",
    ),
    (
        "send-proxy-v2-ssl-cn",
        "packets are forwarded as they are",
        "nothing: the worker sees the client's address (not in mode nat); switch the PROXY protocol off there",
    ),
    ("check-send-proxy", "checks do not use the PROXY protocol", "switch it off on the worker"),
    ("track", "a server has a check of its own", "the check of the service"),
    ("source", "packets keep the client's address; mode nat has nat_source in [lbd]", "nat_source"),
    ("cookie", "cookies are not read", "source-hash keeps a client by its address"),
    ("redir", "nothing is redirected", "let the worker redirect"),
    ("error-limit", "errors are not counted", "nothing: refused connections start a check at once"),
    ("on-error", "errors of applications are not seen", "nothing: refused connections start a check at once"),
    ("socks4", "there is no proxy to the servers", "mode nat, or a tunnel"),
];

/// A server's options: name and value.
type ServerOptions = Vec<(String, String)>;

/// Splits the options after a server's address, or those of `default-server`.
pub(super) fn options(words: &[String]) -> ServerOptions {
    let mut found = ServerOptions::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        if FLAGS.contains(&word.as_str()) {
            found.push((word.clone(), String::new()));
            continue;
        }
        let value = words.next().cloned().unwrap_or_default();
        if word == "source" && words.peek().is_some_and(|next| *next == "usesrc" || *next == "interface") {
            words.nth(1);
        }
        found.push((word.clone(), value));
    }
    found
}

/// The last value of an option, unless a later `no-` form takes it back.
pub(super) fn option<'o>(options: &'o ServerOptions, name: &str) -> Option<&'o str> {
    let at = options.iter().rposition(|(key, _)| key == name)?;
    let no = format!("no-{name}");
    let is_taken_back = options[at..].iter().any(|(key, _)| *key == no);
    (!is_taken_back).then(|| options[at].1.as_str())
}

/// Time in milliseconds: a number with a unit, milliseconds without one.
pub(super) fn milliseconds(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().ok()?;
    let factor = match &text[digits.len()..] {
        "us" => return Some(number / 1_000),
        "" | "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// Adds the server of a line to a service.
pub(super) fn add(
    statement: &Statement,
    defaults: &ServerOptions,
    checks: &CheckSettings,
    draft: &mut ServiceDraft,
    notes: &mut Notes,
) -> Result<(), Unreadable> {
    let line = statement.line;
    let (name, text) = (statement.word(1), statement.word(2));
    if text.is_empty() {
        let at = (line, statement.column);
        return Err(Unreadable::new(
            at,
            "a server without an address",
            "server NAME ADDRESS[:PORT] [OPTION ...]",
        ));
    }
    let Some((address, port)) = address(text, draft.service.port, line, notes) else { return Ok(()) };
    let mut all = defaults.clone();
    all.extend(options(&statement.words[3..]));
    for (key, why, instead) in NO_COUNTERPART {
        if option(&all, key).is_some() {
            notes.add(line, format!("server: {key}"), why, instead);
        }
    }
    if option(&all, "backup").is_some() {
        notes.add(
            line,
            format!("server {name}: backup"),
            "there are no servers that wait for the others to fail",
            "another region with the policy active-passive; the server was left out",
        );
        return Ok(());
    }
    let mut member = MemberDraft::new(line, address, port);
    member.name = Some(name.to_owned());
    if let Some(weight) = option(&all, "weight") {
        match weight.parse() {
            Ok(weight) => member.weight = weight,
            Err(_) => notes.add(line, format!("weight {weight}"), "it is not a number", "weight 1 is used"),
        }
    }
    if all.iter().rev().find(|(k, _)| k == "disabled" || k == "enabled").is_some_and(|(k, _)| k == "disabled")
    {
        member.state = BackendState::Down;
    }
    if let Some(time) = option(&all, "slowstart").and_then(milliseconds) {
        let seconds = u32::try_from(time.div_ceil(1_000)).unwrap_or(u32::MAX).min(86_400);
        draft.service.slow_start_s = draft.service.slow_start_s.max(seconds);
    }
    if option(&all, "on-marked-down") == Some("shutdown-sessions") {
        draft.service.on_down = OnDown::Reset;
    }
    if option(&all, "ssl").is_some() && !checks.is_tls_accepted {
        notes.add(
            line,
            "server: ssl",
            "the balancer opens no connections, so it cannot encrypt them",
            "let the clients speak TLS, or the workers plain text",
        );
    }
    member.health = checks.of_server(&all, port, draft, line, notes);
    draft.members.push(member);
    Ok(())
}

/// Address and port of a server; a note if they are not numbers.
fn address(
    text: &str,
    own: Ports,
    line: usize,
    notes: &mut Notes,
) -> Option<(std::net::IpAddr, Option<u16>)> {
    let plain = text.trim_start_matches("ipv4@").trim_start_matches("ipv6@").trim_start_matches("tcp@");
    if plain.starts_with(['/', '@']) || plain.starts_with("unix@") || plain.starts_with("abns@") {
        notes.add(
            line,
            format!("server at {text}"),
            "packets cannot go to a Unix socket",
            "let the worker listen on an address",
        );
        return None;
    }
    let (host, port) = split(plain);
    let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse() else {
        let (why, instead) = if text.contains('$') {
            (
                "the value of the variable is not in the text",
                "replace variables by their values, for example with envsubst",
            )
        } else {
            (
                "host names are not looked up",
                "write the address; a host name with several addresses becomes several backends",
            )
        };
        notes.add(line, format!("server at {text}"), why, instead);
        return None;
    };
    let port = match port {
        None | Some("" | "0") => None,
        Some(port) => {
            let base = match own {
                Ports::One(own) => i64::from(own),
                _ => 0,
            };
            // A signed port is relative to the frontend's.
            let number =
                port.parse::<i64>().ok().map(|n| if port.starts_with(['+', '-']) { base + n } else { n });
            match number.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0) {
                Some(port) => Some(port),
                None => {
                    notes.add(
                        line,
                        format!("server port {port}"),
                        "it is not a port",
                        "the frontend's port is used",
                    );
                    None
                }
            }
        }
    };
    Some((address, port))
}

/// Splits an address; in IPv6 without brackets the port follows the last colon.
pub(super) fn split(text: &str) -> (&str, Option<&str>) {
    match split_address(text) {
        Some((host, port)) if !host.contains(':') || text.starts_with('[') => (host, port),
        _ => match text.rsplit_once(':') {
            Some((host, port)) if host.parse::<std::net::Ipv6Addr>().is_ok() || host == ":" => {
                (host, Some(port))
            }
            _ => (text, None),
        },
    }
}
