//! Health checks: `option httpchk`, `http-check`, `option tcp-check` and their relatives.

use super::{
    super::{Notes, assemble::ServiceDraft},
    server::{milliseconds, option},
    syntax::Statement,
};
use crate::desired::model::{HealthCheck, HealthKind, HttpCheck, Ports, TlsCheck};

/// What the sections of a service say about checks.
pub(super) struct CheckSettings {
    kind: HealthKind,
    port: Option<u16>,
    timeout_ms: Option<u64>,
    connect_ms: Option<u64>,
    /// No check that could be kept.
    is_unknown: bool,
    /// Whether the frontend accepts TLS, which then passes through to the worker.
    pub is_tls_accepted: bool,
}

impl CheckSettings {
    /// Reads statements: those of the defaults first.
    pub fn read(statements: &[&Statement], is_tls_accepted: bool, notes: &mut Notes) -> Self {
        let mut settings = Self {
            kind: HealthKind::Tcp,
            port: None,
            timeout_ms: None,
            connect_ms: None,
            is_unknown: false,
            is_tls_accepted,
        };
        let mut http = HttpCheck { status: (200, 399), ..HttpCheck::default() };
        for statement in statements {
            let line = statement.line;
            match (statement.word(0), statement.word(1)) {
                ("option", "httpchk") => {
                    settings.is_unknown = false;
                    request(statement, &mut http, notes);
                    settings.kind = HealthKind::Http(http.clone());
                }
                ("option", "tcp-check") => settings.kind = HealthKind::Tcp,
                ("option", "ssl-hello-chk") => {
                    settings.kind = HealthKind::Tls(TlsCheck { verify: false, ..TlsCheck::default() });
                }
                (
                    "option",
                    kind @ ("mysql-check" | "pgsql-check" | "redis-check" | "smtpchk" | "ldap-check"
                    | "spop-check"),
                ) => {
                    notes.add(
                        line,
                        format!("option {kind}"),
                        "this protocol is not checked",
                        "a check that a TCP connection opens is used",
                    );
                    settings.kind = HealthKind::Tcp;
                }
                ("option", "external-check") => {
                    notes.add(
                        line,
                        "option external-check",
                        "no scripts are run",
                        "a check of kind http; let the worker answer it by the script",
                    );
                    settings.is_unknown = true;
                }
                ("http-check", _) => {
                    settings.http_check(statement, &mut http, notes);
                    if let HealthKind::Http(kind) = &mut settings.kind {
                        kind.clone_from(&http);
                    }
                }
                ("tcp-check", "connect") => {
                    settings.connect(statement);
                    if statement.words.iter().any(|w| w == "ssl") && settings.kind == HealthKind::Tcp {
                        settings.kind = HealthKind::Tls(TlsCheck { verify: false, ..TlsCheck::default() });
                    }
                }
                ("tcp-check", "comment") => {}
                ("tcp-check", verb) => notes.add(
                    line,
                    format!("tcp-check {verb}"),
                    "the bytes of an answer are not checked",
                    "a check that a TCP connection opens is used; http and grpc check answers",
                ),
                ("timeout", "check") => settings.timeout_ms = milliseconds(statement.word(2)),
                ("timeout", "connect") => settings.connect_ms = milliseconds(statement.word(2)),
                _ => {}
            }
        }
        settings
    }

    fn connect(&mut self, statement: &Statement) {
        if let Some(at) = statement.words.iter().position(|w| w == "port") {
            self.port = statement.word(at + 1).parse().ok().or(self.port);
        }
    }

    fn http_check(&mut self, statement: &Statement, http: &mut HttpCheck, notes: &mut Notes) {
        let line = statement.line;
        match statement.word(1) {
            "send" => {
                let mut words = statement.words[2..].iter();
                while let Some(word) = words.next() {
                    let mut value = || words.next().cloned().unwrap_or_default();
                    match word.as_str() {
                        "meth" => method(&value(), line, notes),
                        "uri" => path(&value(), http),
                        "uri-lf" | "body" | "body-lf" => {
                            value();
                            notes.add(
                                line,
                                format!("http-check send {word}"),
                                "the request is a plain GET",
                                "path of [service.health]",
                            );
                        }
                        "hdr" => {
                            let (name, value) = (value(), value());
                            header(&name, &value, http, line, notes);
                        }
                        "ver" => {
                            value();
                        }
                        _ => {}
                    }
                }
            }
            "expect" => expect(statement, http, notes),
            "connect" => {
                self.connect(statement);
                if statement.words.iter().any(|w| w == "ssl") {
                    let sni = statement
                        .words
                        .iter()
                        .position(|w| w == "sni")
                        .map(|at| statement.word(at + 1).to_owned());
                    http.tls = Some(TlsCheck { verify: false, sni, ..TlsCheck::default() });
                }
            }
            "comment" => {}
            "disable-on-404" => notes.add(
                line,
                "http-check disable-on-404",
                "a check says healthy or not",
                "replica state, or lbctl backend drain",
            ),
            other => notes.add(line, format!("http-check {other}"), "it has no counterpart", "nothing"),
        }
    }

    /// The check of one server.
    pub fn of_server(
        &self,
        options: &Vec<(String, String)>,
        port: Option<u16>,
        draft: &ServiceDraft,
        line: usize,
        notes: &mut Notes,
    ) -> Option<HealthCheck> {
        option(options, "check")?;
        if self.is_unknown {
            return None;
        }
        let mut kind = self.kind.clone();
        let is_tls = option(options, "check-ssl").is_some()
            || option(options, "ssl").is_some() && option(options, "no-check-ssl").is_none();
        let sni = option(options, "check-sni").map(str::to_owned);
        if is_tls {
            let verify = option(options, "verify") != Some("none");
            let ca = option(options, "ca-file").filter(|file| *file != "@system-ca").map(Into::into);
            let tls = TlsCheck { sni: sni.clone(), ca, verify, client: None };
            kind = match kind {
                HealthKind::Http(http) => HealthKind::Http(HttpCheck { tls: Some(tls), ..http }),
                HealthKind::Tcp => HealthKind::Tls(tls),
                other => other,
            };
        }
        if let Some(address) = option(options, "addr") {
            notes.add(
                line,
                format!("server: addr {address}"),
                "the check goes to the backend's own address",
                "a check on another port",
            );
        }
        if option(options, "observe") == Some("layer7") {
            notes.add(
                line,
                "server: observe layer7",
                "answers of applications are not seen",
                "nothing: refused connections start a check at once",
            );
        }
        let inter = option(options, "inter").and_then(milliseconds).unwrap_or(2_000).clamp(10, 86_400_000);
        let timeout = self.timeout_ms.unwrap_or_else(|| self.connect_ms.map_or(inter, |t| t.min(inter)));
        let count = |name: &str, default: u8| {
            option(options, name)
                .and_then(|n| n.parse::<u32>().ok())
                .map_or(default, |n| n.clamp(1, 255) as u8)
        };
        let given = option(options, "port").and_then(|p| p.parse().ok()).or(self.port);
        let own = match draft.service.port {
            Ports::One(own) => Some(own),
            _ => None,
        };
        let port = match own {
            Some(own) => given.filter(|p| *p != port.unwrap_or(own)),
            None => given.or(port),
        };
        Some(HealthCheck {
            kind,
            port: port.filter(|p| *p > 0),
            interval_ms: inter as u32,
            timeout_ms: timeout.clamp(1, 86_400_000) as u32,
            rise: count("rise", 2),
            fall: count("fall", 3),
            ..HealthCheck::default()
        })
    }
}

fn method(method: &str, line: usize, notes: &mut Notes) {
    if method != "GET" {
        notes.add(line, format!("a check with the method {method}"), "a check is a GET", "GET is used");
    }
}

fn path(text: &str, http: &mut HttpCheck) {
    if text.starts_with('/') {
        text.clone_into(&mut http.path);
    } else if let Some((_, rest)) = text.split_once("://") {
        // An absolute form: its host is the request's.
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        http.path = format!("/{path}");
        http.host = Some(host.to_owned());
    }
}

fn header(name: &str, value: &str, http: &mut HttpCheck, line: usize, notes: &mut Notes) {
    match name.to_ascii_lowercase().as_str() {
        "" => {}
        "host" => http.host = Some(value.to_owned()),
        "connection" | "user-agent" | "content-length" | "transfer-encoding" => {
            notes.add(line, format!("header {name} of the check"), "lbd sets this header itself", "nothing");
        }
        _ => {
            http.headers.insert(name.to_owned(), value.to_owned());
        }
    }
}

/// `option httpchk [METHOD] [URI [VERSION]]`; the version may have headers behind line breaks.
fn request(statement: &Statement, http: &mut HttpCheck, notes: &mut Notes) {
    let line = statement.line;
    match &statement.words[2..] {
        [] => method("OPTIONS", line, notes),
        [uri] => {
            method("OPTIONS", line, notes);
            path(uri, http);
        }
        [verb, uri, version @ ..] => {
            method(verb, line, notes);
            path(uri, http);
            for text in version.join(" ").split(['\r', '\n']).skip(1) {
                if let Some((name, value)) = text.split_once(':') {
                    header(name.trim(), value.trim(), http, line, notes);
                }
            }
        }
    }
}

/// `http-check expect [!] KIND VALUE`.
fn expect(statement: &Statement, http: &mut HttpCheck, notes: &mut Notes) {
    let line = statement.line;
    let kinds = ["status", "rstatus", "string", "rstring", "hdr", "fhdr"];
    let at = statement.words.iter().skip(2).position(|w| kinds.contains(&w.as_str())).map(|at| at + 2);
    let is_negated = statement.words.iter().any(|w| w == "!");
    let says = statement.words.join(" ");
    let Some(at) = at.filter(|_| !is_negated) else {
        notes.add(
            line,
            says,
            "a check expects status codes and a text",
            "status and body of [service.health]",
        );
        return;
    };
    let value = statement.rest(at + 1);
    match statement.word(at) {
        "status" => {
            let ranges: Vec<(u16, u16)> = value
                .split([',', ' '])
                .filter_map(|text| {
                    let (low, high) = text.split_once('-').unwrap_or((text, text));
                    Some((low.parse().ok()?, high.parse().ok()?))
                })
                .collect();
            let (Some(low), Some(high)) =
                (ranges.iter().map(|r| r.0).min(), ranges.iter().map(|r| r.1).max())
            else {
                notes.add(line, says, "it is not a list of status codes", "status of [service.health]");
                return;
            };
            http.status = (low, high);
            if ranges.len() > 1 {
                notes.add(
                    line,
                    says,
                    "a check accepts one range of status codes",
                    format!("status = [{low}, {high}] is used"),
                );
            }
        }
        "rstatus" => {
            // The usual forms: a class or several classes of codes.
            let digits = value.trim_start_matches('^').trim_start_matches(['(', '[']);
            let classes: Vec<u16> = digits
                .split(['|', ')', ']', '.', '['])
                .flat_map(|part| part.chars().next().and_then(|c| c.to_digit(10)))
                .map(|d| d as u16)
                .filter(|d| (1..=5).contains(d))
                .collect();
            let (low, high) =
                (classes.iter().min().copied().unwrap_or(2), classes.iter().max().copied().unwrap_or(3));
            http.status = (low * 100, high * 100 + 99);
            notes.add(
                line,
                says,
                "a check accepts one range of status codes",
                format!("status = [{}, {}] is used", http.status.0, http.status.1),
            );
        }
        "string" if (1..=4_096).contains(&value.len()) => http.body = Some(value),
        _ => notes.add(
            line,
            says,
            "the answer is not matched with a regular expression",
            "body looks for plain text in the response",
        ),
    }
}
