//! What happens to a fleet of two regions, in order: a worker overloads, one dies, an ingress host dies, a region is
//! cut off, etcd loses a member and then its quorum. Told by `cargo xtask demo --regions`, asserted by `tests/fault`.
//!
//! In: regions to be. Out: for each step what clients saw, how long it took to be noticed, and where traffic went.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::{
    bed::vip_v4,
    hold::{Held, Holder},
    http::{Account, Load, Running},
    regions::{Host, Offer, Plan, Regions},
    replica,
    stage::LINES,
    wait,
};

/// Long-lived connections.
const LINES_HELD: usize = 200;
/// How long a step is watched after what happens in it.
const WATCH: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(20);
/// Residency: packets of such a service never leave the east.
const BOUND: &str = "[service.regions]\nallowed = [\"east\"]\n";
/// Four requests at once, 20 ms each.
const WORK: &str = "auto-4-20";
/// One at once, twice as slow: what a GPU does that something else computes on too.
const SLOW: &str = "auto-1-40";

/// What clients saw while one thing happened.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Step {
    /// What happened.
    pub name: String,
    /// How long it was watched, in seconds.
    pub seconds: f64,
    /// From the event until it was noticed, in milliseconds.
    pub detect_ms: Option<u64>,
    /// Requests that ended.
    pub requests: usize,
    /// Requests that failed, but those under way to what died.
    pub failed: usize,
    /// Requests that failed, and had begun before the death was noticed.
    pub failed_under_way: usize,
    /// Requests that were refused at first, and that a new connection served.
    pub retried: usize,
    /// The longest that a request took which began after the event and was served, in milliseconds.
    pub longest_ms: u64,
    /// How many of those took more than 2 s.
    pub late: usize,
    /// Long-lived connections that broke although their worker lives and can be reached.
    pub broken: usize,
    /// Those whose worker died or was cut off.
    pub on_dead: usize,
    /// Those that routers moved to another region's hosts, and that broke by it.
    pub moved: usize,
    /// Answered requests by worker.
    pub by_worker: BTreeMap<String, usize>,
    /// Of the service that may run in the east only: answered requests by worker.
    pub bound: BTreeMap<String, usize>,
    /// Of the same: requests that were not served.
    pub bound_failed: usize,
    /// What else is worth knowing, in words.
    pub notes: Vec<String>,
}

impl Step {
    /// Whether nothing was lost that could live, and nothing left the region that it may not leave.
    pub fn is_clean(&self) -> bool {
        let strays = self.bound.keys().any(|worker| !worker.starts_with('e'));
        self.requests > 0 && self.failed == 0 && self.broken == 0 && !strays
    }
}

/// What comes of an event: when it was noticed, who died by it, and what else is worth knowing.
#[derive(Debug, Default)]
struct Outcome {
    happened: Option<Instant>,
    noticed: Option<Instant>,
    /// A later death: requests that began before may have been under way to it.
    last_death: Option<Instant>,
    /// Routers have moved connections to hosts of another region, which know nothing of them.
    is_moved: bool,
    dead: Vec<&'static str>,
    notes: Vec<String>,
}

/// A fleet with its clients.
pub struct Story {
    world: Regions,
    web: Running,
    bound: Running,
    lines: Holder,
    replica: String,
}

fn service(name: &str, vip: u8, port: u16) -> String {
    format!(
        "[[service]]\nname = \"{name}\"\nvip = \"{}\"\nport = {port}\nprotocol = \"tcp\"\nmode = \"gue\"\n\
         scheduler = \"p2c\"\npanic_percent = 0\nreplica = {{ kind = \"stream\", port = {}, interval_ms = 300, timeout_ms = 300 }}\n[service.health]\nkind = \"http\"\n\
         path = \"/health\"\nport = {}\ninterval_ms = 300\ntimeout_ms = 500\nrise = 1\nfall = 2\ndamping = false\n",
        vip_v4(vip),
        replica::PORT,
        replica::PORT,
    )
}

impl Story {
    /// Starts fleet and clients. `replica` is the test that is a worker.
    pub fn start(replica: &str) -> Result<Self> {
        let offer = |text| Offer { text, only: None };
        let services = vec![
            offer(service("chat", 1, replica::PORT)),
            offer(service("lines", 1, LINES)),
            Offer { text: service("bound", 2, replica::PORT) + BOUND, only: Some("east") },
        ];
        let plan = Plan {
            regions: 2,
            etcd: true,
            replica: replica.to_owned(),
            words: WORK.to_owned(),
            services,
            arguments: Vec::new(),
        };
        let world = Regions::start(plan)?;
        let client = &world.bed.client;
        let load = |target| Load { closing: 10, keeping: 0, attempts: 50, ..Load::new(vec![target]) };
        let bound = SocketAddr::from((vip_v4(2), replica::PORT));
        let few = Load { closing: 2, attempts: 1, pause: Duration::from_millis(50), ..load(bound) };
        Ok(Self {
            web: Running::start(client, load(world.target()))?,
            bound: Running::start(client, few)?,
            lines: Holder::open(client, &[world.lines()], LINES_HELD)?,
            world,
            replica: replica.to_owned(),
        })
    }

    /// The fleet.
    pub fn world(&self) -> &Regions {
        &self.world
    }

    /// All of it, in order; each step is told as it ends.
    pub fn run(&mut self, mut tell: impl FnMut(&Step)) -> Result<Vec<Step>> {
        type Event = fn(&mut Story) -> Result<Outcome>;
        let events: [(&str, Event); 12] = [
            ("baseline", |_| Ok(Outcome::default())),
            ("workers of the east overload", Story::overload),
            ("they recover", Story::recover),
            ("worker wb dies", Story::kill_worker),
            ("wb returns", Story::revive_worker),
            ("ingress host e1 dies", |story| story.cut_host(true)),
            ("e1 returns", |story| story.cut_host(false)),
            ("the east is cut off", Story::cut_region),
            ("the east returns", Story::return_region),
            ("etcd loses a member", Story::lose_member),
            ("etcd loses its quorum", Story::lose_quorum),
            ("etcd returns", Story::return_etcd),
        ];
        let mut steps = Vec::new();
        for (name, event) in events {
            let step = self.watch(name, event).with_context(|| name.to_owned())?;
            tell(&step);
            steps.push(step);
        }
        Ok(steps)
    }

    fn watch(&mut self, name: &str, event: impl FnOnce(&mut Self) -> Result<Outcome>) -> Result<Step> {
        self.web.take();
        self.bound.take();
        let began = Instant::now();
        let outcome = event(self)?;
        thread::sleep(WATCH);
        let held = self.lines.exchange()?;
        let (web, bound) = (self.web.take(), self.bound.take());
        let seconds = began.elapsed().as_secs_f64();
        if !outcome.dead.is_empty() || outcome.is_moved {
            // What broke with its worker is not to be counted twice.
            self.lines = Holder::open(&self.world.bed.client, &[self.world.lines()], LINES_HELD)?;
        }
        Ok(account(name, seconds, &web, &bound, &held, outcome))
    }

    fn say(&self, region: usize, words: &str) -> Result<()> {
        self.world.regions[region].workers.iter().try_for_each(|w| replica::say(&w.worker, words))
    }

    /// New flows that the hosts of the east have sent to the west so far.
    fn spilled(&self) -> Result<u64> {
        let mut sum = 0;
        for host in &self.world.regions[0].hosts {
            let list = host.lbctl.json(&["backend", "list", "chat"])?;
            let west = list
                .as_array()
                .into_iter()
                .flatten()
                .filter(|b| b["name"].as_str().is_some_and(|name| name.starts_with('w')));
            sum += west.filter_map(|b| b["status"]["flows"].as_u64()).sum::<u64>();
        }
        Ok(sum)
    }

    fn overload(&mut self) -> Result<Outcome> {
        let before = self.spilled()?;
        self.say(0, SLOW)?;
        let happened = Instant::now();
        let mut spilled = before;
        wait::until("hosts of the east send flows to the west", PATIENCE, || {
            spilled = self.spilled().unwrap_or(before);
            spilled > before
        })?;
        let noticed = Some(Instant::now());
        // Long enough to see what it comes to.
        thread::sleep(WATCH);
        let notes = vec![format!(
            "ea and eb compute one request at a time instead of four, and half as fast: hosts of the east sent {} \
             new flows to the west ({before} before)",
            self.spilled()?.saturating_sub(before)
        )];
        Ok(Outcome { happened: Some(happened), noticed, notes, ..Outcome::default() })
    }

    fn recover(&mut self) -> Result<Outcome> {
        self.say(0, WORK)?;
        Ok(Outcome::default())
    }

    fn kill_worker(&mut self) -> Result<Outcome> {
        self.world.regions[1].workers[1].http = None;
        let happened = Instant::now();
        for host in self.world.hosts() {
            wait::until(&format!("{} finds wb dead", host.name), PATIENCE, || {
                host.lbctl.backends("wb").is_ok_and(|all| all.iter().all(|b| b.slots == 0))
            })?;
        }
        // Its lines are another process, and stay.
        Ok(Outcome {
            happened: Some(happened),
            noticed: Some(Instant::now()),
            notes: vec!["noticed: no host has a slot for it any more".to_owned()],
            ..Outcome::default()
        })
    }

    fn revive_worker(&mut self) -> Result<Outcome> {
        let began = Instant::now();
        let Self { world, replica, .. } = self;
        world.regions[1].workers[1].revive(&world.bed, replica, WORK)?;
        self.world.wait_usable()?;
        let notes =
            vec![format!("in use again on all hosts {} ms after its start", began.elapsed().as_millis())];
        Ok(Outcome { notes, ..Outcome::default() })
    }

    fn cut_host(&mut self, is_cut: bool) -> Result<Outcome> {
        let region = &mut self.world.regions[0];
        let wanted = if is_cut { 1 } else { 2 };
        region.cut_host(0, is_cut)?;
        let happened = Instant::now();
        wait::until(&format!("the east's router has {wanted} ways"), PATIENCE, || {
            region.ways(vip_v4(1)).is_ok_and(|ways| ways == wanted)
        })?;
        let noticed = Some(Instant::now());
        let notes = vec![match is_cut {
            true => "silently: its cable seems good; noticed by BFD, its flows go over e2".to_owned(),
            false => "it announces again, and flows are spread anew".to_owned(),
        }];
        Ok(Outcome { happened: Some(happened), noticed, notes, ..Outcome::default() })
    }

    fn cut_region(&mut self) -> Result<Outcome> {
        self.world.cut_region(0, true)?;
        let happened = Instant::now();
        wait::until("the core sends nobody to the east", PATIENCE, || {
            self.world.ways(vip_v4(1)).is_ok_and(|ways| ways == ["west"])
        })?;
        let noticed = Some(Instant::now());
        wait::until("hosts of the west send nothing to the east", PATIENCE, || {
            self.world.regions[1].hosts.iter().all(|host| {
                ["ea", "eb"].iter().all(|worker| {
                    host.lbctl.backends(worker).is_ok_and(|all| all.iter().all(|b| b.slots == 0))
                })
            })
        })?;
        let notes = vec![
            "silently, between the core and the east's router; noticed by BFD".to_owned(),
            format!("its workers are out of the west's tables after {} ms", happened.elapsed().as_millis()),
        ];
        Ok(Outcome { happened: Some(happened), noticed, dead: vec!["ea", "eb"], notes, ..Outcome::default() })
    }

    fn return_region(&mut self) -> Result<Outcome> {
        self.world.cut_region(0, false)?;
        let took = self.world.wait_usable()?;
        let notes = vec![format!("all hosts and routes are as before after {} ms", took.as_millis())];
        Ok(Outcome { notes, is_moved: true, ..Outcome::default() })
    }

    /// Changes the desired state on a host, and says how long it took to be in every host's maps.
    fn change(&self, host: &Host, drain_s: u32) -> Result<Duration> {
        let began = Instant::now();
        let time = format!("{drain_s}s");
        host.lbctl.run(&["service", "set", "chat", "--drain", &time])?;
        let revision = |host: &Host| {
            let status = host.lbctl.output(&["status", "-o", "json"]).ok()?;
            let status: serde_json::Value = serde_json::from_slice(&status.stdout).ok()?;
            status["applied"]["revision"].as_u64()
        };
        let newest = revision(host).context("lbd says what is applied")?;
        wait::until("all hosts have the change", PATIENCE, || {
            self.world.hosts().all(|host| revision(host) >= Some(newest))
        })?;
        Ok(began.elapsed())
    }

    fn lose_member(&mut self) -> Result<Outcome> {
        let cluster = self.world.cluster.as_mut().context("there is a cluster")?;
        cluster.members[2].kill();
        let happened = Instant::now();
        let host = &self.world.regions[0].hosts[0];
        let took = wait::until_some("a change is taken", PATIENCE, || self.change(host, 61).ok())?;
        let notes = vec![format!(
            "a change on e1 was in all hosts' maps {} ms after the member's death; it took {} ms itself",
            happened.elapsed().as_millis(),
            took.as_millis()
        )];
        Ok(Outcome { notes, ..Outcome::default() })
    }

    fn lose_quorum(&mut self) -> Result<Outcome> {
        let cluster = self.world.cluster.as_mut().context("there is a cluster")?;
        cluster.members[1].kill();
        let happened = Instant::now();
        wait::until("all hosts know that they are cut off", PATIENCE, || {
            self.world.hosts().all(|host| {
                host.lbctl
                    .output(&["status"])
                    .is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains("cut off from the store"))
            })
        })?;
        let noticed = Some(Instant::now());
        let host = &self.world.regions[1].hosts[0];
        let refused = host.lbctl.output(&["service", "set", "chat", "--drain", "62s"])?;
        ensure!(refused.status.code() == Some(4), "a change without a quorum: {refused:?}");
        // Health goes on without a store.
        self.world.regions[1].workers[0].http = None;
        let killed = Instant::now();
        for host in self.world.hosts() {
            wait::until(&format!("{} finds wa dead", host.name), PATIENCE, || {
                host.lbctl.backends("wa").is_ok_and(|all| all.iter().all(|b| b.slots == 0))
            })?;
        }
        let took = killed.elapsed();
        let Self { world, replica, .. } = self;
        world.regions[1].workers[0].revive(&world.bed, replica, WORK)?;
        let notes = vec![
            "changes are refused (exit code 4), forwarding and health checks go on".to_owned(),
            format!("meanwhile wa died, and was out of all tables after {} ms", took.as_millis()),
        ];
        // What was under way to wa when it died is no fault of etcd's.
        Ok(Outcome {
            happened: Some(happened),
            noticed,
            last_death: Some(killed + took),
            notes,
            ..Outcome::default()
        })
    }

    fn return_etcd(&mut self) -> Result<Outcome> {
        let began = Instant::now();
        self.world.restart_member(1)?;
        self.world.restart_member(2)?;
        let host = &self.world.regions[1].hosts[0];
        wait::until_some("a change is taken again", PATIENCE, || self.change(host, 63).ok())?;
        let usable = self.world.wait_usable().is_ok();
        ensure!(usable, "all is as before");
        let notes = vec![format!(
            "a change is in all hosts' maps {} ms after the first start",
            began.elapsed().as_millis()
        )];
        Ok(Outcome { notes, ..Outcome::default() })
    }
}

fn account(
    name: &str,
    seconds: f64,
    web: &Account,
    bound: &Account,
    held: &[Held],
    outcome: Outcome,
) -> Step {
    let Outcome { happened, noticed, last_death, is_moved, dead, mut notes } = outcome;
    let until = noticed.max(last_death);
    let under_way = web.failures().filter(|r| until.is_some_and(|at| r.started <= at)).count();
    let failed = web.failed() - under_way;
    let is_late = |r: &&crate::http::Request| {
        happened.is_some_and(|at| r.started >= at) && r.took > Duration::from_secs(2)
    };
    let late = web.requests.iter().filter(is_late).count();
    let since = happened.and_then(|at| {
        let after = web.requests.iter().filter(|r| r.failure.is_none() && r.started >= at);
        after.map(|r| r.took).max()
    });
    let (on_dead, others): (Vec<&Held>, Vec<&Held>) =
        held.iter().partition(|h| dead.contains(&h.worker.as_str()));
    let broken = others.iter().filter(|h| !h.stays()).count();
    let first = web.failures().filter(|r| until.is_none_or(|at| r.started > at)).take(3);
    notes.extend(first.map(|r| format!("failed: {}", r.failure.as_deref().unwrap_or_default())));
    notes.extend(
        others
            .iter()
            .filter(|h| !h.stays())
            .take(3)
            .map(|h| format!("broken: {} of {}: {:?}", h.local, h.worker, h.now)),
    );
    Step {
        name: name.to_owned(),
        seconds,
        detect_ms: happened.zip(noticed).map(|(a, b)| b.duration_since(a).as_millis() as u64),
        requests: web.requests.len(),
        failed,
        failed_under_way: under_way,
        retried: web.retried(),
        longest_ms: since.map_or(0, |took| took.as_millis() as u64),
        broken: if is_moved { 0 } else { broken },
        moved: if is_moved { broken } else { 0 },
        on_dead: on_dead.len(),
        late,
        by_worker: web.by_worker(),
        bound: bound.by_worker(),
        bound_failed: bound.failed(),
        notes,
    }
}
