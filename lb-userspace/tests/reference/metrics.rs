//! The metrics page, from the metrics that `lbd ingress` and `lbd worker` serve.

use super::text::{cell, check_described, code, head, table};
use lb_userspace::{
    apply::announce::Announcement,
    desired::{
        config::File,
        store::{Commit, RedbStore, Store},
    },
    observed::health::HealthRegistry,
    serve::{
        api::{Control, Engine, host::HostState, memory::MemoryEngine},
        metrics,
    },
};
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};
use tokio::sync::watch;

/// Labels of every metric; compared with the labels of the served samples.
const LABELS: &[(&str, &[&str])] = &[
    ("lb_build_info", &["version", "abi"]),
    ("lb_interface_info", &["interface", "mode"]),
    ("lb_interface_attached", &["interface"]),
    ("lb_interface_problem", &["interface"]),
    ("lb_interface_waiting", &["interface"]),
    ("lb_program_left_out", &["program", "feature"]),
    ("lb_kernel_feature", &["feature"]),
    ("lb_host_draining", &[]),
    ("lb_announce_vip", &["vip"]),
    ("lb_announce_vip_unserved_seconds", &["vip"]),
    ("lb_announce_changes", &["interface"]),
    ("lb_announce_failed", &[]),
    ("lb_control_revision", &[]),
    ("lb_store_connected", &["engine"]),
    ("lb_store_orphaned_services", &[]),
    ("lb_store_contact_age_seconds", &[]),
    ("lb_store_lag_seconds", &["over"]),
    ("lb_control_applied_revision", &[]),
    ("lb_control_apply_failed", &[]),
    ("lb_control_apply_duration_seconds", &[]),
    ("lb_control_verdict_lag_seconds", &["le"]),
    ("lb_map_entries", &["map"]),
    ("lb_map_limit_entries", &["map"]),
    ("lb_guard_entries", &["list"]),
    ("lb_dataplane_packets", &["reason", "fate"]),
    ("lb_hook_runs", &["hook", "program", "result"]),
    ("lb_service_packets", &["service"]),
    ("lb_service_bytes", &["service"]),
    ("lb_service_flows", &["service"]),
    ("lb_service_eligible_backends", &["service"]),
    ("lb_service_slots", &["service"]),
    ("lb_service_transition_slots", &["service"]),
    ("lb_service_flood", &["service"]),
    ("lb_service_floods", &["service"]),
    ("lb_service_not_up_to_date", &["service", "reason"]),
    ("lb_service_panic", &["service"]),
    ("lb_backend_packets", &["service", "backend"]),
    ("lb_backend_bytes", &["service", "backend"]),
    ("lb_backend_flows", &["service", "backend"]),
    ("lb_backend_slots", &["service", "backend"]),
    ("lb_backend_tracked_flows", &["service", "backend"]),
    ("lb_backend_resolved", &["service", "backend"]),
    ("lb_backend_weight", &["service", "backend"]),
    ("lb_backend_draining", &["service", "backend"]),
    ("lb_backend_healthy", &["service", "backend"]),
    ("lb_backend_busy_since_seconds", &["service", "backend"]),
    ("lb_backend_held_in", &["service", "backend"]),
    ("lb_health_not_probed", &["reason"]),
    ("lb_health_probe_lateness_seconds", &["le"]),
    ("lb_health_not_probed_since_seconds", &["service", "backend"]),
    ("lb_health_probes", &["service", "backend", "result"]),
    ("lb_health_signs", &["service", "backend", "sign"]),
    ("lb_health_early_probes", &["service", "backend", "result"]),
    ("lb_replica_state", &["service", "backend", "state"]),
    ("lb_replica_running", &["service", "backend"]),
    ("lb_replica_waiting", &["service", "backend"]),
    ("lb_replica_capacity", &["service", "backend"]),
    ("lb_replica_kv_cache_usage_ratio", &["service", "backend"]),
    ("lb_replica_tokens_per_second", &["service", "backend"]),
    ("lb_replica_gpu_memory_used_bytes", &["service", "backend"]),
    ("lb_replica_load_score", &["service", "backend"]),
    ("lb_replica_report_age_seconds", &["service", "backend"]),
    ("lb_replica_reports", &["service", "backend", "result"]),
    ("lb_replica_breaks", &["service", "backend"]),
    ("lb_region_down", &["region"]),
    ("lb_region_rtt_seconds", &["region"]),
    ("lb_service_region_share_ratio", &["service", "region"]),
    ("lb_service_region_capacity", &["service", "region"]),
    ("lb_service_region_load", &["service", "region"]),
    ("lb_service_spill_unplaced_requests", &["service"]),
    ("lb_rollout_share_ratio", &["service", "version", "state"]),
    ("lb_rollout_region_ready_backends", &["service", "region", "version"]),
    ("lb_worker_packets", &["reason", "fate"]),
];

/// Builds the page.
pub fn page() -> String {
    let mut out = head(
        "Metrics",
        "`lbd ingress` serves Prometheus metrics at `http://127.0.0.1:9464/metrics` (`metrics` in `[lbd]`). \
         `lbd worker` serves its own with `--metrics ADDRESS:PORT`. Counters begin at 0 when the maps are created. \
         The values of `reason` are listed in [drop reasons](drop-reasons.md); `fate` is `pass`, `drop`, `answer` \
         or `note`.",
    );
    let ingress = families(&ingress_text());
    let worker = families(&metrics::worker_text(&[(lb_common::Reason::DecapIpip, 1)]).unwrap());
    let known: Vec<&str> = LABELS.iter().map(|(name, _)| *name).collect();
    let shown: Vec<&str> = ingress.iter().chain(&worker).map(|f| f.name.as_str()).collect();
    check_described(&shown, &known, "metrics.rs");
    for (title, families) in [("lbd ingress", &ingress), ("lbd worker", &worker)] {
        out.push_str(&format!("\n## {title}\n"));
        let rows: Vec<_> = families.iter().map(row).collect();
        out.push_str(&table(&["metric", "type", "unit", "labels", "meaning"], &rows));
    }
    out
}

/// Names of all metrics, as they are queried, with their labels.
pub fn names() -> BTreeMap<String, Vec<String>> {
    let served = [ingress_text(), metrics::worker_text(&[(lb_common::Reason::DecapIpip, 1)]).unwrap()];
    let all = served.iter().flat_map(|text| families(text));
    let named = |family: Family| {
        let (_, labels) = LABELS.iter().find(|(known, _)| *known == family.name).expect("`page` asserts it");
        let ending = if family.kind == "counter" { "_total" } else { "" };
        (format!("{}{ending}", family.name), labels.iter().map(|&label| label.to_owned()).collect())
    };
    all.map(named).collect()
}

/// A metric family of a served page.
struct Family {
    name: String,
    kind: String,
    help: String,
    labels: Option<Vec<String>>,
}

fn row(family: &Family) -> Vec<String> {
    let Family { name, kind, help, labels } = family;
    let (_, stated) = LABELS.iter().find(|(known, _)| known == name).expect("the caller has looked");
    if let Some(labels) = labels {
        assert_eq!(labels, stated, "{name}: its labels differ from tests/reference/metrics.rs");
    }
    let ending = if kind == "counter" { "_total" } else { "" };
    let unit = [("_seconds", "seconds"), ("_bytes", "bytes"), ("_ratio", "0 to 1")];
    let unit = unit.iter().find(|(end, _)| name.ends_with(end)).map_or("", |(_, unit)| unit);
    let labels = stated.iter().map(|l| code(l)).collect::<Vec<_>>().join(", ");
    vec![code(&format!("{name}{ending}")), kind.clone(), unit.to_owned(), labels, cell(help)]
}

/// Parses the families of a served page, in order.
fn families(text: &str) -> Vec<Family> {
    let mut found: Vec<Family> = Vec::new();
    let mut kinds = BTreeMap::new();
    for line in text.lines() {
        let ends = ["_total", "_bucket"];
        let plain =
            |name: &str| ends.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_owned();
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            let help = help.trim_end_matches('.').to_owned();
            found.push(Family { name: plain(name), kind: String::new(), help, labels: None });
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            kinds.insert(plain(name), kind.to_owned());
        } else if !line.starts_with('#') {
            let (name, labels) = line.split_once('{').unwrap_or((line.split(' ').next().unwrap(), ""));
            let labels = labels.split_once('}').map_or("", |(labels, _)| labels);
            // Label values of this page contain no commas.
            let labels = labels.split(',').filter_map(|l| Some(l.split_once('=')?.0.to_owned())).collect();
            if let Some(family) = found.iter_mut().find(|f| f.name == plain(name)) {
                family.labels = Some(labels);
            }
        }
    }
    for family in &mut found {
        family.kind = kinds.get(&family.name).cloned().expect("every family has a type");
    }
    found
}

const SERVICE: &str = r#"
[[service]]
name = "web"
vip = "10.0.0.1"
port = 80
protocol = "tcp"
[[service.backend]]
name = "w1"
address = "10.1.0.1"
"#;

/// Metrics of a daemon with one service and one backend, without a kernel.
fn ingress_text() -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(RedbStore::open(directory.path(), 100).unwrap());
        let desired = Arc::new(File::parse(SERVICE).unwrap().desired.unwrap());
        let engine = Arc::new(MemoryEngine::new(5));
        engine.apply(desired.clone(), 1).await.unwrap();
        let (author, message, time) = ("root".to_owned(), String::new(), SystemTime::UNIX_EPOCH);
        store.commit(Commit { expected: 0, desired, author, message, summary: None, time }).await.unwrap();
        let control = Control::new(store.clone(), engine, Arc::new(HealthRegistry::default()));
        let (_announcer, announced) =
            watch::channel(Announcement { interface: "lo".into(), ..Announcement::default() });
        control.set_host_state(HostState::restore(Arc::new(store.local()), Some(announced)).await.unwrap());
        metrics::text(&control).unwrap()
    })
}
