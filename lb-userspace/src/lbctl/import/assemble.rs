//! Builds a valid desired state of the drafts that a format's reader made.

use super::{ImportOptions, Notes};
use crate::desired::model::{
    Backend, BackendState, Desired, ForwardingMode, HealthCheck, HealthKind, Invalid, Name, Ports, Protocol,
    Service, Subject,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// A service as the text describes it.
#[derive(Clone, Debug)]
pub(super) struct ServiceDraft {
    /// Line of the text.
    pub line: usize,
    /// Name, of any characters.
    pub name: String,
    /// The service without backends and name.
    pub service: Service,
    /// Backends in the order of the text.
    pub members: Vec<MemberDraft>,
}

/// A backend as the text describes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MemberDraft {
    /// Line of the text.
    pub line: usize,
    /// Name, of any characters; the address if none.
    pub name: Option<String>,
    /// Address of the worker.
    pub address: IpAddr,
    /// Port that the worker listens on; the service's if none.
    pub port: Option<u16>,
    /// Weight; 0 takes no new flows.
    pub weight: u32,
    /// Administrative state.
    pub state: BackendState,
    /// Check of this worker.
    pub health: Option<HealthCheck>,
}

impl ServiceDraft {
    /// A service with nothing but defaults, named after its address if it has no name.
    pub fn new(line: usize, name: Option<String>, vip: IpAddr, port: Ports, protocol: Protocol) -> Self {
        let name = name.unwrap_or_else(|| format!("{protocol}-{vip}-{port}"));
        let bare = serde_json::json!({ "vip": vip, "port": port, "protocol": protocol });
        let service = serde_json::from_value(bare).expect("these are all required fields");
        Self { line, name, service, members: Vec::new() }
    }
}

impl MemberDraft {
    pub fn new(line: usize, address: IpAddr, port: Option<u16>) -> Self {
        let (name, health, state) = (None, None, BackendState::Up);
        Self { line, name, address, port, weight: 1, state, health }
    }
}

/// Makes a valid name of any text: other characters become `-`, and what is too long is cut.
fn valid_name(text: &str, is_taken: impl Fn(&Name) -> bool) -> Name {
    let mut clean: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' })
        .take(63)
        .collect();
    if !clean.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        clean = format!("x{clean}");
    }
    for number in 1_u32.. {
        let suffix = if number == 1 { String::new() } else { format!("-{number}") };
        let kept: String = clean.chars().take(63 - suffix.len()).collect();
        if let Ok(name) = format!("{kept}{suffix}").parse::<Name>()
            && !is_taken(&name)
        {
            return name;
        }
    }
    unreachable!("there are more numbers than names")
}

/// Lines of what is in the state, for the notes of broken rules.
#[derive(Default)]
struct LinesOf {
    services: BTreeMap<Name, usize>,
    backends: BTreeMap<(Name, Name), usize>,
}

/// Names services and backends, applies the options, and removes with a note what breaks a rule.
pub(super) fn assemble(drafts: Vec<ServiceDraft>, options: &ImportOptions, notes: &mut Notes) -> Desired {
    let mut desired = Desired::default();
    let mut lines = LinesOf::default();
    for mut draft in drafts {
        if let Some(mode) = options.mode {
            draft.service.mode = mode;
        }
        settle_ports(&mut draft, notes);
        settle_health(&mut draft, notes);
        let name = valid_name(&format!("{}{}", options.name_prefix, draft.name), |name| {
            desired.services.contains_key(name)
        });
        lines.services.insert(name.clone(), draft.line);
        let mut service = draft.service;
        let mut seen = BTreeSet::new();
        for member in draft.members {
            if !seen.insert(member.address) {
                notes.add(
                    member.line,
                    format!("second server with address {}", member.address),
                    "each backend of a service has an address of its own, and one port",
                    "run the processes on different addresses, or give the other port a service of its own",
                );
                continue;
            }
            let text = member.name.clone().unwrap_or_else(|| member.address.to_string());
            let backend = valid_name(&text, |name| service.backends.contains_key(name));
            lines.backends.insert((name.clone(), backend.clone()), member.line);
            service.backends.insert(backend, finished(member, notes));
        }
        desired.services.insert(name, service.into());
    }
    remove_invalid(&mut desired, &lines, notes);
    desired
}

fn finished(member: MemberDraft, notes: &mut Notes) -> Backend {
    let MemberDraft { line, address, port, mut weight, mut state, .. } = member;
    if weight == 0 {
        // In the other products, weight 0 keeps established connections.
        weight = 1;
        if state == BackendState::Up {
            state = BackendState::Draining;
        }
    }
    if weight > 65_535 {
        notes.add(line, format!("weight {weight}"), "the largest weight is 65535", "65535 is used");
        weight = 65_535;
    }
    Backend { address, port, weight, state, seat: None, server_id: None, region: None, zone: None }
}

/// Keeps ports of workers where the mode can change ports.
fn settle_ports(draft: &mut ServiceDraft, notes: &mut Notes) {
    let own = draft.service.port;
    for member in &mut draft.members {
        let Some(port) = member.port else { continue };
        if own == Ports::One(port) {
            member.port = None;
        } else if draft.service.mode != ForwardingMode::Nat {
            let mode = mode_word(draft.service.mode);
            notes.add(
                member.line,
                format!("server port {port} for the service port {own}"),
                format!("mode {mode} does not change ports"),
                format!("let the worker listen on port {own}, or import with --mode nat"),
            );
            member.port = None;
        } else if !matches!(own, Ports::One(_)) {
            notes.add(
                member.line,
                format!("server port {port} for the service ports {own}"),
                "a service with several ports keeps the port of each packet",
                "let the worker listen on these ports, or make one service per port",
            );
            member.port = None;
        }
    }
}

fn mode_word(mode: ForwardingMode) -> String {
    serde_json::to_value(mode).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Makes the checks of the backends one check of the service.
fn settle_health(draft: &mut ServiceDraft, notes: &mut Notes) {
    let mut kinds: Vec<(&HealthCheck, usize)> = Vec::new();
    for check in draft.members.iter().filter_map(|m| m.health.as_ref()) {
        match kinds.iter_mut().find(|(other, _)| *other == check) {
            Some((_, count)) => *count += 1,
            None => kinds.push((check, 1)),
        }
    }
    let most = kinds.iter().map(|(_, count)| *count).max();
    let Some(mut chosen) = kinds.iter().find(|(_, n)| Some(*n) == most).map(|(check, _)| (*check).clone())
    else {
        return;
    };
    for member in &draft.members {
        match &member.health {
            Some(check) if *check == chosen => {}
            Some(_) => notes.add(
                member.line,
                "a health check that differs from that of the other servers",
                "a service has one health check for all its backends",
                "the most frequent check is used; give this server a service of its own if it needs another",
            ),
            None => notes.add(
                member.line,
                "a server without a health check beside servers with one",
                "a service has one health check for all its backends",
                "the server is checked like the others",
            ),
        }
    }
    if chosen.port.is_none()
        && chosen.kind != HealthKind::None
        && !matches!(draft.service.port, Ports::One(_))
    {
        notes.add(
            draft.line,
            "a health check without a port",
            format!("the service has the ports {}, and a check needs one", draft.service.port),
            "set health.port of the service",
        );
        chosen = HealthCheck::default();
    }
    draft.service.health = chosen;
}

/// Removes what breaks a rule until nothing does. Each round removes something.
fn remove_invalid(desired: &mut Desired, lines: &LinesOf, notes: &mut Notes) {
    loop {
        let found = desired.check();
        if found.is_empty() {
            return;
        }
        for invalid in found {
            remove(desired, &invalid, lines, notes);
        }
    }
}

fn remove(desired: &mut Desired, invalid: &Invalid, lines: &LinesOf, notes: &mut Notes) {
    let why = invalid.to_string();
    match invalid.subject() {
        Subject::Backend(service, backend) => {
            let line = lines.backends.get(&(service.clone(), backend.clone())).copied().unwrap_or(1);
            let of = desired.service_mut(service).and_then(|s| s.backends.remove(backend));
            let Some(of) = of else { return };
            notes.add(line, format!("server {}", of.address), why, "the server was left out");
        }
        Subject::Service(name) => {
            let line = lines.services.get(name).copied().unwrap_or(1);
            let Some(service) = desired.service_mut(name) else { return };
            let mut unchecked = service.clone();
            unchecked.health = HealthCheck::default();
            let mut problems = Vec::new();
            unchecked.check(name, &mut problems);
            let is_check = why.contains("health") && problems.is_empty();
            if is_check && service.health != unchecked.health {
                notes.add(line, "health check", why, "the check was left out; set [service.health]");
                *service = unchecked;
            } else {
                let at = format!("service {} {}", service.vip, service.port);
                desired.services.remove(name);
                notes.add(line, at, why, "the service was left out");
            }
        }
        Subject::Region(_) | Subject::Lists => {}
    }
}
