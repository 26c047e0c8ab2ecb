//! `bind` lines.

use super::{
    super::{ImportOptions, Notes, Unreadable},
    server::split,
    syntax::Statement,
};
use crate::desired::model::{Ports, Protocol};
use std::net::IpAddr;

/// What one address of a `bind` line becomes.
pub(super) struct BindPlace {
    pub vip: IpAddr,
    pub ports: Ports,
    pub protocol: Protocol,
    /// Whether TLS ends there.
    pub is_tls: bool,
}

/// Options of `bind` that have no counterpart: why, and what to use.
const NO_COUNTERPART: [(&str, &str, &str); 4] = [
    ("accept-proxy", "packets have no PROXY header to read", "let the worker read it"),
    ("accept-netscaler-cip", "packets have no header of NetScaler to read", "let the worker read it"),
    ("maxconn", "the number of connections is not limited", "new_flow_rate of the service"),
    ("user", "there is no socket", "nothing"),
];

/// Reads a line.
pub(super) fn places(
    statement: &Statement,
    options: &ImportOptions,
    notes: &mut Notes,
) -> Result<Vec<BindPlace>, Unreadable> {
    let line = statement.line;
    let is_tls = statement.words.iter().any(|w| w == "ssl");
    if statement.words.len() < 2 {
        return Err(Unreadable::new(
            (line, statement.column),
            "a bind without an address",
            "bind ADDRESS:PORT [OPTION ...]",
        ));
    }
    if is_tls {
        notes.add(
            line,
            "bind: ssl",
            "TLS does not end at the balancer, it passes through",
            "move the certificates to the workers, which must accept TLS on this port",
        );
    }
    for (key, why, instead) in NO_COUNTERPART {
        if statement.words.iter().skip(2).any(|w| w == key) {
            notes.add(line, format!("bind: {key}"), why, instead);
        }
    }
    let mut found = Vec::new();
    for text in statement.word(1).split(',').filter(|text| !text.is_empty()) {
        if let Some(place) = place(statement, text, options, notes)? {
            found.push(BindPlace { is_tls, ..place });
        }
    }
    Ok(found)
}

fn place(
    statement: &Statement,
    text: &str,
    options: &ImportOptions,
    notes: &mut Notes,
) -> Result<Option<BindPlace>, Unreadable> {
    let line = statement.line;
    let says = format!("bind {text}");
    let (family, rest) = text.split_once('@').unwrap_or(("", text));
    let is_socket = rest.starts_with('/') || text.starts_with('/');
    if is_socket || ["unix", "uxst", "uxdg", "abns", "abnsz", "fd", "sockpair", "rhttp"].contains(&family) {
        notes.add(line, says, "packets do not come through a socket of this host", "keep HAProxy for it");
        return Ok(None);
    }
    if text.contains('$') {
        notes.add(
            line,
            says,
            "the value of the variable is not in the text",
            "replace variables by their values, for example with envsubst",
        );
        return Ok(None);
    }
    let protocol =
        if family.starts_with("quic") || family.starts_with("udp") { Protocol::Udp } else { Protocol::Tcp };
    if family.starts_with("quic") {
        notes.add(
            line,
            says.clone(),
            "QUIC does not end at the balancer, it passes through",
            "move the certificates to the workers; quic routes by connection id if they issue QUIC-LB ids",
        );
    }
    let (host, port) = split(rest);
    let Some(port) = port.filter(|port| !port.is_empty()) else {
        let what = format!("{text:?} has no port");
        return Err(Unreadable::new((line, statement.column), what, "bind ADDRESS:PORT, or *:PORT"));
    };
    let Ok(ports) = port.parse::<Ports>() else {
        if port.starts_with(|c: char| c.is_ascii_alphabetic()) {
            notes.add(line, says, "the names of ports are not looked up", "write the number of the port");
            return Ok(None);
        }
        let what = format!("{port:?} is not a port");
        return Err(Unreadable::new((line, statement.column), what, "a port from 1 to 65535, or FIRST-LAST"));
    };
    let is_v6_only = matches!(host, "::" | ":") || family.ends_with('6') && matches!(host, "" | "*");
    let vip = match host {
        "" | "*" | "0.0.0.0" | "::" | ":" => match options.vip {
            Some(vip) if is_v6_only && vip.is_ipv4() => {
                notes.add(
                    line,
                    says,
                    "it is for IPv6, and --vip is an IPv4 address",
                    "import again with --vip and an IPv6 address",
                );
                return Ok(None);
            }
            Some(vip) => vip,
            None => {
                notes.add(line, says, "a service has one address", "import with --vip ADDRESS");
                return Ok(None);
            }
        },
        host => match host.split('%').next().unwrap_or(host).parse() {
            Ok(vip) => vip,
            Err(_) => {
                notes.add(line, says, "host names are not looked up", "write the address");
                return Ok(None);
            }
        },
    };
    Ok(Some(BindPlace { vip, ports, protocol, is_tls: false }))
}
