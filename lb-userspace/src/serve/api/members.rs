//! Hosts as members of the fleet: who is expected, who is gone, and whose clock is off.
//!
//! Input: the member records and reports that hosts publish through the store. Output: JSON of [`HostMember`], and
//! problems for status. A host writes its record every [`HEARTBEAT`]; the record stays when the host is gone, until an
//! operator forgets it. The time in the record is by its host's clock: a host that receives it at once compares it with
//! its own. Called by `routes`; set up by the daemon.

use super::{ApiError, Control, access::Writer, control::SharedControl, routes::Reply};
use crate::{
    clock,
    desired::store::{HOSTS, HostValues, MEMBERS, StoreError},
};
use axum::{Json, extract::Path};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError},
    time::Duration,
};

/// How often a host writes its record.
pub const HEARTBEAT: Duration = Duration::from_secs(30);
/// After a loss of the store, hosts have this long to report again before they count as gone.
const GRACE_MS: u64 = 15_000;
/// Difference of clocks that is a problem, in milliseconds.
const MAX_SKEW_MS: u64 = 1_000;
/// Records kept; above that, the host that has been gone for longest is forgotten.
const MAX_MEMBERS: usize = 1_024;
/// Hosts that status names.
const NAMED: usize = 10;

/// Record of a host, in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Name.
    pub host: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Version of the host's lbd.
    pub version: String,
    /// Revision in the host's maps when it wrote the record.
    pub revision: u64,
    /// Time of the record by the host's clock, in milliseconds since 1970 UTC.
    pub seen_ms: u64,
}

/// A host of the fleet: `GET /v1/hosts`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMember {
    /// The host's record.
    #[serde(flatten)]
    pub record: MemberRecord,
    /// Whether this is the answering host.
    pub is_self: bool,
    /// Whether the host reports to the store now.
    pub is_live: bool,
    /// How far this host's clock is ahead of the other's, in milliseconds; none if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skew_ms: Option<i64>,
}

/// Differences between this host's clock and those of the others.
#[derive(Debug, Default)]
pub struct Clocks {
    /// By host: time of its last record, and the last two differences.
    last: BTreeMap<String, (u64, [Option<i64>; 2])>,
}

impl Clocks {
    /// Notes new records.
    pub fn update<'a>(&mut self, records: impl Iterator<Item = &'a MemberRecord>, now_ms: u64) {
        let mut next = BTreeMap::new();
        for MemberRecord { host, seen_ms, .. } in records {
            let known = match self.last.get(host) {
                // A record found at the start may be of any age.
                None => (*seen_ms, [None; 2]),
                Some((before, samples)) if before == seen_ms => (*before, *samples),
                Some((_, [_, last])) => (*seen_ms, [*last, Some(now_ms as i64 - *seen_ms as i64)]),
            };
            next.insert(host.clone(), known);
        }
        self.last = next;
    }

    /// The smaller of the last two differences: a record that arrives late, after a loss of the store, looks like a
    /// clock that is behind.
    pub fn skew_ms(&self, host: &str) -> Option<i64> {
        match self.last.get(host)?.1 {
            [Some(a), Some(b)] => Some(if a.abs() <= b.abs() { a } else { b }),
            _ => None,
        }
    }
}

fn records(values: &HostValues) -> impl Iterator<Item = MemberRecord> + '_ {
    let all = values.iter().filter(|(key, _)| key.starts_with(MEMBERS));
    all.filter_map(|(_, value)| serde_json::from_slice(value).ok())
}

/// All hosts of which there is a record, by region and name.
fn hosts(values: &HostValues, own: &str, clocks: &Clocks) -> Vec<HostMember> {
    let shown = |record: MemberRecord| HostMember {
        is_self: record.host == own,
        is_live: values.contains_key(&format!("{HOSTS}{}", record.host)),
        skew_ms: clocks.skew_ms(&record.host).filter(|_| record.host != own),
        record,
    };
    let mut all: Vec<HostMember> = records(values).map(shown).collect();
    all.sort_by(|a, b| (&a.record.region, &a.record.host).cmp(&(&b.record.region, &b.record.host)));
    all
}

/// Hosts that are gone, and clocks that are off, in words for an operator.
fn problems(hosts: &[HostMember], now_ms: u64) -> Vec<String> {
    let mut found = Vec::new();
    let gone: Vec<&MemberRecord> =
        hosts.iter().filter(|h| !h.is_live && !h.is_self).map(|h| &h.record).collect();
    for MemberRecord { host, region, seen_ms, .. } in gone.iter().take(NAMED) {
        let for_s = now_ms.saturating_sub(*seen_ms) / 1_000;
        found.push(format!(
            "host {host} (region {region}) is gone, last seen {for_s} s ago: start its lbd, or run `lbctl host forget \
             {host}` if it left for good"
        ));
    }
    if gone.len() > NAMED {
        found.push(format!("{} more hosts are gone: see `lbctl host list`", gone.len() - NAMED));
    }
    let known: Vec<(&str, i64)> = hosts
        .iter()
        .filter(|h| h.is_live && !h.is_self)
        .filter_map(|h| Some((h.record.host.as_str(), h.skew_ms?)))
        .collect();
    let off: Vec<&(&str, i64)> = known.iter().filter(|(_, ms)| ms.unsigned_abs() > MAX_SKEW_MS).collect();
    if known.len() >= 2 && off.len() * 2 > known.len() {
        let (_, ms) = off[0];
        let (amount, way) = difference(*ms);
        return [found, vec![format!(
            "this host's clock is {amount} s {way} those of {} of {} other hosts: set it (NTP); lag and ages are wrong \
             until then",
            off.len(),
            known.len()
        )]]
        .concat();
    }
    for (host, ms) in off.into_iter().take(NAMED) {
        let (amount, way) = difference(-ms);
        found.push(format!(
            "the clock of host {host} is {amount} s {way} this host's: set it (NTP); lag and ages are wrong until then"
        ));
    }
    found
}

fn difference(ms: i64) -> (String, &'static str) {
    let seconds = format!("{:.1}", ms.unsigned_abs() as f64 / 1_000.0);
    (seconds, if ms > 0 { "ahead of" } else { "behind" })
}

impl Control {
    fn own_name(&self) -> String {
        self.fleet_member.get().map(|member| member.host.clone()).unwrap_or_default()
    }

    /// All hosts of the fleet, whether they are live or gone.
    pub fn hosts(&self) -> Vec<HostMember> {
        let values = self.store.published().borrow().clone();
        let clocks = self.clocks.lock().unwrap_or_else(PoisonError::into_inner);
        hosts(&values, &self.own_name(), &clocks)
    }

    /// Problems of the fleet's hosts; none while the store cannot say who is live.
    pub(super) fn host_problems(&self) -> Vec<String> {
        let (link, now_ms) = (self.link(), clock::unix_ms());
        let is_known = link.connected && now_ms.saturating_sub(link.since_ms) >= GRACE_MS;
        if is_known { problems(&self.hosts(), now_ms) } else { Vec::new() }
    }

    /// Writes this host's record, and compares clocks, until the store is gone.
    pub async fn run_member(self: Arc<Self>) {
        let mut values = self.store.published();
        // Another part makes this host's first report: the record, made of it, must not wait for a heartbeat more.
        let mut reports = self.report.subscribe();
        if reports.wait_for(|report| !report.host.is_empty()).await.is_err() {
            return;
        }
        let mut due = tokio::time::Instant::now();
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(due) => {
                    due = tokio::time::Instant::now() + HEARTBEAT;
                    self.write_record().await;
                }
                changed = values.changed() => if changed.is_err() { return },
            }
            let now = values.borrow_and_update().clone();
            let all: Vec<MemberRecord> = records(&now).collect();
            let mut clocks = self.clocks.lock().unwrap_or_else(PoisonError::into_inner);
            clocks.update(all.iter(), clock::unix_ms());
        }
    }

    async fn write_record(&self) {
        let report = self.report();
        if report.host.is_empty() {
            return;
        }
        let hosts = self.hosts();
        let is_new = !hosts.iter().any(|h| h.record.host == report.host);
        let gone = hosts.iter().filter(|h| !h.is_live).min_by_key(|h| h.record.seen_ms);
        if let Some(oldest) = gone.filter(|_| is_new && hosts.len() >= MAX_MEMBERS) {
            let host = oldest.record.host.clone();
            tracing::warn!(
                host,
                "forgetting the host that has been gone for longest: {MAX_MEMBERS} are known"
            );
            if let Err(error) = self.store.forget_member(host).await {
                tracing::warn!(%error, "cannot forget a host");
            }
        }
        let record = MemberRecord {
            host: report.host.clone(),
            region: report.region,
            zone: report.zone,
            version: report.version,
            revision: report.revision,
            seen_ms: clock::unix_ms(),
        };
        let value = serde_json::to_vec(&record).expect("texts and numbers have a JSON form");
        self.store.keep_member(&report.host, value);
    }
}

pub(super) async fn list(axum::extract::State(control): SharedControl) -> Reply<Vec<HostMember>> {
    Ok(Json(control.hosts()))
}

pub(super) async fn forget(
    axum::extract::State(control): SharedControl,
    Path(host): Path<String>,
    Writer(author): Writer,
) -> Reply<Vec<HostMember>> {
    match control.store.forget_member(host.clone()).await {
        Ok(()) => tracing::warn!(author = author.name, host, "the host was forgotten"),
        Err(error @ StoreError::NoMember { .. }) => {
            return Err(ApiError::from(error).fix("`lbctl host list` lists all known hosts"));
        }
        Err(error) => return Err(error.into()),
    }
    // The watch may deliver the removal a moment later.
    let mut hosts = control.hosts();
    hosts.retain(|h| h.record.host != host);
    Ok(Json(hosts))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(host: &str, seen_ms: u64) -> MemberRecord {
        MemberRecord { host: host.to_owned(), region: "eu".to_owned(), seen_ms, ..MemberRecord::default() }
    }

    #[test]
    fn a_host_that_is_gone_is_a_problem_until_it_is_forgotten() {
        let value = |r: &MemberRecord| serde_json::to_vec(r).unwrap();
        let values: HostValues = Arc::new(BTreeMap::from([
            (format!("{HOSTS}a"), Vec::new()),
            (format!("{MEMBERS}a"), value(&record("a", 90_000))),
            (format!("{MEMBERS}b"), value(&record("b", 40_000))),
        ]));
        let hosts = hosts(&values, "a", &Clocks::default());
        let live: Vec<(&str, bool)> = hosts.iter().map(|h| (h.record.host.as_str(), h.is_live)).collect();
        assert_eq!(live, [("a", true), ("b", false)]);
        let found = problems(&hosts, 100_000);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("host b (region eu) is gone, last seen 60 s ago: "), "{found:?}");
        assert!(found[0].contains("lbctl host forget b"), "{found:?}");
    }

    #[test]
    fn a_late_record_is_no_wrong_clock() {
        let mut clocks = Clocks::default();
        let see = |clocks: &mut Clocks, seen: u64, now: u64| clocks.update([record("b", seen)].iter(), now);
        see(&mut clocks, 1_000, 500_000);
        assert_eq!(clocks.skew_ms("b"), None, "it may have been there for long");
        see(&mut clocks, 501_000, 501_010);
        see(&mut clocks, 531_000, 580_000);
        assert_eq!(clocks.skew_ms("b"), Some(10), "the store was lost for a while");
        see(&mut clocks, 561_000, 4_161_000);
        see(&mut clocks, 591_000, 4_191_020);
        assert_eq!(clocks.skew_ms("b"), Some(3_600_000));
        see(&mut clocks, 591_000, 9_000_000);
        assert_eq!(clocks.skew_ms("b"), Some(3_600_000), "no new record says nothing");
    }

    #[test]
    fn the_clock_that_differs_from_most_is_named() {
        let host = |name: &str, skew_ms: i64| HostMember {
            record: record(name, 1),
            is_live: true,
            skew_ms: Some(skew_ms),
            is_self: false,
        };
        let one = problems(&[host("b", 3_600_000), host("c", 3), host("d", -8)], 2);
        assert_eq!(one.len(), 1);
        assert!(one[0].starts_with("the clock of host b is 3600.0 s behind this host's"), "{one:?}");
        let own = problems(&[host("b", -5_000), host("c", -5_001), host("d", -4_999)], 2);
        assert_eq!(own.len(), 1);
        assert!(own[0].starts_with("this host's clock is 5.0 s behind those of 3 of 3"), "{own:?}");
        assert!(problems(&[host("b", 999), host("c", -1_000)], 2).is_empty());
    }

    /// The report and the record are made by different parts, in any order.
    #[tokio::test]
    async fn a_host_is_listed_as_soon_as_it_has_reported() {
        use crate::{
            desired::store::RedbStore,
            observed::health::HealthRegistry,
            serve::api::{memory::MemoryEngine, store::HostReport},
        };
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(RedbStore::open(directory.path(), 100).unwrap());
        let engine = Arc::new(MemoryEngine::new(5));
        let control = Control::new(store, engine, Arc::new(HealthRegistry::default()));
        tokio::spawn(control.clone().run_member());
        tokio::time::sleep(Duration::from_millis(100)).await;
        control.publish_report(HostReport { host: "h".to_owned(), ..HostReport::default() });
        let listed = async {
            while control.hosts().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(HEARTBEAT / 3, listed).await.expect("its record is there before a heartbeat");
    }
}
