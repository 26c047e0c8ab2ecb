//! The API's routes: compares the rows with a live API, and with the paths that the router is built from.

use super::text::{cell, check_described, code, head, table};
use lb_userspace::{
    desired::{model::EVENT_KINDS, store::RedbStore},
    lbctl::client::{ApiClient, ClientError},
    observed::health::HealthRegistry,
    serve::api::{self, Control, memory::MemoryEngine},
};
use std::{fs, path::Path, sync::Arc};

/// Method, path, query parameters or body, meaning.
type Row = (&'static str, &'static str, &'static str, &'static str);

const ROWS: &[Row] = &[
    ("GET", "/v1/status", "", "Overall health, problems, interfaces, revision, room in the maps"),
    ("GET", "/v1/services", "", "All services"),
    ("GET", "/v1/services/{service}", "", "One service"),
    ("POST", "/v1/services/{service}", "body: service", "Add a service"),
    ("PATCH", "/v1/services/{service}", "body: JSON merge patch (RFC 7396)", "Change a service"),
    ("DELETE", "/v1/services/{service}", "", "Remove a service"),
    ("GET", "/v1/backends", "", "Backends of all services"),
    ("GET", "/v1/services/{service}/backends", "", "Backends of one service"),
    ("GET", "/v1/services/{service}/backends/{backend}", "", "One backend, with the history of its health"),
    ("POST", "/v1/services/{service}/backends/{backend}", "body: backend", "Add a backend"),
    (
        "PATCH",
        "/v1/services/{service}/backends/{backend}",
        "body: JSON merge patch (RFC 7396)",
        "Change a backend",
    ),
    ("DELETE", "/v1/services/{service}/backends/{backend}", "", "Remove a backend"),
    ("POST", "/v1/services/{service}/backends/{backend}/drain", "", "Send no new flows to a backend"),
    ("POST", "/v1/services/{service}/backends/{backend}/undrain", "", "Send new flows to a backend again"),
    (
        "GET",
        "/v1/replicas",
        "`service`, `after`, `wait_ms`",
        "Replica state; with `after=VERSION` the answer waits for a newer version",
    ),
    ("GET", "/v1/stats", "", "Counters of backends and drop reasons"),
    (
        "GET",
        "/v1/events",
        "`kind`, `service`, `after`, `follow`",
        "Events as server-sent events; continues after the header `Last-Event-ID`",
    ),
    ("GET", "/v1/flows", "`service`, `backend`, `limit`", "Entries of the flow tables"),
    (
        "GET",
        "/v1/explain",
        "`source`, `destination`, `protocol`, `connection_id`",
        "Where a packet goes, and each step of the decision",
    ),
    ("GET", "/v1/config", "", "The whole desired state, with its revision"),
    ("PUT", "/v1/config", "body: `{\"revision\"?, \"desired\"}`", "Replace the desired state"),
    (
        "GET",
        "/v1/history",
        "`before`, `limit`, `service`",
        "Revisions, newest first; with `service` those that changed it, and `next`: the `before` of the next request",
    ),
    ("GET", "/v1/history/{revision}", "", "One revision, and what it changed"),
    ("GET", "/v1/history/{from}/diff/{to}", "", "Differences between two revisions"),
    ("POST", "/v1/rollback", "body: `{\"revision\"}`", "Make the state of an older revision the newest"),
    ("GET", "/v1/store", "", "Members, regions and hosts of the store"),
    ("GET", "/v1/store/backup", "", "All kept revisions as a file"),
    ("POST", "/v1/store/restore", "body: a backup", "Restore a backup"),
    ("POST", "/v1/store/migrate", "body: `{\"to\": URL}`", "Copy all revisions to another store"),
    ("POST", "/v1/store/unretire", "", "Let a store that was migrated accept changes again"),
    (
        "POST",
        "/v1/store/accept",
        "body: `{\"revision\": N}`",
        "Accept that the store was set back to this revision, or is empty",
    ),
    ("GET", "/v1/locks", "", "Locks"),
    ("POST", "/v1/locks/{name}", "body: `{\"reason\", \"ttl_s\", \"token\"?}`", "Take or renew a lock"),
    ("DELETE", "/v1/locks/{name}", "`token`, `force`", "Release a lock"),
    ("GET", "/v1/host", "", "VIPs that this host announces, and its drain"),
    ("POST", "/v1/host/drain", "body: `{\"reason\"}`", "Take this host out of service"),
    ("POST", "/v1/host/undrain", "", "Put this host back into service"),
    ("GET", "/v1/hosts", "", "All hosts of the fleet: live or gone, version, revision, last seen, clock"),
    ("DELETE", "/v1/hosts/{host}", "", "Forget a host that left for good"),
    ("GET", "/v1/policy", "", "How services are spread over regions and versions"),
    ("GET", "/v1/policy/{service}", "", "How one service is spread: inputs and decision"),
    ("GET", "/v1/residency", "", "Backends and flows that break a residency rule"),
    ("GET", "/v1/regions", "", "Regions: distance, health, state"),
    ("POST", "/v1/regions/{region}", "", "Name a region"),
    ("DELETE", "/v1/regions/{region}", "", "Remove a region"),
    (
        "POST",
        "/v1/regions/{region}/drain",
        "`force`",
        "Send no new flows to a region; without `force` refused if services would have no backend left",
    ),
    ("POST", "/v1/regions/{region}/undrain", "", "Send new flows to a region again"),
    ("GET", "/v1/rollouts", "", "Roll-outs of model versions"),
    (
        "POST",
        "/v1/rollouts",
        "body: `{\"model\", \"version\", \"permille\", \"regions\"?, \"services\"?}`",
        "Start a roll-out",
    ),
    (
        "POST",
        "/v1/rollouts/{verb}",
        "body: `{\"model\"?, \"service\"?, \"reason\"?, \"permille\"?, \"regions\"?, \"force\"?}`",
        "`step` (`permille`, `regions`), `promote`, `abort` or `clear` a roll-out",
    ),
    ("GET", "/v1/guard", "", "Sizes of the deny and allow lists"),
    ("GET", "/v1/guard/check", "`address`", "Entry that matches an address"),
    ("GET", "/v1/guard/{list}", "`within`, `limit`", "Entries of the list `deny` or `allow`"),
    ("POST", "/v1/guard/{list}", "body: changes of the list", "Add, remove, replace or flush entries"),
];

/// Builds the page.
pub fn page() -> String {
    let rows: Vec<&str> = ROWS.iter().map(|row| row.1).collect();
    let rights = rights();
    let built: Vec<&str> = rights.iter().map(|(_, path, _)| path.as_str()).collect();
    check_described(&built, &rows, "api.rs");
    check_routes_exist();

    let mut out = head(
        "API",
        "HTTP and JSON on the Unix socket of `lbd`, `/run/lb/lbd.sock` (`socket` in `[lbd]`). Whoever may open the socket \
         may read; root and members of `socket_group` may also write. \
         `curl --unix-socket /run/lb/lbd.sock http://lbd/v1/status` shows the state.",
    );
    let heads = ["method", "path", "needs", "query or body", "meaning"];
    let rows = ROWS.iter().map(|(method, path, input, meaning)| {
        let right = rights.iter().find(|(m, p, _)| m.eq_ignore_ascii_case(method) && p == path);
        let right = right.unwrap_or_else(|| panic!("the API has no {method} {path}")).2.clone();
        vec![method.to_string(), code(path), right, cell(input), cell(meaning)]
    });
    out.push_str(&table(&heads, &rows.collect::<Vec<_>>()));
    out.push_str(
        "\nChanges of services, backends, regions, roll-outs and configuration take `dry_run=true` (only report what would \
         change), `expected=REVISION` (refuse unless this is the newest revision), `message=TEXT` (one line, shown in the \
         history) and `force=true` (allow a VIP that is an address of this host). They return when the maps are written.\n\nErrors are `{\"error\": {\"code\", \"message\", \"fix\"?, \"details\"?}}` \
         with a status of 4xx or 5xx.\n\n## Events\n\n`GET /v1/events` answers with server-sent events: the `data` of each is a JSON \
         object with `seq`, `boot`, `time_ms`, `kind`, `service`, `backend`, `interface`, `vip`, `region` (as far as the \
         event is about one), `cause` and `revision`; its `id` is `BOOT-SEQ`. `boot` is that of the run of `lbd`, in which \
         `seq` counts from 1. With the header `Last-Event-ID` (or `after=ID`) the stream continues there. An event of the \
         type `gap` says that events are missing: `lbd` keeps the last 16,384, of its current run. `kind=backend,vip` selects kinds and \
         the kinds that begin with these words, `service=NAME` those about a service; with `follow=false` the answer ends \
         with the newest event. At most 64 readers follow at once.\n\n",
    );
    let kinds = EVENT_KINDS.iter().map(|(kind, about)| vec![code(kind), cell(about)]);
    out.push_str(&table(&["kind", "meaning"], &kinds.collect::<Vec<_>>()));
    out
}

/// Method, path and right of each row `Endpoint::new(METHOD, "PATH", RIGHT, …)` of the route table. Every row must be
/// described.
fn rights() -> Vec<(String, String, String)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/serve/api/table.rs");
    let source = fs::read_to_string(&file).unwrap();
    let rows: Vec<_> = source
        .split("Endpoint::new(")
        .skip(1)
        .map(|row| {
            let mut parts = row.split(',').map(str::trim);
            let mut next = || parts.next().unwrap_or_default().trim_matches('"').to_owned();
            let (method, path) = (next(), next());
            let right = match next().as_str() {
                "Read" => "read",
                "DryRun" => "write; read for a dry run",
                "Write" => "write",
                other => panic!("{method} {path} needs {other}, which tests/reference/api.rs does not know"),
            };
            (method, path, right.to_owned())
        })
        .collect();
    assert!(rows.len() > 20, "only {} routes were found in {}", rows.len(), file.display());
    for (method, path, _) in &rows {
        let known = ROWS.iter().any(|row| row.0 == method && row.1 == path);
        assert!(known, "describe {method} {path} in tests/reference/api.rs");
    }
    rows
}

/// Requests each row from an API without a kernel: the path must exist, and accept the method.
fn check_routes_exist() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(RedbStore::open(directory.path(), 100).unwrap());
        let control =
            Control::new(store, Arc::new(MemoryEngine::new(5)), Arc::new(HealthRegistry::default()));
        let socket = directory.path().join("lbd.sock");
        let (listener, writers) = api::bind(&socket, 0o660, None).unwrap();
        tokio::spawn(control.clone().run_apply_loop());
        tokio::spawn(api::serve(listener, control, writers, std::future::pending()));
        let client = ApiClient::new(&socket).unwrap();
        for (method, path, ..) in ROWS {
            let list = if path.starts_with("/v1/guard") { "deny" } else { "none" };
            let mut filled = path.replace("{list}", list).replace(['{', '}'], "");
            if filled == "/v1/events" {
                filled.push_str("?follow=false");
            }
            let answer = client.send::<serde_json::Value>(method.parse().unwrap(), &filled, &(), None::<&()>);
            if let Err(ClientError::Refused { info }) = answer.await {
                let unknown = ["no route /", &format!("method {method} is not allowed on")];
                let is_unknown = unknown.iter().any(|start| info.message.starts_with(*start));
                assert!(!is_unknown, "{method} {path}: {}", info.message);
            }
        }
    });
}
