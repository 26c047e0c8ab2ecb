//! The screen in a terminal of memory.

use super::{
    model::{Page, Top, TopAction, TopSample},
    view,
};
use crate::serve::api::types::{BackendInfo, ServiceInfo, Stats, Status};
use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn status() -> Status {
    let value = json!({
        "healthy": false,
        "problems": ["1 backend is unhealthy", "another one"],
        "version": "0.1.0", "abi": 1, "pid": 1, "uptime_s": 192,
        "store": {"engine": "redb", "place": "/f", "connected": true, "since_ms": 1, "contact_ms": 1},
        "revision": {"number": 11, "author": "ann", "time_ms": 1, "message": "m"},
        "applied": {"revision": 11, "slots_changed": 0, "took_us": 1},
        "interfaces": [], "services": 2,
        "backends": {"total": 3, "healthy": 2, "unhealthy": 1, "unknown": 0, "draining": 1, "down": 0},
        "unhealthy": [], "draining": [], "no_backend": [], "panic": [], "unresolved": [], "reasons": [], "room": []
    });
    serde_json::from_value(value).unwrap()
}

fn spec(port: u16, backends: &[&str]) -> Value {
    let all: serde_json::Map<_, _> =
        backends.iter().enumerate().map(|(i, name)| ((*name).to_owned(), spec_of(i))).collect();
    json!({"vip": "10.0.0.1", "port": port, "protocol": "tcp", "backends": all})
}

fn spec_of(i: usize) -> Value {
    json!({"address": format!("10.1.0.{}", i + 1), "state": if i == 1 { "draining" } else { "up" }})
}

/// A reading at `second`: chat gets 1,000 packets a second and dns 10.
fn sample(began: Instant, second: u64) -> TopSample {
    let counters = |per_s: u64| json!({"packets": per_s * second, "bytes": per_s * second * 1_250, "flows": per_s * second / 10});
    let merged = |mut a: Value, b: Value| {
        a.as_object_mut().unwrap().extend(b.as_object().unwrap().clone());
        a
    };
    let service = |name: &str, port, backends: &[&str], eligible, per_s| {
        let status = json!({"table_size": 1, "eligible": eligible, "panic": false, "transition_slots": 0});
        json!({"name": name, "spec": spec(port, backends), "status": merged(status, counters(per_s))})
    };
    let services: Vec<ServiceInfo> = serde_json::from_value(json!([
        service("chat", 443, &["gpu-1", "gpu-2"], 1, 1_000),
        service("dns", 53, &["n1"], 1, 10),
    ]))
    .unwrap();
    let backend = |i: usize, name: &str, health: &str, per_s| {
        let status = json!({"health": health, "health_since_ms": 1, "slots": 1, "table_size": 2});
        let mut status = merged(status, counters(per_s));
        if i == 1 {
            status["drain"] = json!({"flows_left": 3, "deadline_s": 70});
        }
        json!({"service": "chat", "name": name, "spec": spec_of(i), "status": status})
    };
    let backends: Vec<BackendInfo> = serde_json::from_value(json!([
        backend(0, "gpu-1", "healthy", 900),
        backend(1, "gpu-2", "unhealthy", 100),
    ]))
    .unwrap();
    let counted = |service: &str, name: &str, per_s| {
        merged(json!({"service": service, "backend": name}), counters(per_s))
    };
    let stats: Stats = serde_json::from_value(json!({
        "time_ms": 1,
        "backends": [counted("chat", "gpu-1", 900), counted("chat", "gpu-2", 100), counted("dns", "n1", 10)],
        "reasons": [
            {"reason": "no_backend", "fate": "drop", "packets": 50 * second, "about": "No backend takes new flows"},
            {"reason": "not_ip", "fate": "pass", "packets": 7, "about": "Neither IPv4 nor IPv6"},
        ],
    }))
    .unwrap();
    let replicas = serde_json::from_value(json!([
        {"service": "chat", "backend": "gpu-1", "source": "stream", "readiness": "ready", "since_ms": 1,
         "report": {"phase": "ready", "running": 30, "waiting": 4}},
    ]))
    .unwrap();
    let at = began + Duration::from_secs(second);
    TopSample { at, status: status(), services, backends, stats, replicas }
}

fn top() -> Top {
    let (mut top, began) = (Top::new(None), Instant::now());
    for second in 0..4 {
        top.add(sample(began, second));
    }
    top
}

fn drawn(top: &mut Top, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(frame, top)).unwrap();
    view::text(terminal.backend().buffer()).lines().map(str::to_owned).collect()
}

fn press(top: &mut Top, keys: &str) -> TopAction {
    let mut action = TopAction::None;
    for c in keys.chars() {
        let code = match c {
            '\n' => KeyCode::Enter,
            '\x1b' => KeyCode::Esc,
            'v' => KeyCode::Down,
            other => KeyCode::Char(other),
        };
        action = top.key(KeyEvent::new(code, KeyModifiers::NONE));
    }
    action
}

#[test]
fn services_at_80_columns() {
    let screen = drawn(&mut top(), 80, 24);
    assert_eq!(screen.len(), 24, "{screen:#?}");
    let shown: Vec<&str> = screen.iter().map(String::as_str).filter(|line| !line.is_empty()).collect();
    assert_eq!(
        shown,
        [
            "lbd 0.1.0  up 3m12s  revision 11  unhealthy",
            "2 services  3 backends, 1 unhealthy, 1 draining",
            "all services: 101 new flows/s, 1.0k packets/s, 10.1 Mbit/s",
            "! (1 more) 1 backend is unhealthy",
            "SERVICE        UP    FLOWS/S   PKT/S         RATE    LOAD HISTORY    NOTE",
            "chat           1/2       100    1.0k  10.0 Mbit/s    30+4 ███        1 draining",
            "dns            1/1         1      10 100.0 kbit/s       - ███",
            "drops: no_backend 50/s",
            "q quit  ? help  Enter backends  d drops  / filter  s sort: packets  p pause",
        ]
    );
}

#[test]
fn a_service_opens_and_closes() {
    let mut top = top();
    assert_eq!(press(&mut top, "\n"), TopAction::Read);
    assert_eq!(top.service().map(ToString::to_string).as_deref(), Some("chat"));
    let screen = drawn(&mut top, 100, 24).join("\n");
    assert!(screen.contains("gpu-1") && screen.contains("healthy") && screen.contains("30+4"), "{screen}");
    assert!(screen.contains("draining") && screen.contains("3 flows, 1m10s"), "{screen}");
    assert!(screen.contains("Esc services"), "{screen}");
    press(&mut top, "\x1b");
    assert_eq!(*top.page(), Page::Services);
    press(&mut top, "d");
    let screen = drawn(&mut top, 80, 24).join("\n");
    assert!(screen.contains("no_backend") && screen.contains("not_ip") && screen.contains("150"), "{screen}");
}

#[test]
fn rows_are_sorted_filtered_and_selected() {
    let mut top = top();
    let names = |top: &Top| top.rows().into_iter().map(|row| row.key.0).collect::<Vec<_>>();
    assert_eq!(names(&top), ["chat", "dns"]);
    press(&mut top, "r");
    assert_eq!(names(&top), ["dns", "chat"]);
    press(&mut top, "r/DN");
    assert_eq!(names(&top), ["dns"]);
    assert!(drawn(&mut top, 80, 24).join("\n").contains("filter: DN_"));
    press(&mut top, "\n");
    assert!(drawn(&mut top, 80, 24).join("\n").contains("filter \"DN\""));
    press(&mut top, "\x1b");
    assert_eq!(names(&top), ["chat", "dns"]);
    press(&mut top, "vvvv");
    assert_eq!(top.selected, 1);
    assert_eq!(press(&mut top, "\n"), TopAction::Read);
    assert_eq!(top.service().map(ToString::to_string).as_deref(), Some("dns"));
    assert_eq!(press(&mut top, "q"), TopAction::Quit);
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(top.key(control_c), TopAction::Quit);
}

/// No size of a terminal makes it panic, and small ones still show rows and the help line.
#[test]
fn any_size_is_drawn() {
    let mut top = top();
    for page in ["", "\n", "\x1bd", "?"] {
        press(&mut top, page);
        for (width, height) in [(1, 1), (20, 3), (40, 8), (80, 24), (300, 100)] {
            drawn(&mut top, width, height);
        }
    }
    let mut top = self::top();
    let small = drawn(&mut top, 40, 8);
    assert!(
        small.iter().any(|line| line.contains("chat")) && small.last().unwrap().contains("q quit"),
        "{small:#?}"
    );
    let mut empty = Top::new(None);
    drawn(&mut empty, 80, 24);
}

#[test]
fn an_error_and_a_restart_of_the_counters_are_shown_as_such() {
    let (mut top, began) = (Top::new(None), Instant::now());
    top.add(sample(began, 5));
    assert!(drawn(&mut top, 80, 24).join("\n").contains(" - "), "no rate is known yet");
    let mut restarted = sample(began, 1);
    restarted.at = began + Duration::from_secs(6);
    top.add(restarted);
    assert_eq!(top.total().unwrap().packets, 0.0);
    top.fail("cannot reach lbd\x1b[2J".to_owned());
    let screen = drawn(&mut top, 80, 24).join("\n");
    assert!(screen.contains("! cannot reach lbd") && !screen.contains('\x1b'), "{screen}");
}

#[test]
fn sparklines_are_parts_of_the_largest_value() {
    assert_eq!(view::sparkline(&[0, 1, 50, 100], 12), "▁▂▅█");
    assert_eq!(view::sparkline(&[7, 0, 0], 2), "▁▁");
    assert_eq!(view::sparkline(&[], 12), "");
}
