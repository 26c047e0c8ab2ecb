//! Every route of the table, by everybody: who may do what, and that work once begun goes on without its caller.

use super::{
    Control, Peer,
    access::Right,
    host::{HostDrain, HostState},
    memory::MemoryEngine,
    routes,
    store::FleetMember,
    table::table,
};
use crate::{
    apply::announce::Announcement,
    desired::{
        model::Desired,
        store::{Claim, Commit, Local, Opener, RedbStore, Retire, Store, backup, etcd::Access},
    },
    observed::health::HealthRegistry,
};
use axum::{extract::connect_info::MockConnectInfo, http::Method};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{io::AsyncWriteExt, net::UnixStream, sync::watch};

struct Bed {
    directory: tempfile::TempDir,
    engine: Arc<MemoryEngine>,
    control: Arc<Control>,
    store: Arc<RedbStore>,
}

/// How a request is made, and what must be there for it to change something.
struct Sample {
    path: String,
    body: Value,
    before: Value,
}

fn web() -> Value {
    let backends = json!({"a": {"address": "10.1.0.1"}, "b": {"address": "10.1.0.2", "state": "draining"}});
    json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp", "backends": backends, "replica": {"kind": "stream"}})
}

/// A request to each route that changes something; a new route must be added here.
fn sample(method: &Method, path: &str, directory: &Path) -> Sample {
    let mut before = json!({"services": {"web": web()}, "regions": {"eu": {}, "us": {}}});
    let rollout = json!({"model": "m", "version": "v2", "permille": 50});
    let other = json!({"vip": "10.0.0.9", "port": 90, "protocol": "tcp"});
    let (at, body) = match (method.as_str(), path) {
        ("POST", "/v1/services/{service}") => ("/v1/services/new", other),
        ("PATCH", "/v1/services/{service}") => ("/v1/services/web", json!({"drain_s": 9})),
        ("DELETE", "/v1/services/{service}") => ("/v1/services/web", Value::Null),
        ("POST", "/v1/services/{service}/backends/{backend}") => {
            ("/v1/services/web/backends/new", json!({"address": "10.1.0.9"}))
        }
        ("PATCH", "/v1/services/{service}/backends/{backend}") => {
            ("/v1/services/web/backends/a", json!({"weight": 7}))
        }
        ("DELETE", "/v1/services/{service}/backends/{backend}") => {
            ("/v1/services/web/backends/b", Value::Null)
        }
        ("POST", "/v1/services/{service}/backends/{backend}/drain") => {
            ("/v1/services/web/backends/a/drain", Value::Null)
        }
        ("POST", "/v1/services/{service}/backends/{backend}/undrain") => {
            ("/v1/services/web/backends/b/undrain", Value::Null)
        }
        ("PUT", "/v1/config") => ("/v1/config", json!({"desired": {"services": {"new": other}}})),
        ("POST", "/v1/rollback") => ("/v1/rollback", json!({"revision": 1})),
        ("POST", "/v1/store/migrate") => {
            ("/v1/store/migrate", json!({"to": format!("file://{}/moved", directory.display())}))
        }
        ("POST", "/v1/store/unretire") => ("/v1/store/unretire", Value::Null),
        ("POST", "/v1/store/restore") => {
            let revision = json!({"number": 5, "author": "ann", "time_ms": 1, "message": "m"});
            let entry = json!({"revision": revision, "delta": {"services": {"new": other}}});
            ("/v1/store/restore", json!({"store": "0123", "time_ms": 7, "revisions": [entry]}))
        }
        ("POST", "/v1/store/accept") => {
            before = Value::Null;
            ("/v1/store/accept", json!({"revision": 0}))
        }
        ("POST", "/v1/locks/{name}") => ("/v1/locks/new", json!({"reason": "r", "ttl_s": 60})),
        ("DELETE", "/v1/locks/{name}") => ("/v1/locks/held?force=true", Value::Null),
        ("POST", "/v1/host/drain") => ("/v1/host/drain", json!({"reason": "r"})),
        ("POST", "/v1/host/undrain") => ("/v1/host/undrain", Value::Null),
        ("DELETE", "/v1/hosts/{host}") => ("/v1/hosts/gone", Value::Null),
        ("POST", "/v1/regions/{region}") => ("/v1/regions/asia", Value::Null),
        ("DELETE", "/v1/regions/{region}") => ("/v1/regions/us", Value::Null),
        ("POST", "/v1/regions/{region}/drain") => ("/v1/regions/us/drain", Value::Null),
        ("POST", "/v1/regions/{region}/undrain") => {
            before["regions"]["eu"]["state"] = json!("draining");
            ("/v1/regions/eu/undrain", Value::Null)
        }
        ("POST", "/v1/rollouts") => {
            let mut body = rollout;
            body["services"] = json!(["web"]);
            ("/v1/rollouts", body)
        }
        ("POST", "/v1/rollouts/{verb}") => {
            before["services"]["web"]["rollout"] = rollout;
            ("/v1/rollouts/abort", json!({}))
        }
        ("POST", "/v1/guard/{list}") => ("/v1/guard/deny", json!({"add": ["192.0.2.0/24"]})),
        (method, path) => panic!("{method} {path} needs a sample here"),
    };
    Sample { path: at.to_owned(), body, before }
}

impl Bed {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(RedbStore::open(directory.path(), 100).unwrap());
        let engine = Arc::new(MemoryEngine::new(1_000));
        let control = Control::new(store.clone(), engine.clone(), Arc::new(HealthRegistry::default()));
        let opener = Opener { local: store.local(), keep: 100, access: Access::default(), id: None };
        let named = |name: &str| name.to_owned();
        control.set_fleet_member(FleetMember {
            host: named("h"),
            region: named("eu"),
            zone: named("a"),
            opener,
        });
        Self { directory, engine, control, store }
    }

    /// Two revisions, a lock, and a host that announces; and what the route at hand changes.
    async fn prepare(&self, path: &str, before: &Value) {
        let (_, announced) = watch::channel(Announcement::default());
        if path == "/v1/host/undrain" {
            let drain = HostDrain { author: "ann".into(), reason: String::new(), since_ms: 1 };
            self.store.local().save("host-drain", serde_json::to_vec(&drain).unwrap()).await.unwrap();
        }
        let hosting = HostState::restore(Arc::new(self.store.local()), Some(announced)).await.unwrap();
        self.control.set_host_state(hosting);
        if before.is_null() {
            self.control.set_adopted_services(3);
        } else {
            self.commit(Desired::default()).await;
            self.commit(serde_json::from_value(before.clone()).unwrap()).await;
        }
        let claim = |name: &str| Claim {
            name: name.to_owned(),
            holder: "ann".into(),
            reason: "r".into(),
            ttl: Duration::from_secs(60),
            token: None,
        };
        self.store.lock(claim("held")).await.unwrap();
        self.store.keep_member("gone", b"{}".to_vec());
        if path == "/v1/store/unretire" {
            self.store.retire(Retire::Moved("file:///there".into())).await.unwrap();
        }
        tokio::spawn(self.control.clone().run_apply_loop());
        if !before.is_null() {
            // Or an application of what is prepared would be taken for the request's.
            self.control.wait_first_applied().await;
        }
    }

    async fn commit(&self, desired: Desired) {
        let (expected, time) = (self.store.head().revision.number, SystemTime::now());
        let (author, message) = ("ann".to_owned(), "m".to_owned());
        self.store
            .commit(Commit { expected, desired: Arc::new(desired), author, message, summary: None, time })
            .await
            .unwrap();
    }

    /// A socket for those who are this peer; none: of whom nothing is known.
    fn serve(&self, name: &str, peer: Option<Peer>) -> (PathBuf, reqwest::Client) {
        let socket = self.directory.path().join(name);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let mut router = routes::router(self.control.clone());
        if let Some(peer) = peer {
            router = router.layer(MockConnectInfo(peer));
        }
        tokio::spawn(async move { axum::serve(listener, router).await });
        let client = reqwest::Client::builder().unix_socket(socket.as_path()).no_proxy().build().unwrap();
        (socket, client)
    }

    fn peer(&self, name: &str, may_write: bool) -> (PathBuf, reqwest::Client) {
        self.serve(name, Some(Peer { user: name.into(), may_write }))
    }

    /// All that a request could have changed.
    async fn state(&self) -> String {
        let retired = matches!(self.store.retired(), Retire::Moved(_));
        let locks: Vec<String> = self.store.locks().await.unwrap().into_iter().map(|l| l.name).collect();
        let (head, drain, orphaned) = (self.store.head(), self.control.host_drain(), self.control.orphaned());
        let published: Vec<String> = self.store.published().borrow().keys().cloned().collect();
        format!("{head:?} {published:?} retired {retired} {locks:?} drain {drain:?} orphaned {orphaned}")
    }
}

async fn ask(client: &reqwest::Client, method: &Method, path: &str, body: &Value) -> u16 {
    ask_holding(client, method, path, body, "12ab").await
}

async fn ask_holding(
    client: &reqwest::Client,
    method: &Method,
    path: &str,
    body: &Value,
    token: &str,
) -> u16 {
    let mut request = client.request(method.clone(), format!("http://lbd{path}"));
    if !body.is_null() {
        request = request.json(body);
    }
    if !token.is_empty() {
        request = request.header(super::LOCK_TOKEN, token);
    }
    request.send().await.unwrap().status().as_u16()
}

/// The same path with more in its query.
fn with(path: &str, query: &str) -> String {
    format!("{path}{}{query}", if path.contains('?') { '&' } else { '?' })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_writers_change_anything_whatever_the_query_says() {
    let writes = table().into_iter().filter(|route| route.right != Right::Read);
    for route in writes {
        let bed = Bed::new().await;
        let Sample { path, body, before } = sample(&route.method, route.path, bed.directory.path());
        bed.prepare(route.path, &before).await;
        let what = format!("{} {path}", route.method);
        let (_, nobody) = bed.serve("nobody", None);
        let (_, reader) = bed.peer("reader", false);
        let (_, writer) = bed.peer("writer", true);
        let state = bed.state().await;
        let queries =
            ["dry_run=true", "dry_run=true&dry_run=false", "dry_run=1", "dry_run=false", "dry_run=true&x=1"];
        let mut paths: Vec<String> = queries.iter().map(|query| with(&path, query)).collect();
        paths.push(path.clone());
        for path in &paths {
            let status = ask(&nobody, &route.method, path, &body).await;
            assert_eq!(status, 403, "nobody: {} {path}", route.method);
            let status = ask(&reader, &route.method, path, &body).await;
            let tries = route.right == Right::DryRun && *path == with(&path_of(path), "dry_run=true");
            assert_eq!(status, if tries { 200 } else { 403 }, "reader: {} {path}", route.method);
            assert_eq!(bed.state().await, state, "changed by a reader: {} {path}", route.method);
            assert!(!bed.directory.path().join("moved").exists(), "a store was made for a reader");
        }
        if route.right == Right::DryRun {
            let status = ask(&writer, &route.method, &with(&path, "dry_run=true"), &body).await;
            assert_eq!((status, bed.state().await), (200, state.clone()), "tried by a writer: {what}");
        }
        assert_eq!(ask_holding(&writer, &route.method, &path, &body, "").await, 200, "writer: {what}");
        assert_ne!(bed.state().await, state, "a writer changes nothing, so nothing was tested: {what}");
    }
}

fn path_of(path: &str) -> String {
    path.split_once("?dry_run").map_or(path, |(path, _)| path).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_needs_to_be_known_and_changes_nothing() {
    let bed = Bed::new().await;
    bed.prepare("", &json!({"services": {"web": web()}, "regions": {"eu": {}}})).await;
    let (_, nobody) = bed.serve("nobody", None);
    let (_, reader) = bed.peer("reader", false);
    let state = bed.state().await;
    for route in table().into_iter().filter(|route| route.right == Right::Read) {
        assert_eq!(route.method, Method::GET, "{} is no reading", route.path);
        let path = route.path.replace("{service}", "web").replace("{backend}", "a").replace("{list}", "deny");
        let status = ask(&nobody, &route.method, &path, &Value::Null).await;
        assert_eq!(status, 403, "nobody: {path}");
        let status = ask(&reader, &route.method, &path, &Value::Null).await;
        assert_ne!(status, 403, "reader: {path}");
    }
    assert_eq!(bed.state().await, state);
}

/// The lock that a caller holds does not stand in its own way, only in that of others; and he keeps it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_holder_of_the_lock_asks_for_is_done_under_it() {
    let bed = Bed::new().await;
    bed.prepare("", &json!({"services": {"web": web()}, "regions": {"eu": {}, "us": {}}})).await;
    let claim = Claim {
        name: "rollout".into(),
        holder: "ann".into(),
        reason: "r".into(),
        ttl: Duration::from_secs(600),
        token: None,
    };
    let token = bed.store.lock(claim).await.unwrap().token.unwrap();
    let (_, writer) = bed.peer("writer", true);
    let drain = async |token: &str| {
        ask_holding(&writer, &Method::POST, "/v1/regions/us/drain", &Value::Null, token).await
    };
    let state = bed.state().await;
    assert_eq!((drain("").await, drain("12ab").await), (409, 409));
    assert_eq!(bed.state().await, state);
    assert_eq!(drain(&token).await, 200);
    let locks = bed.store.locks().await.unwrap();
    let lock = locks.iter().find(|lock| lock.name == "rollout").expect("he keeps it");
    assert!(lock.left_s > 500, "{lock:?}");
}

/// Killed between the copy and the retirement, a migration leaves both stores in use; the next attempt finds the copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_goes_on_where_an_earlier_one_was_cut_short() {
    let bed = Bed::new().await;
    bed.prepare("", &json!({"services": {"web": web()}, "regions": {"eu": {}, "us": {}}})).await;
    let there = bed.directory.path().join("moved");
    let open = || RedbStore::beside(bed.store.local(), &there, 100).unwrap();
    let other = open();
    let all = backup::revisions(&*bed.store).await.unwrap();
    other.import(Some(bed.store.about().await.id), all).await.unwrap();
    // Even one whose data once came here.
    other.retire(Retire::Moved("file:///here".into())).await.unwrap();
    drop(other);
    let (_, writer) = bed.peer("writer", true);
    let to = json!({"to": format!("file://{}", there.display())});
    assert_eq!(ask_holding(&writer, &Method::POST, "/v1/store/migrate", &to, "").await, 200);
    assert!(matches!(bed.store.retired(), Retire::Moved(_)));
    let other = open();
    assert_eq!((other.head(), other.retired()), (bed.store.head(), Retire::Back));
}

/// Sends a request, for the connection to be dropped before the answer.
async fn begin(socket: &Path, method: &Method, path: &str, body: &Value) -> UnixStream {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: lbd\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    stream
}

/// Ctrl-C, a time-out or `kill -9` of lbctl: what has begun comes to its end, at whatever point that happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_leaves_stops_nothing_halfway() {
    for route in table().into_iter().filter(|route| route.right != Right::Read) {
        let bed = Bed::new().await;
        let Sample { path, body, before } = sample(&route.method, route.path, bed.directory.path());
        bed.prepare(route.path, &before).await;
        let (socket, _) = bed.peer("writer", true);
        let state = bed.state().await;
        // Long enough that the caller is gone in the midst of it, however busy the machine is.
        bed.engine.set_delay(Duration::from_millis(200));
        let caller = begin(&socket, &route.method, &path, &body).await;
        let what = format!("{} {path}", route.method);
        let begun = async {
            while !bed.engine.has_begun() && bed.state().await == state {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), begun).await.expect(&what);
        drop(caller);
        let done = async {
            loop {
                let now = bed.state().await;
                // The lock that a drain takes is given back.
                if now != state && !now.contains("\"rollout\"") {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), done).await.expect(&what);
    }
}
