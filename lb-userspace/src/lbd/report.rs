//! Reports this host's state to the other hosts: the revision in its maps, the hash of its tables, and how long
//! changes take to reach its maps.
//!
//! The hash covers the addresses that slots send new flows to, because indices differ between hosts.

use crate::{
    apply::reconcile::Published,
    clock,
    desired::store::Store,
    serve::api::{
        Control,
        store::{HostReport, Lag},
    },
};
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};

/// Number of recent changes that the lag is computed over.
const LAG_CHANGES: usize = 100;
/// Minimum time between two reports.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// Reports each change of the maps, until the reconciler ends.
///
/// # Errors
/// Never fails; the type is that of a supervised part.
pub async fn run(
    control: Arc<Control>,
    store: Arc<dyn Store>,
    base: HostReport,
    mut published: watch::Receiver<Arc<Published>>,
) -> anyhow::Result<()> {
    let mut lags: VecDeque<u64> = VecDeque::new();
    let mut report = base;
    let mut due = None;
    let mut earliest = Instant::now();
    published.mark_changed();
    let mut announcement = control.announcement_watch();
    loop {
        let announced = async {
            match &mut announcement {
                Some(watch) => watch.changed().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = published.changed() => if changed.is_err() { return Ok(()) },
            is_open = announced => if !is_open { announcement = None },
            () = tokio::time::sleep_until(due.unwrap_or(earliest)), if due.is_some() => {
                control.publish_report(report.clone());
                (due, earliest) = (None, Instant::now() + MIN_INTERVAL);
                continue;
            }
        }
        let now = published.borrow_and_update().clone();
        let (revision, table_hash) = (now.revision, format!("{:016x}", now.table_hash()));
        let vips = control.announcement().map(|a| a.on().collect());
        let draining = control.host_drain().is_some();
        let reported = (report.revision, &report.table_hash, &report.vips, report.draining);
        if (revision, &table_hash, &vips, draining) == reported {
            continue;
        }
        let time_ms = clock::unix_ms();
        // The revision at the start is not a new change.
        if report.time_ms > 0
            && revision > report.revision
            && let Ok(stored) = store.get(revision).await
        {
            if lags.len() == LAG_CHANGES {
                lags.pop_front();
            }
            lags.push_back(time_ms.saturating_sub(stored.revision.time_ms));
        }
        report = HostReport { revision, table_hash, time_ms, vips, draining, lag: lag(&lags), ..report };
        due = due.or(Some(earliest));
    }
}

fn lag(lags: &VecDeque<u64>) -> Lag {
    let changes = lags.len() as u64;
    Lag {
        changes,
        last_ms: lags.back().copied().unwrap_or(0),
        mean_ms: lags.iter().sum::<u64>().checked_div(changes).unwrap_or(0),
        max_ms: lags.iter().copied().max().unwrap_or(0),
    }
}
