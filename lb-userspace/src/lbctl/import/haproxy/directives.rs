//! What sections say beside addresses, servers and checks.

use super::{
    super::Notes,
    syntax::{ProxySection, Statement},
};

/// Directives that only a proxy that reads requests can follow.
const LAYER_7: [&str; 32] = [
    "http-request",
    "http-response",
    "http-after-response",
    "redirect",
    "cookie",
    "appsession",
    "capture",
    "compression",
    "reqadd",
    "reqrep",
    "reqirep",
    "reqdel",
    "reqidel",
    "reqallow",
    "reqdeny",
    "reqideny",
    "reqpass",
    "reqtarpit",
    "rspadd",
    "rsprep",
    "rspirep",
    "rspdel",
    "rspidel",
    "rspdeny",
    "block",
    "errorloc",
    "errorloc302",
    "errorloc303",
    "monitor-uri",
    "filter",
    "use-fcgi-app",
    "stats uri",
];

/// Directives that are kept elsewhere, or whose loss changes nothing for clients and servers.
const HANDLED: [&str; 46] = [
    "mode",
    "bind",
    "server",
    "server-template",
    "default-server",
    "balance",
    "default_backend",
    "use_backend",
    "hash-type",
    "hash-balance-factor",
    "stick",
    "option httpchk",
    "option tcp-check",
    "option ssl-hello-chk",
    "option mysql-check",
    "option pgsql-check",
    "option redis-check",
    "option smtpchk",
    "option ldap-check",
    "option spop-check",
    "option external-check",
    "timeout check",
    "enabled",
    "disabled",
    "description",
    "id",
    "guid",
    "option splice-auto",
    "option splice-request",
    "option splice-response",
    "option tcp-smart-accept",
    "option tcp-smart-connect",
    "option nolinger",
    "option socket-stats",
    "option contstats",
    "option transparent",
    "option http-keep-alive",
    "option http-server-close",
    "option httpclose",
    "option forceclose",
    "option forwardfor",
    "http-reuse",
    "option http-buffer-request",
    "option http-ignore-probes",
    "option prefer-last-server",
    "backlog",
];

/// Directives without a counterpart: how they begin, why, and what to use.
const NO_COUNTERPART: [(&str, &str, &str); 30] = [
    (
        "timeout",
        "the balancer opens and closes no connections",
        "timeouts of clients and workers; tcp_timeout_s and udp_timeout_s say how long flows are remembered",
    ),
    ("maxconn", "a packet cannot wait in a queue", "new_flow_rate of the service"),
    ("fullconn", "a packet cannot wait in a queue", "new_flow_rate of the service"),
    ("rate-limit", "the unit is new flows, per service", "new_flow_rate of the service"),
    ("log", "connections are not logged", "metrics, lbctl flows"),
    ("no log", "connections are not logged", "nothing"),
    ("option tcplog", "connections are not logged", "metrics, lbctl flows"),
    ("option httplog", "requests are not logged", "metrics; the log of the worker"),
    ("option dontlog", "connections are not logged", "nothing"),
    ("option log", "connections are not logged", "nothing"),
    ("option logasap", "connections are not logged", "nothing"),
    ("option clitcpka", "the balancer has no connections to keep alive", "keep-alive of clients and workers"),
    ("option srvtcpka", "the balancer has no connections to keep alive", "keep-alive of clients and workers"),
    ("option tcpka", "the balancer has no connections to keep alive", "keep-alive of clients and workers"),
    ("clitcpka", "the balancer has no connections to keep alive", "keep-alive of clients and workers"),
    ("srvtcpka", "the balancer has no connections to keep alive", "keep-alive of clients and workers"),
    (
        "option redispatch",
        "connections are not retried",
        "nothing: a client that connects again gets a healthy backend",
    ),
    ("retr", "connections are not retried", "nothing: a client that connects again gets a healthy backend"),
    ("option persist", "clients are not bound to a server that is down", "nothing"),
    (
        "option allbackups",
        "there are no servers that wait for the others to fail",
        "another region with the policy active-passive",
    ),
    (
        "tcp-request",
        "conditions are not evaluated, and no bytes are inspected",
        "lbctl guard deny and allow, source_rate, new_flow_rate",
    ),
    ("tcp-response", "no bytes are inspected", "nothing"),
    ("acl", "conditions are not evaluated", "lbctl guard deny and allow for addresses"),
    (
        "stick-table",
        "nothing is counted or remembered by client",
        "source_rate limits new flows of a client; source-hash keeps a client by its address",
    ),
    ("errorfile", "there are no error pages", "error pages of the worker"),
    ("stats", "there is no statistics page", "lbctl status, lbctl stats, and metrics"),
    ("source", "packets keep the client's address", "nat_source in [lbd] for mode nat"),
    ("unique-id", "requests have no ids", "ids of the worker"),
    ("email-alert", "no mail is sent", "alert on metrics"),
    ("dispatch", "it is not a server", "a server line"),
];

/// Notes a section that has nothing to do with services.
pub(super) fn section(line: usize, kind: &str, notes: &mut Notes) {
    let (why, instead) = match kind {
        "global" => ("these are settings of HAProxy itself", "settings of lbd are in [lbd]"),
        "peers" => ("hosts exchange no tables", "nothing: all hosts build equal tables"),
        "resolvers" => ("host names are not looked up", "addresses"),
        "mailers" => ("no mail is sent", "alert on metrics"),
        "program" => ("no programs are started", "a systemd unit"),
        _ => ("it belongs to what only a proxy does", "HAProxy behind this balancer, as workers"),
    };
    notes.add(line, format!("section {kind}"), why, instead);
}

/// Whether a service needs a proxy that reads requests; then its notes have been made.
pub(super) fn layer_7(
    section: &ProxySection,
    is_http: bool,
    own: &[&Statement],
    all: &[&Statement],
    notes: &mut Notes,
) -> bool {
    if !is_http {
        return false;
    }
    let says = format!("{} {}: mode http", section.kind, section.name);
    let is_routed = |s: &&&Statement| s.word(0) == "use_backend" && s.words.len() > 2;
    let is_content = |s: &&&Statement| {
        s.word(0) == "balance"
            && ["uri", "url_param", "hdr", "rdp-cookie"].iter().any(|k| s.word(1).starts_with(k))
    };
    let is_layer_7 =
        |s: &&&Statement| LAYER_7.contains(&s.word(0)) || LAYER_7.contains(&s.keyword().as_str());
    let mut needed: Vec<String> = own
        .iter()
        .chain(all)
        .filter(|s| is_layer_7(s) || is_routed(s) || is_content(s))
        .map(|s| format!("{} in line {}", s.word(0), s.line))
        .collect();
    needed.dedup();
    if needed.is_empty() {
        notes.add(
            section.line,
            says,
            "requests are not read: each connection goes to one worker as a whole",
            "it was kept as TCP; a worker gets all requests of a connection",
        );
        return false;
    }
    let more = needed.len().saturating_sub(3);
    needed.truncate(3);
    let list = needed.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() };
    notes.add(
        section.line,
        says,
        format!("it reads and changes requests ({list}), which only a proxy can"),
        "it was left out; let HAProxy or Envoy run behind this balancer, as workers",
    );
    true
}

/// Notes statements that have no counterpart.
pub(super) fn others(all: &[&Statement], notes: &mut Notes) {
    for statement in all {
        let keyword = statement.keyword();
        let first = statement.word(0);
        let is_handled = HANDLED.contains(&keyword.as_str())
            || HANDLED.contains(&first)
            || ["http-check", "tcp-check", "no"].contains(&first);
        let known = NO_COUNTERPART.iter().find(|(start, ..)| keyword.starts_with(start));
        match known {
            _ if is_handled => {}
            Some(("timeout", why, instead)) => notes.add(statement.line, "timeout", *why, *instead),
            Some((_, why, instead)) => notes.add(statement.line, keyword, *why, *instead),
            None if LAYER_7.contains(&first) => {
                notes.add(
                    statement.line,
                    first,
                    "requests are not read",
                    "HAProxy or Envoy behind this balancer, as workers",
                );
            }
            None => notes.add(
                statement.line,
                keyword,
                "it has no counterpart",
                "check whether the worker needs it",
            ),
        }
    }
}
