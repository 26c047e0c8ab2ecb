//! Faults of workers, hosts and stores, and how they end.

use super::{
    environment,
    shared::LinkState,
    simulation::{Simulation, Violation, violated},
    workers::{Reporting, Worker},
};
use std::{net::IpAddr, time::Duration};

macro_rules! faults {
    ($($name:ident $label:literal,)*) => {
        /// Kinds of faults: columns of the coverage table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Fault { $($name,)* }

        impl Fault {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }
        }
    };
}

faults! {
    BackendDies "backend dies",
    BackendSlow "backend slow",
    ReplicaPhase "replica phase",
    ReplicaStale "stale report",
    ReplicaRepeats "report twice",
    ReplicaGarbage "garbage report",
    ReplicaSilent "silent replica",
    HostCrash "crash",
    DiskFull "disk full",
    StoreCut "store cut off",
    StoreSlow "store slow",
    Compaction "compaction",
    MapsFail "map write fails",
    ClockStep "clock step",
    StoreLost "store lost",
    NoRoom "no room",
}

impl Fault {
    fn is_of_worker(self) -> bool {
        self <= Self::ReplicaSilent
    }
}

impl Simulation {
    /// Injects a fault, or ends one.
    pub fn inject(&mut self) -> Result<(), Violation> {
        let all = [
            (Fault::BackendDies, 16),
            (Fault::BackendSlow, 4),
            (Fault::ReplicaPhase, 5),
            (Fault::ReplicaStale, 7),
            (Fault::ReplicaRepeats, 2),
            (Fault::ReplicaGarbage, 2),
            (Fault::ReplicaSilent, 2),
            (Fault::HostCrash, 6),
            (Fault::DiskFull, 3),
            (Fault::StoreCut, 5),
            (Fault::StoreSlow, 3),
            (Fault::Compaction, 1),
            (Fault::MapsFail, 3),
            (Fault::ClockStep, 3),
            (Fault::StoreLost, 1),
        ];
        let fault = self.random.weighted(&all);
        if fault.is_of_worker() {
            self.inject_worker(fault);
            return Ok(());
        }
        let host = self.random.below(self.hosts.len() as u64) as usize;
        let (name, is_shared) = (self.hosts[host].setup.name.clone(), self.cluster.is_some());
        match fault {
            Fault::HostCrash => self.crash(host),
            Fault::DiskFull if self.hosts[host].setup.disk.is_filling() => {
                self.hosts[host].setup.disk.free();
                self.active.remove(&fault);
                self.note(format!("{name}: the disk has room again"));
            }
            Fault::DiskFull => {
                let writes = self.random.below(40);
                self.hosts[host].setup.disk.fill_after(writes);
                self.begin(fault, format!("{name}: the disk is full after {writes} writes"));
            }
            Fault::StoreCut | Fault::StoreSlow if is_shared => self.change_link(host, fault),
            Fault::Compaction => {
                if let Some(cluster) = &self.cluster {
                    cluster.lock().unwrap_or_else(std::sync::PoisonError::into_inner).compact(20);
                    self.begin(fault, "the store's old revisions are removed");
                }
            }
            Fault::MapsFail => {
                let writes = self.random.below(60) as u32;
                self.hosts[host].setup.maps.lock().fails_after.set(Some(writes));
                self.begin(fault, format!("{name}: a map write fails after {writes} more"));
            }
            Fault::ClockStep => {
                let by_ms = self.random.one_of(&[-3_600_000, -5_000, -200, 300, 10_000, 7_200_000]);
                self.hosts[host].setup.wall_ms = by_ms;
                self.begin(fault, format!("{name}: the wall clock is off by {by_ms} ms"));
            }
            Fault::StoreLost if !is_shared => return self.lose_store(host),
            _ => {}
        }
        self.hosts[host].disturbed = environment::now();
        Ok(())
    }

    fn begin(&mut self, fault: Fault, line: impl Into<String>) {
        self.active.insert(fault);
        self.note(line);
    }

    /// Kills a host's daemon between two polls of whatever it does.
    pub fn crash(&mut self, host: usize) {
        let down_ms = self.random.weighted(&[(1, 2), (500, 2), (15_000, 1)]);
        let polls = self.random.below(60);
        let name = self.hosts[host].setup.name.clone();
        if let Some(daemon) = self.hosts[host].daemon.take() {
            environment::set_wall_offset(self.hosts[host].setup.wall_ms);
            daemon.run_polls(polls);
            drop(daemon);
            self.begin(Fault::HostCrash, format!("{name}: lbd is killed for {down_ms} ms"));
        }
        self.hosts[host].starts_at = environment::now() + Duration::from_millis(down_ms);
        self.hosts[host].disturbed = environment::now();
    }

    fn change_link(&mut self, host: usize, fault: Fault) {
        let name = self.hosts[host].setup.name.clone();
        let state = if !self.hosts[host].setup.link.is_good() {
            self.active.remove(&Fault::StoreCut);
            self.active.remove(&Fault::StoreSlow);
            self.note(format!("{name}: the store is in reach again"));
            LinkState::default()
        } else if fault == Fault::StoreCut {
            self.begin(fault, format!("{name}: cut off from the store"));
            LinkState { is_cut: true, ..LinkState::default() }
        } else {
            let delay = Duration::from_millis(self.random.one_of(&[50, 500, 3_000]));
            self.begin(fault, format!("{name}: the store takes {delay:?} each way"));
            LinkState { is_cut: false, delay }
        };
        self.hosts[host].setup.link.set(state);
    }

    /// An address of a worker, mostly one that a service uses.
    fn any_worker(&mut self) -> Option<IpAddr> {
        let (_, head) = self.head();
        let all: Vec<IpAddr> =
            head.services.values().flat_map(|s| s.backends.values().map(|b| b.address)).collect();
        (!all.is_empty()).then(|| self.random.one_of(&all))
    }

    fn inject_worker(&mut self, fault: Fault) {
        let Some(address) = self.any_worker() else { return };
        let (now, before) = (environment::now(), self.workers.get(address));
        let delay = Duration::from_millis(self.random.one_of(&[50, 150, 400]));
        let phase = self.random.one_of(&["ready", "draining", "loading", "failed"]);
        let mut next = Worker::clone(&before);
        match fault {
            Fault::BackendDies => (next.is_alive, next.since) = (!before.is_alive, now),
            Fault::BackendSlow => (next.delay, next.since) = (delay, now),
            Fault::ReplicaPhase => (next.phase, next.phase_since) = (phase, now),
            Fault::ReplicaStale => {
                // A replica that is not ready, and whose old reports say that it is.
                (next.reporting, next.phase, next.phase_since) = (Reporting::Stale, "draining", now);
            }
            Fault::ReplicaRepeats => next.reporting = Reporting::Repeated,
            Fault::ReplicaGarbage => next.reporting = Reporting::Garbage,
            _ => (next.reporting, next.phase_since) = (Reporting::Silent, now),
        }
        if before.reporting == Reporting::Silent {
            next.phase_since = now;
        }
        let line = format!(
            "worker {address}: alive {}, answers in {:?}, says {}, reports {:?}",
            next.is_alive, next.delay, next.phase, next.reporting
        );
        self.workers.change(address, |worker| *worker = next);
        self.begin(fault, line);
    }

    /// Starts a host with an empty store, while its maps hold services: nothing may be removed. Then gives it back its own.
    fn lose_store(&mut self, host: usize) -> Result<(), Violation> {
        if self.hosts[host].daemon.is_none() || self.hosts[host].setup.disk.is_filling() {
            return Ok(());
        }
        self.begin(Fault::StoreLost, "the store's directory is empty at a restart");
        self.crash(host);
        let own = self.hosts[host].setup.store_directory.clone();
        let empty = own.join(format!("lost-{}", environment::now().as_millis()));
        let keys = self.hosts[host].setup.maps.lock().keys.clone();
        self.hosts[host].setup.store_directory = empty;
        self.hosts[host].starts_at = environment::now();
        self.history.is_store_lost = true;
        self.advance(Duration::from_secs(3))?;
        self.history.is_store_lost = false;
        let found = self.hosts[host].setup.maps.lock().keys.clone();
        let status = self.get(host, "/v1/status");
        self.crash(host);
        self.hosts[host].setup.store_directory = own;
        if found != keys {
            let what = format!("the maps had {} services, and have {} now", keys.len(), found.len());
            return violated("an empty store removes nothing", what);
        }
        let Some(status) = status else { return Ok(()) };
        if !keys.is_empty() && (status["healthy"] == true || status["orphaned_services"] == 0) {
            return violated("an empty store removes nothing", format!("status does not say it: {status}"));
        }
        Ok(())
    }

    /// Ends all faults.
    pub fn heal(&mut self) {
        self.note("all faults end");
        self.workers.heal();
        let now = environment::now();
        for host in &mut self.hosts {
            let setup = &mut host.setup;
            let was_disturbed = setup.disk.is_filling() || !setup.link.is_good() || setup.wall_ms != 0;
            setup.disk.free();
            setup.link.set(LinkState::default());
            setup.maps.lock().fails_after.set(None);
            if setup.wall_ms != 0 {
                self.clock_was_wrong = Some(now);
            }
            setup.wall_ms = 0;
            if was_disturbed {
                host.disturbed = now;
            }
            host.starts_at = host.starts_at.min(now);
        }
        self.active.clear();
    }
}
