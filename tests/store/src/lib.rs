//! What every store must do, asked of each engine by the same tests.
//!
//! Input: a [`Fixture`] that opens stores over the same data. [`conformance!`] makes a test of each promise.
//! No root is needed; the etcd tests need Debian's `etcd-server`.

pub mod promises;

use std::{future::Future, sync::Arc, time::UNIX_EPOCH};

use anyhow::Result;
use lb_userspace::desired::{
    model::{Desired, generate},
    store::{Commit, Store},
};
use serde_json::{Map, json};

/// An engine with data of its own.
pub trait Fixture: Sync {
    /// Opens the data; what was open before is closed by then, unless the engine takes several at once.
    fn open(&self, keep: u64) -> impl Future<Output = Result<Arc<dyn Store>>> + Send;

    /// Opens other data, empty at first.
    fn open_other(&self) -> impl Future<Output = Result<Arc<dyn Store>>> + Send;

    /// Whether several may be open at once.
    fn is_shared(&self) -> bool;
}

/// A state with these services, each `(name, port, weights of its backends)`.
pub fn state(services: &[(&str, u16, &[u32])]) -> Arc<Desired> {
    let mut map = Map::new();
    for (name, port, weights) in services {
        let mut backends = Map::new();
        for (i, weight) in weights.iter().enumerate() {
            let address = format!("10.1.{}.{}", i / 250, i % 250 + 1);
            backends.insert(format!("b{i}"), json!({"address": address, "weight": weight}));
        }
        let service = json!({"vip": "10.0.0.1", "port": port, "protocol": "tcp", "backends": backends});
        map.insert((*name).to_owned(), service);
    }
    let desired = serde_json::from_value(json!({ "services": map }));
    Arc::new(desired.expect("the state is sound"))
}

/// A state with every field set, another for each number.
pub fn full(seed: u64) -> Arc<Desired> {
    Arc::new(generate::state(seed, true))
}

/// A commit by ann, a second after the one before.
pub fn commit(expected: u64, desired: Arc<Desired>) -> Commit {
    let time = UNIX_EPOCH + std::time::Duration::from_millis(1_000 * (expected + 1));
    Commit {
        expected,
        desired,
        author: "ann".into(),
        message: format!("from {expected}"),
        summary: None,
        time,
    }
}

/// A test of each promise over a fixture, made anew for each by the expression.
#[macro_export]
macro_rules! conformance {
    ($fixture:expr; $($promise:ident)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $promise() -> anyhow::Result<()> {
            let fixture = $fixture.await?;
            $crate::promises::$promise(&fixture).await
        })*
    };
    ($fixture:expr) => {
        $crate::conformance! { $fixture;
            revisions_last_and_conflicts_are_told
            writers_at_once_do_not_lose_each_other
            old_revisions_are_forgotten
            changes_are_told_by_service
            any_history_reads_back_as_it_was_written
            every_field_outlives_the_process
            a_large_state_is_one_revision
            an_import_brings_all_revisions_and_only_into_an_empty_store
            a_backup_restores_elsewhere
            what_has_moved_takes_no_changes
            a_migration_that_is_cut_short_leaves_the_store_in_use
            what_was_in_force_at_a_time_is_found
            values_are_told_and_taken_back
            members_stay_until_they_are_forgotten
            a_lock_has_one_holder
            a_lock_runs_out
        }
    };
}
