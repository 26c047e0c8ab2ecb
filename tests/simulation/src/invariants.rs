//! What must hold: after each step, and at quiet times, when all faults have ended a while ago.

use super::{
    environment,
    host::Place,
    model,
    operations::{Effect, Kind},
    simulation::{Asked, Outcome, Simulation, Violation, violated},
};
use axum::{body::Body, extract::ConnectInfo, http::Request};
use http_body_util::BodyExt;
use lb_userspace::{
    apply::reconcile::Published,
    desired::{model::Desired, store::Stored},
    plan::compile::CompiledService,
    serve::api::Peer,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, PoisonError},
    time::Duration,
};
use tower::ServiceExt;

const KEPT: &str = "what was acknowledged is kept";
const RIGHTS: &str = "nobody without the right changes anything";
const EXACT: &str = "a revision is what its request asked for";
const PROMPT: &str = "no trouble delays another service's change";
const ANSWERED: &str = "every request is answered";
const APPLIED: &str = "what was accepted is in the maps, or status says why not";
const EXPORT: &str = "an export applies without changes, and dry runs tell the truth";
const ALIKE: &str = "hosts that know the same make the same tables";
const BOUNDED: &str = "queues and registries are bounded by what exists";

/// Longest time of a request to which nothing is in the way.
const PROMPT_LIMIT: Duration = Duration::from_secs(1);
/// Longest time of any request: the API gives up after 30 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Time after which everything must be settled once all faults have ended.
const SETTLE: Duration = Duration::from_secs(20);

/// Time after which no transition of before is in progress.
const LONGEST_DRAIN: Duration = Duration::from_secs(90);

/// What is known of the revisions.
#[derive(Default)]
pub struct History {
    /// Each revision that was ever read, with the message and the author.
    seen: BTreeMap<u64, (String, String, Arc<Desired>)>,
    /// Newest acknowledged revision.
    acknowledged: u64,
    /// While a host runs with another store than its own.
    pub is_store_lost: bool,
}

impl Simulation {
    /// Checks that hold at any moment.
    pub fn check_step(&mut self) -> Result<(), Violation> {
        for index in self.running() {
            self.hosts[index].setup.maps.lock().check_all();
            self.note_known(index);
            self.check_tables(index)?;
        }
        self.check_answers()
    }

    /// Checks after a host has started: what was acknowledged before must be there.
    pub fn check_start(&mut self, index: usize) -> Result<(), Violation> {
        let head = match &self.hosts[index].daemon {
            Some(daemon) if self.cluster.is_none() => daemon.store.head().revision.number,
            _ => return Ok(()),
        };
        if head < self.history.acknowledged && !self.history.is_store_lost {
            let what = format!(
                "revision {} was acknowledged; after a restart there are {head}",
                self.history.acknowledged
            );
            return violated(KEPT, what);
        }
        Ok(())
    }

    /// Checks the answers that have arrived.
    fn check_answers(&mut self) -> Result<(), Violation> {
        let now = environment::now();
        let mut acknowledged = self.history.acknowledged;
        for (id, asked) in self.asked.iter().rev().take(60) {
            let disturbed = self.hosts[asked.host].disturbed >= asked.at || asked.is_disturbed;
            match asked.outcome() {
                Some(Outcome::Answered { at, status, body }) => {
                    if let Some(revision) = acknowledged_revision(asked, status, &body) {
                        acknowledged = acknowledged.max(revision);
                    }
                    let is_write = !matches!(asked.operation.effect, Effect::Nothing);
                    if is_write && status == 200 && !disturbed && at - asked.at > PROMPT_LIMIT {
                        return violated(PROMPT, format!("op-{id} took {:?}", at - asked.at));
                    }
                    check_rights(*id, asked, status)?;
                }
                None if !disturbed && now - asked.at > ANSWER_LIMIT => {
                    return violated(ANSWERED, format!("op-{id} has waited for {:?}", now - asked.at));
                }
                _ => {}
            }
        }
        if !self.history.is_store_lost {
            self.history.acknowledged = acknowledged;
        }
        Ok(())
    }

    /// Ends all faults, lets everything settle, and checks all that must hold then.
    pub fn quiet(&mut self) -> Result<(), Violation> {
        self.heal();
        self.advance(SETTLE)?;
        self.check_step()?;
        self.check_history()?;
        for index in 0..self.hosts.len() {
            self.check_applied(index)?;
            self.check_bounds(index)?;
        }
        self.check_alike()?;
        let host = self.random.below(self.hosts.len() as u64) as usize;
        self.check_export(host)?;
        if self.random.percent(30)
            && let Some(backup) = self.get(host, "/v1/store/backup")
            && backup["revisions"].as_array().is_some_and(|all| !all.is_empty())
        {
            self.backup = Some((self.head().0, backup));
        }
        if self.random.percent(15) {
            self.migrate(host)?;
        }
        if self.random.percent(30) {
            for index in 0..self.hosts.len() {
                self.crash(index);
                self.hosts[index].starts_at = environment::now();
            }
            self.advance(Duration::from_secs(1))?;
            self.check_history()?;
            self.active.clear();
        }
        Ok(())
    }

    fn read(&self, number: u64) -> Option<Stored> {
        match &self.cluster {
            Some(cluster) => cluster.lock().unwrap_or_else(PoisonError::into_inner).stored(number),
            None => {
                let daemon = self.hosts[0].daemon.as_ref()?;
                daemon.block_on(daemon.store.get(number)).ok()
            }
        }
    }

    /// Checks that revisions are as they were, that each is what its request asked for, and that none is missing.
    fn check_history(&mut self) -> Result<(), Violation> {
        let (head, _) = self.head();
        let mut found = BTreeMap::new();
        for number in 0..=head {
            if let Some(stored) = self.read(number) {
                let revision = stored.revision;
                found.insert(number, (revision.message, revision.author, stored.desired));
            }
        }
        let oldest = found.keys().next().copied().unwrap_or(0);
        for (number, before) in self.history.seen.range(oldest..) {
            match found.get(number) {
                None => return violated(KEPT, format!("revision {number} ({}) is gone", before.0)),
                Some(now) if now != before => {
                    return violated(
                        KEPT,
                        format!("revision {number} ({}) is another one now ({})", before.0, now.0),
                    );
                }
                Some(_) => {}
            }
        }
        for (number, (message, author, next)) in found.range(oldest + 1..) {
            if self.history.seen.contains_key(number) {
                continue;
            }
            if author == "reader" {
                return violated(RIGHTS, format!("revision {number} ({message}) is by a reader"));
            }
            let id: Option<u64> = message.strip_prefix("op-").and_then(|id| id.parse().ok());
            let asked = id.and_then(|id| self.asked.get(&id));
            let (Some(asked), Some((.., before))) = (asked, found.get(&(number - 1))) else { continue };
            let earlier = |to: u64| found.get(&to).map(|(.., desired)| desired.clone());
            if let Err(what) = model::check(&asked.operation, before, next, earlier) {
                return violated(EXACT, format!("revision {number} ({message}): {what}"));
            }
        }
        let news: Vec<u64> = found.keys().copied().filter(|n| !self.history.seen.contains_key(n)).collect();
        for number in news {
            let (message, author, desired) = &found[&number];
            let text =
                format!("{number} {message} {author} {}", serde_json::to_string(desired).unwrap_or_default());
            self.add_to_trace(&text);
        }
        self.history.seen.extend(found);
        self.check_requests(oldest)
    }

    /// Checks that each request made as many revisions as its answer says.
    fn check_requests(&self, oldest: u64) -> Result<(), Violation> {
        let mut made: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for (number, (message, ..)) in &self.history.seen {
            made.entry(message).or_default().push(*number);
        }
        for (id, asked) in &self.asked {
            let message = format!("op-{id}");
            let revisions = made.get(message.as_str()).cloned().unwrap_or_default();
            if revisions.len() > 1 {
                return violated(EXACT, format!("{message} made the revisions {revisions:?}"));
            }
            let made = revisions.first().copied();
            if made.is_some() && (asked.is_dry_run || asked.by_reader) {
                return violated(
                    RIGHTS,
                    format!("{message}, a dry run or by a reader, made revision {made:?}"),
                );
            }
            let Some((status, body)) = asked.answer() else { continue };
            match acknowledged_revision(asked, status, &body) {
                Some(revision) if made != Some(revision) && revision > oldest => {
                    return violated(
                        KEPT,
                        format!("{message} was acknowledged as revision {revision}, but made {made:?}"),
                    );
                }
                None if made.is_some() && !may_be_stored(status, &body) => {
                    return violated(
                        EXACT,
                        format!("{message} made revision {made:?}, but was answered {status} {body}"),
                    );
                }
                _ => {}
            }
            self.check_rehearsal(&message, asked, &body, status)?;
        }
        Ok(())
    }

    /// Compares a dry run with the request that followed.
    fn check_rehearsal(
        &self,
        message: &str,
        asked: &Asked,
        body: &Value,
        status: u16,
    ) -> Result<(), Violation> {
        let Some(rehearsal) = asked.rehearsal.and_then(|id| self.asked.get(&id)) else { return Ok(()) };
        let Some((before_status, before)) = rehearsal.answer() else { return Ok(()) };
        // Another change may have come between the two.
        let changes = u64::from(body["differences"].as_array().is_some_and(|all| !all.is_empty()));
        let is_next = before["revision"].as_u64().map(|n| n + changes) == body["revision"].as_u64();
        if status == 200 && before_status == 200 && is_next && before["differences"] != body["differences"] {
            let (said, done) = (&before["differences"], &body["differences"]);
            return violated(EXPORT, format!("{message}: the dry run said {said}, done was {done}"));
        }
        Ok(())
    }

    /// Sends a read to a host, now.
    pub fn get(&self, host: usize, path: &str) -> Option<Value> {
        self.call(host, "GET", path, Value::Null).map(|(_, body)| body)
    }

    fn call(&self, host: usize, method: &str, path: &str, body: Value) -> Option<(u16, Value)> {
        let daemon = self.hosts[host].daemon.as_ref()?;
        environment::set_wall_offset(self.hosts[host].setup.wall_ms);
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let mut request = Request::builder().method(method).uri(path).body(body).ok()?;
        request.extensions_mut().insert(ConnectInfo(Peer { user: "root".to_owned(), may_write: true }));
        let router = daemon.router.clone();
        Some(daemon.block_on(async {
            let Ok(response) = router.oneshot(request).await;
            let status = response.status().as_u16();
            let bytes = response.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            (status, serde_json::from_slice(&bytes).unwrap_or_default())
        }))
    }

    fn check_applied(&self, index: usize) -> Result<(), Violation> {
        let host = &self.hosts[index];
        let Some(daemon) = &host.daemon else { return violated("lbd starts", host.setup.name.clone()) };
        let (head, _) = self.head();
        let published = daemon.published.borrow().clone();
        let name = &host.setup.name;
        if published.revision != head && head > 0 {
            return violated(
                APPLIED,
                format!("{name}: revision {} is in the maps, not {head}", published.revision),
            );
        }
        if let Some(error) = &published.error {
            return violated(APPLIED, format!("{name}: {error}"));
        }
        let Some(status) = self.get(index, "/v1/status") else { return Ok(()) };
        let named: BTreeSet<&str> = status["not_up_to_date"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|p| p["service"].as_str())
            .collect();
        for service in published.problems.keys() {
            if !named.contains(service.as_str()) {
                return violated(APPLIED, format!("{name}: status does not name {service}: {status}"));
            }
        }
        Ok(())
    }

    fn check_bounds(&self, index: usize) -> Result<(), Violation> {
        let host = &self.hosts[index];
        let Some(daemon) = &host.daemon else { return Ok(()) };
        let (name, desired) = (&host.setup.name, daemon.store.head().desired.clone());
        let exists = |service: &str, backend: &str| {
            desired
                .services
                .iter()
                .any(|(n, s)| n.as_str() == service && s.backends.keys().any(|b| b.as_str() == backend))
        };
        let published = daemon.published.borrow().clone();
        let verdicts: Vec<_> = published.observed.health.keys().cloned().collect();
        let readiness: Vec<_> = published.observed.replicas.keys().cloned().collect();
        let checked = daemon.health.read(|all| all.keys().cloned().collect::<Vec<_>>());
        let watched: Vec<_> = daemon.replicas.readiness().keys().cloned().collect();
        for (what, ids) in [
            ("verdicts of the reconciler", verdicts),
            ("readiness of the reconciler", readiness),
            ("health registry", checked),
            ("replica registry", watched),
        ] {
            if let Some(id) = ids.iter().find(|id| !exists(id.service.as_str(), id.backend.as_str())) {
                return violated(BOUNDED, format!("{name}: {what} hold {id}, which does not exist"));
            }
        }
        let waiting = daemon.queue();
        if waiting > 100 {
            return violated(BOUNDED, format!("{name}: {waiting} events wait at a quiet time"));
        }
        Ok(())
    }

    fn check_alike(&self) -> Result<(), Violation> {
        // A host that restarts learns from the times of revisions which transitions are in progress.
        if self.clock_was_wrong.is_some_and(|at| environment::now() < at + LONGEST_DRAIN) {
            return Ok(());
        }
        let all: Vec<_> = self
            .hosts
            .iter()
            .filter_map(|h| Some((h, h.daemon.as_ref()?.published.borrow().clone())))
            .filter(|(_, p)| p.problems.is_empty())
            .collect();
        for (i, (host, a)) in all.iter().enumerate() {
            for (other, b) in &all[i + 1..] {
                let knows_the_same = a.desired == b.desired
                    && a.observed.health == b.observed.health
                    && a.observed.replicas == b.observed.replicas
                    && a.observed.steers == b.observed.steers
                    && host.setup.here == other.setup.here;
                let differs = if knows_the_same { different_tables(a, b) } else { Vec::new() };
                if !differs.is_empty() {
                    let names = (&host.setup.name, &other.setup.name);
                    return violated(
                        ALIKE,
                        format!("{names:?} differ in {differs:?}, revision {}", a.revision),
                    );
                }
            }
        }
        Ok(())
    }

    /// Applies what a host exports.
    fn check_export(&mut self, host: usize) -> Result<(), Violation> {
        let Some(mut config) = self.get(host, "/v1/config") else { return Ok(()) };
        if self.bug == Some(super::bugs::Bug::ExportForgets) {
            super::simulation::forget_drain_times(&mut config);
        }
        let Some((status, change)) = self.call(host, "PUT", "/v1/config?dry_run=true", config.clone()) else {
            return Ok(());
        };
        if status != 200 || change["differences"] != json!([]) {
            return violated(EXPORT, format!("applying the export is answered {status} {change}"));
        }
        Ok(())
    }

    /// Moves the data of a file to another one, and starts the host with that.
    fn migrate(&mut self, host: usize) -> Result<(), Violation> {
        let (Place::File, (head, _)) = (self.hosts[host].setup.place.clone(), self.head()) else {
            return Ok(());
        };
        if head == 0 || matches!(self.bug, Some(super::bugs::Bug::AcknowledgedBeforeStored)) {
            return Ok(());
        }
        let to = self.hosts[host].setup.directory.join(format!("moved-{}", environment::now().as_millis()));
        let body = json!({"to": format!("file://{}", to.display())});
        self.note(format!("the store of host {host} is migrated"));
        let Some((status, answer)) = self.call(host, "POST", "/v1/store/migrate", body) else {
            return Ok(());
        };
        if status != 200 {
            return violated(KEPT, format!("a migration is answered {status} {answer}"));
        }
        self.crash(host);
        self.hosts[host].setup.store_directory = to;
        self.hosts[host].starts_at = environment::now();
        self.advance(Duration::from_secs(1))?;
        self.check_history()
    }
}

/// Services with different tables on two hosts that are at the same point of the service's transitions: these end within
/// a second of each other.
fn different_tables(a: &Published, b: &Published) -> Vec<String> {
    let point = |s: &CompiledService| {
        let removed: Vec<IpAddr> =
            s.backends.iter().filter(|b| b.name.is_none()).map(|b| b.address).collect();
        (s.transition_slots > 0, removed)
    };
    let shown = |s: &CompiledService| {
        let slots: Vec<(IpAddr, u32)> = s.backends.iter().map(|b| (b.address, b.slots)).collect();
        format!("{} slots, {} in transition, {slots:?}", s.table_size, s.transition_slots)
    };
    let both = a.services.iter().filter_map(|(name, s)| Some((name, s, b.services.get(name)?)));
    both.filter(|(_, s, o)| s.table_hash != o.table_hash && point(s) == point(o))
        .map(|(name, s, o)| format!("{name} ({}; {})", shown(s), shown(o)))
        .collect()
}

/// The revision that an answer says the request has made.
fn acknowledged_revision(asked: &Asked, status: u16, body: &Value) -> Option<u64> {
    let is_write = !matches!(asked.operation.effect, Effect::Nothing) && !asked.is_dry_run;
    let body = if body["change"].is_object() { &body["change"] } else { body };
    let has_changed = body["differences"].as_array().is_some_and(|all| !all.is_empty());
    if status == 200 && is_write && has_changed { body["revision"].as_u64() } else { None }
}

/// Whether a request that was answered so may have been stored nevertheless.
fn may_be_stored(status: u16, body: &Value) -> bool {
    let code = body["error"]["code"].as_str().unwrap_or_default();
    status == 200 || matches!(code, "not_applied" | "unsure" | "internal")
}

/// Checks that what is not allowed is refused.
fn check_rights(id: u64, asked: &Asked, status: u16) -> Result<(), Violation> {
    let is_allowed_dry = asked.is_dry_run && asked.operation.has_dry_run;
    if asked.by_reader && asked.operation.method != "GET" && !is_allowed_dry && status != 403 {
        return violated(RIGHTS, format!("op-{id} by a reader was answered {status}"));
    }
    if asked.operation.kind == Kind::Invalid && status < 400 {
        return violated(EXACT, format!("op-{id} is not valid, and was answered {status}"));
    }
    Ok(())
}
