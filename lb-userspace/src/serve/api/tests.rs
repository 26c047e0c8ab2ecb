//! The API over a real socket and store, with an engine in memory.

use super::{Control, Peer, memory::MemoryEngine, routes, types::*};
use crate::{
    desired::{
        model::Desired,
        store::{Commit, RedbStore, Retire},
    },
    lbctl::client::{ApiClient, ClientError},
    observed::health::HealthRegistry,
};
use axum::extract::connect_info::MockConnectInfo;
use reqwest::Method;
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

pub(super) struct Bed {
    _directory: tempfile::TempDir,
    pub(super) engine: Arc<MemoryEngine>,
    pub(super) control: Arc<Control>,
    pub(super) client: ApiClient,
}

pub(super) async fn bed(may_write: bool) -> Bed {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(RedbStore::open(directory.path(), 100).unwrap());
    let engine = Arc::new(MemoryEngine::new(1_000));
    let control = Control::new(store, engine.clone(), Arc::new(HealthRegistry::default()));
    tokio::spawn(control.clone().run_apply_loop());
    let socket = directory.path().join("s");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let peer = Peer { user: "ann".into(), may_write };
    let router = routes::router(control.clone()).layer(MockConnectInfo(peer));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let client = ApiClient::new(&socket).unwrap();
    Bed { _directory: directory, engine, control, client }
}

impl Bed {
    pub(super) async fn send(&self, method: Method, path: &str, body: Value) -> Result<Value, ErrorInfo> {
        let body = Some(body).filter(|b| !b.is_null());
        match self.client.send(method, path, &(), body.as_ref()).await {
            Ok(value) => Ok(value),
            Err(ClientError::Refused { info }) => Err(info),
            Err(other) => panic!("{path}: {other}"),
        }
    }

    pub(super) async fn error(
        &self,
        method: Method,
        path: &str,
        body: Value,
    ) -> (String, String, Option<String>) {
        let info = self.send(method, path, body).await.expect_err(path);
        (info.code, info.message, info.fix)
    }

    pub(super) fn revision(&self) -> u64 {
        self.control.head().revision.number
    }
}

pub(super) fn web() -> Value {
    json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "backends": {"a": {"address": "10.1.0.1"}}})
}

#[tokio::test]
async fn readers_may_look_and_try_but_not_change() {
    let bed = bed(false).await;
    bed.send(Method::GET, "/v1/status", Value::Null).await.unwrap();
    let (code, message, fix) = bed.error(Method::POST, "/v1/services/web", web()).await;
    assert_eq!((code.as_str(), message.as_str()), ("forbidden", "user ann may read, but not make changes"));
    assert!(fix.unwrap().contains("socket_group"));
    for (method, path) in [
        (Method::PATCH, "/v1/services/web"),
        (Method::DELETE, "/v1/services/web"),
        (Method::POST, "/v1/services/web/backends/a"),
        (Method::POST, "/v1/services/web/backends/a/drain"),
        (Method::PUT, "/v1/config"),
        (Method::POST, "/v1/rollback"),
    ] {
        assert_eq!(bed.error(method, path, json!({})).await.0, "forbidden", "{path}");
    }
    let tried = bed.send(Method::POST, "/v1/services/web?dry_run=true", web()).await.unwrap();
    assert_eq!((tried["dry_run"].clone(), bed.revision()), (json!(true), 0));
}

#[tokio::test]
async fn writes_are_applied_when_they_return() {
    let bed = bed(true).await;
    let change = bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    assert_eq!((&change["revision"], &change["applied"]["revision"]), (&json!(1), &json!(1)));
    assert_eq!(bed.control.engine().snapshot().applied.revision, 1);
    let patch = json!({"drain_s": 9, "health": {"kind": "http", "path": "/x"}, "backends": {"b": {"address": "10.1.0.2"}}});
    bed.send(Method::PATCH, "/v1/services/web", patch).await.unwrap();
    let shown: ServiceInfo = bed.client.get("/v1/services/web", &()).await.unwrap();
    assert_eq!((shown.spec.drain_s, shown.spec.backends.len()), (9, 2));
    bed.send(Method::PATCH, "/v1/services/web", json!({"health": null, "backends": {"b": null}}))
        .await
        .unwrap();
    let shown: ServiceInfo = bed.client.get("/v1/services/web", &()).await.unwrap();
    // Without a check of its own, a service has the default one.
    assert_eq!((shown.spec.health.kind.label(), shown.spec.backends.len()), ("tcp", 1));
    // The same again changes nothing, and is no revision.
    let again = bed.send(Method::PATCH, "/v1/services/web", json!({"drain_s": 9})).await.unwrap();
    assert_eq!((again["revision"].clone(), again.get("applied")), (json!(3), None));
    let history: History = bed.client.get("/v1/history", &()).await.unwrap();
    assert!(history.revisions.iter().all(|r| r.author == "ann"));
    assert_eq!(history.revisions[2].message, "+ service web");
}

/// Weights are for policy weighted only, and no value of a flag would clear them.
#[tokio::test]
async fn weights_of_regions_go_with_their_policy() {
    let bed = bed(true).await;
    bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    let patch = |regions: Value| bed.send(Method::PATCH, "/v1/services/web", json!({"regions": regions}));
    let rules = async || {
        let shown: ServiceInfo = bed.client.get("/v1/services/web", &()).await.unwrap();
        shown.spec.regions.clone().unwrap()
    };
    patch(json!({"policy": "weighted", "weights": {"eu": 3, "us": 1}})).await.unwrap();
    patch(json!({"policy": "weighted", "hold_s": 20})).await.unwrap();
    assert_eq!(rules().await.weights.len(), 2, "they stay with the policy");
    patch(json!({"policy": "active-active"})).await.unwrap();
    assert!(rules().await.weights.is_empty());
    let refused = patch(json!({"policy": "active-active", "weights": {"eu": 3}})).await.unwrap_err();
    assert!(refused.message.contains("weights are for policy weighted"), "{}", refused.message);
    patch(json!({"policy": "weighted", "weights": {"eu": 3}})).await.unwrap();
    patch(json!({"policy": null})).await.unwrap();
    assert!(rules().await.weights.is_empty(), "the default policy is another one");
}

#[tokio::test]
async fn refusals_say_what_and_how_to_mend_it() {
    let bed = bed(true).await;
    bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    let mut typo = web();
    typo["drian_s"] = json!(5);
    for (method, path, body, code, message, fix) in [
        (
            Method::POST,
            "/v1/services/w2",
            typo,
            "bad_request",
            "unknown field `drian_s`",
            Some("did you mean drain_s?"),
        ),
        (
            Method::PATCH,
            "/v1/services/web",
            json!({"mode": "gre"}),
            "bad_request",
            "unknown variant `gre`",
            Some("did you mean gue?"),
        ),
        (Method::PATCH, "/v1/services/web", json!({"vip": null}), "bad_request", "missing field `vip`", None),
        (Method::PATCH, "/v1/services/web", json!([1]), "bad_request", "a JSON object", None),
        (
            Method::PATCH,
            "/v1/services/web",
            json!({"health": {"kind": "tcp", "prot": 1}}),
            "bad_request",
            "unknown field `prot`",
            Some("did you mean port?"),
        ),
        (
            Method::PATCH,
            "/v1/services/web",
            json!({"table_size": 3}),
            "invalid",
            "table_size 3 is not one of",
            None,
        ),
        (
            Method::PATCH,
            "/v1/services/wbe",
            json!({"drain_s": 3}),
            "not_found",
            "no service wbe",
            Some("did you mean web?"),
        ),
        (Method::GET, "/v1/services/a%20b", Value::Null, "bad_request", "name \"a b\" is not valid", None),
        (
            Method::GET,
            "/v1/nothing",
            Value::Null,
            "not_found",
            "no route /v1/nothing",
            Some("see docs/reference/api.md; for example /v1/status"),
        ),
        (
            Method::DELETE,
            "/v1/status",
            Value::Null,
            "bad_request",
            "method DELETE is not allowed on /v1/status",
            None,
        ),
        (Method::GET, "/v1/history?limt=3", Value::Null, "bad_request", "unknown field `limt`", None),
        (Method::POST, "/v1/services/x?expected=9", web(), "conflict", "at revision 1 by now, not 9", None),
        (Method::POST, "/v1/rollback", json!({"revision": 44}), "not_found", "no revision 44", None),
        (
            Method::POST,
            "/v1/rollback",
            json!({"revision": 0}),
            "bad_request",
            "revision 0 is the empty state",
            Some("choose a revision of `lbctl history`; to remove everything, apply an empty file"),
        ),
    ] {
        let (got_code, got, got_fix) = bed.error(method, path, body).await;
        assert_eq!(got_code, code, "{path}: {got}");
        assert!(got.contains(message), "{path}: {got}");
        assert_eq!(got_fix.as_deref(), fix, "{path}: {got}");
    }
    assert_eq!(bed.revision(), 1, "nothing of this changed anything");
    let huge = json!({ "revision": 1, "desired": { "services": {}}, "x": "x".repeat(17 << 20) });
    match bed.client.send::<Value>(Method::PUT, "/v1/config", &(), Some(&huge)).await {
        Err(ClientError::UnexpectedResponse { what, .. }) => assert!(what.starts_with("413"), "{what}"),
        Err(ClientError::Unreachable { .. }) => {} // The connection is closed before all of it is sent.
        other => panic!("{other:?}"),
    }
    assert_eq!(bed.revision(), 1);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_before_it_is_stored() {
    let bed = bed(true).await;
    let backends: serde_json::Map<_, _> = (0..1_001)
        .map(|i| (format!("b{i}"), json!({ "address": format!("10.1.{}.{}", i / 250, i % 250 + 1) })))
        .collect();
    let mut big = web();
    big["backends"] = backends.into();
    let (code, message, _) = bed.error(Method::POST, "/v1/services/big", big).await;
    assert_eq!(
        (code.as_str(), message.as_str()),
        ("no_room", "1001 backends do not fit: there is room for 1000")
    );
    assert_eq!(bed.revision(), 0);
}

#[tokio::test]
async fn a_failed_application_is_told_and_tried_again() {
    let bed = bed(true).await;
    bed.engine.set_failure(Some("map SLOTS: no".into()));
    let (code, message, fix) = bed.error(Method::POST, "/v1/services/web", web()).await;
    assert_eq!(code, "not_applied");
    assert_eq!(message, "revision 1 is stored, but cannot be applied: map SLOTS: no");
    assert!(fix.unwrap().contains("lbctl rollback"));
    let status: Status = bed.client.get("/v1/status", &()).await.unwrap();
    assert!(
        !status.healthy && status.problems[0].starts_with("revision 1 is not applied: map SLOTS"),
        "{status:?}"
    );
    bed.engine.set_failure(None);
    let healed = async {
        loop {
            let status: Status = bed.client.get("/v1/status", &()).await.unwrap();
            if status.applied.revision == 1 && status.applied.error.is_none() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), healed).await.expect("tried again within seconds");
}

#[tokio::test]
async fn writers_at_once_all_get_through() {
    let bed = Arc::new(bed(true).await);
    bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    let writers = (0..20).map(|i| {
        let bed = bed.clone();
        tokio::spawn(async move {
            let body = json!({ "address": format!("10.2.0.{}", i + 1) });
            bed.send(Method::POST, &format!("/v1/services/web/backends/w{i}"), body).await.unwrap();
        })
    });
    futures_util::future::join_all(writers).await.into_iter().for_each(|r| r.unwrap());
    assert_eq!(
        (bed.revision(), bed.control.head().desired.services.values().next().unwrap().backends.len()),
        (21, 21)
    );
}

#[tokio::test]
async fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/lbd.sock");
    let (listener, _) = super::bind(&path, 0o600, None).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let error = super::bind(&path, 0o660, None).unwrap_err().to_string();
    assert!(error.contains("served by another lbd"), "{error}");
    drop(listener);
    super::bind(&path, 0o660, None).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    let error = super::bind(&path, 0o660, None).unwrap_err().to_string();
    assert!(error.contains("exists and is not a socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let error =
        super::bind(&directory.path().join("x"), 0o660, Some("no-such-group")).unwrap_err().to_string();
    assert!(error.contains("groupadd no-such-group"), "{error}");
}

/// A service that an earlier version stored has no size, and the table of that version: wherever its state is brought back,
/// it stays so, and where it is carried as a configuration the size goes with it.
#[tokio::test]
async fn services_of_earlier_versions_keep_their_tables_on_every_way_back() {
    const OLD: u32 = 16_381;
    let bed = bed(true).await;
    let mut stored: Desired = serde_json::from_value(json!({"services": {"web": web()}})).unwrap();
    stored.assign_seats(&Desired::default());
    let commit = Commit {
        expected: 0,
        desired: stored.into(),
        author: "an earlier version".into(),
        message: "new".into(),
        summary: None,
        time: std::time::SystemTime::now(),
    };
    let old = bed.control.store.commit(commit).await.unwrap();
    bed.control.wait_applied(1).await.unwrap();
    let size = || {
        let head = bed.control.head().desired;
        head.services.values().next().map(|s| (s.table_size, s.slots()))
    };
    let backup = bed.send(Method::GET, "/v1/store/backup", Value::Null).await.unwrap();
    let exported = bed.send(Method::GET, "/v1/config", Value::Null).await.unwrap();
    assert_eq!(exported["desired"]["services"]["web"]["table_size"], json!(OLD));

    for change in ["resize", "remove"] {
        let ways = [
            ("/v1/rollback", json!({"revision": old.revision.number})),
            ("/v1/store/restore", backup.clone()),
        ];
        for (way, body) in ways {
            match change {
                "resize" => {
                    bed.send(Method::PATCH, "/v1/services/web", json!({"table_size": 251})).await.unwrap();
                    assert_eq!(size(), Some((Some(251), 251)));
                }
                _ => {
                    bed.send(Method::DELETE, "/v1/services/web", Value::Null).await.unwrap();
                }
            }
            bed.send(Method::POST, way, body).await.unwrap();
            assert_eq!(size(), Some((None, OLD)), "{change}, {way}");
            assert_eq!(bed.control.head().desired, old.desired, "{change}, {way}");
        }
    }
    // On another host, and on this one after it was removed.
    bed.send(Method::DELETE, "/v1/services/web", Value::Null).await.unwrap();
    let config = json!({"desired": exported["desired"]});
    bed.send(Method::PUT, "/v1/config", config.clone()).await.unwrap();
    assert_eq!(size(), Some((Some(OLD), OLD)));
    let again = bed.send(Method::PUT, "/v1/config", config).await.unwrap();
    assert_eq!(again["differences"], json!([]));
    // What is new gets the size that it needs.
    bed.send(Method::DELETE, "/v1/services/web", Value::Null).await.unwrap();
    bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    assert_eq!(size(), Some((Some(1_021), 1_021)));
}

#[tokio::test]
async fn rollback_brings_a_state_back() {
    let bed = bed(true).await;
    bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    bed.send(Method::DELETE, "/v1/services/web", Value::Null).await.unwrap();
    assert!(bed.control.head().desired.services.is_empty());
    bed.send(Method::POST, "/v1/rollback", json!({"revision": 1})).await.unwrap();
    let head = bed.control.head();
    assert_eq!((head.revision.number, head.revision.message.as_str()), (3, "rollback to revision 1"));
    assert_eq!(bed.control.store.get(1).await.unwrap().desired, head.desired);
}

/// Until the operator goes to the other store, or undoes the migration.
#[tokio::test]
async fn a_retired_store_is_a_problem_and_refuses_dry_runs() {
    let bed = bed(true).await;
    bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    let there = "etcd://there:2379/lb".to_owned();
    bed.control.store.retire(Retire::Moved(there.clone())).await.unwrap();
    let status = bed.send(Method::GET, "/v1/status", Value::Null).await.unwrap();
    let problems = status["problems"].as_array().unwrap();
    let told = problems.iter().filter_map(Value::as_str).find(|p| p.contains("was migrated to"));
    let told = told.unwrap_or_else(|| panic!("{problems:?}"));
    assert!(told.contains(&format!("--store {there}")) && !told.contains('\n'), "{told}");
    assert!(told.contains("`lbctl store unretire --yes`"), "{told}");
    assert_eq!(status["healthy"], json!(false));
    let info = bed.send(Method::GET, "/v1/store", Value::Null).await.unwrap();
    assert_eq!(info["link"]["moved"], json!(there));
    for query in ["", "?dry_run=true"] {
        let (code, message, _) = bed.error(Method::POST, &format!("/v1/services/w2{query}"), web2()).await;
        assert_eq!((code.as_str(), message.as_str()), ("moved", told), "{query}");
    }
    bed.send(Method::POST, "/v1/store/unretire", Value::Null).await.unwrap();
    let status = bed.send(Method::GET, "/v1/status", Value::Null).await.unwrap();
    assert!(!status["problems"].to_string().contains("migrated"), "{status}");
    bed.send(Method::POST, "/v1/services/w2?dry_run=true", web2()).await.unwrap();
}

fn web2() -> Value {
    json!({"vip": "10.0.0.2", "port": 80, "protocol": "tcp"})
}

/// A message with a line break could forge a line of the log, one with an escape sequence anything on a terminal.
#[tokio::test]
async fn texts_with_control_characters_are_refused() {
    let bed = bed(true).await;
    let place = "/v1/services/web?dry_run=true&message=drained%0A2026-01-01%20ERROR%20forged";
    let (code, message, _) = bed.error(Method::POST, place, web()).await;
    let told = "query of /v1/services/web: message: character 8 of the message is the control character U+000A; a \
                message is one line of text";
    assert_eq!((code.as_str(), message.as_str()), ("bad_request", told));
    bed.send(Method::POST, "/v1/services/web?message=drained%20f%C3%BCr%20w1", web()).await.unwrap();
    for (path, body) in [
        ("/v1/locks/rollout", json!({"reason": "\u{1b}[2J", "ttl_s": 60})),
        ("/v1/host/drain", json!({"reason": "\u{1b}[2J"})),
        ("/v1/rollouts/pause", json!({"reason": "\u{1b}[2J"})),
    ] {
        let (code, message, _) = bed.error(Method::POST, path, body).await;
        let told = "character 1 of the reason is the control character U+001B";
        assert!(code == "bad_request" && message.contains(told), "{path}: {message}");
    }
}

/// Texts that were stored before lbd refused such ones, or come from another host.
#[tokio::test]
async fn stored_control_characters_do_not_reach_the_terminal() {
    use crate::{desired::store::Revision, lbctl::render};
    let revision = Revision {
        number: 1,
        author: "a\x1b[2Jnn".into(),
        time_ms: 1,
        message: "one\n  2  forged".into(),
        summary: Some("s\x1b[3Jx".into()),
    };
    let lock = crate::desired::store::Lock {
        name: "n\n".into(),
        holder: "h\x1b[1m".into(),
        reason: "r\nforged".into(),
        since_ms: 1,
        left_s: 1,
        token: None,
    };
    let mut written = Vec::new();
    let mut out = render::Out::new(&mut written, false, false);
    render::observe::history(&mut out, &[revision]).unwrap();
    render::store::locks(&mut out, &[super::locks::HeldLock { lock, is_operation: false }]).unwrap();
    let painted = out.paint(render::Tone::Bad, "host drains: a\nb\x1b[2J");
    let text = String::from_utf8(written).unwrap();
    assert!(text.lines().count() == 4 && !text.contains('\x1b'), "{text}");
    assert!(text.contains(r"one\n  2  forged") && text.contains(r"a\u{1b}[2Jnn"), "{text}");
    assert_eq!(painted, r"host drains: a\nb\u{1b}[2J");
}

#[tokio::test]
async fn a_drain_that_leaves_a_service_with_nothing_needs_force() {
    let bed = bed(true).await;
    let mut service = web();
    service["backends"]["a"]["region"] = json!("eu");
    bed.send(Method::POST, "/v1/services/web", service).await.unwrap();
    for query in ["", "?dry_run=true", "?force=false"] {
        let path = format!("/v1/regions/eu/drain{query}");
        let (code, message, fix) = bed.error(Method::POST, &path, Value::Null).await;
        assert_eq!(code, "no_place", "{message}");
        assert!(
            message.contains("service web") && fix.is_some_and(|fix| fix.contains("force=true")),
            "{message}"
        );
    }
    assert_eq!(bed.revision(), 1);
    bed.send(Method::POST, "/v1/regions/eu/drain?force=true&dry_run=true", Value::Null).await.unwrap();
    assert_eq!(bed.revision(), 1);
    bed.send(Method::POST, "/v1/regions/eu/drain?force=true", Value::Null).await.unwrap();
    assert_eq!(bed.revision(), 2);
    // What is done already is no change, and needs no force.
    bed.send(Method::POST, "/v1/regions/eu/drain", Value::Null).await.unwrap();
    assert_eq!(bed.revision(), 2);
}

#[tokio::test]
async fn a_service_says_what_happens_to_its_vip_when_all_is_down() {
    let bed = bed(true).await;
    bed.send(Method::POST, "/v1/services/web", web()).await.unwrap();
    let patch = |when: &str| json!({"when_all_down": when});
    let (_, message, _) = bed.error(Method::PATCH, "/v1/services/web", patch("stay")).await;
    assert!(message.contains("when_all_down is keep, withdraw or reset, not \"stay\""), "{message}");
    assert_eq!(bed.revision(), 1);
    for when in ["reset", "withdraw"] {
        bed.send(Method::PATCH, "/v1/services/web", patch(when)).await.unwrap();
        let shown = bed.send(Method::GET, "/v1/services/web", Value::Null).await.unwrap();
        assert!(shown.to_string().contains(&format!(r#""when_all_down":"{when}""#)), "{shown}");
    }
    bed.send(Method::PATCH, "/v1/services/web", patch("keep")).await.unwrap();
    let shown = bed.send(Method::GET, "/v1/services/web", Value::Null).await.unwrap();
    assert!(!shown.to_string().contains("when_all_down"), "the default is not stored: {shown}");
}
