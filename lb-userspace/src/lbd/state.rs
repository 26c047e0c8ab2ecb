//! State that outlives `lbd ingress`: the store of the desired state, and this host's local store.

use crate::{
    clock,
    desired::{
        config::Settings,
        store::{Local, LocalFile, Opener, Store, Stored, since},
    },
    observed::{health::Checker, replica::Watcher},
    plan::compile::Past,
    serve::api::{Control, store::FleetMember},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// Key of the reconciler's memory in the local store.
pub const MEMORY: &str = "reconciler";
/// Key of this host's instance id in the local store.
const INSTANCE: &str = "instance";
/// How long a start without saved memory reads the store's history.
const HISTORY_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of revisions that such a start reads.
const HISTORY_REVISIONS: usize = 256;
/// Delay before a change of the reconciler's memory is saved, to batch changes. If lbd is killed in between, the next
/// start reads the same facts from the maps.
const SAVE_DELAY: Duration = Duration::from_millis(50);

/// Opens this host's local store, and the store of the desired state.
pub async fn open_store(
    settings: &Settings,
) -> anyhow::Result<(Arc<LocalFile>, Arc<dyn Store>, FleetMember)> {
    let state_dir = settings.state_dir.clone();
    let local = tokio::task::spawn_blocking(move || LocalFile::open(&state_dir)).await??;
    let opener = Opener {
        local: local.clone(),
        keep: settings.revisions,
        access: settings.store_access.clone(),
        id: settings.store_id.clone(),
    };
    let store = opener.open(&settings.store).await?;
    let link = store.link().borrow().clone();
    let revision = store.head().revision.number;
    tracing::info!(
        engine = link.engine,
        place = link.place,
        connected = link.connected,
        revision,
        "store opened"
    );
    if let Some(refusal) = link.refusal() {
        tracing::warn!("{refusal}");
    }
    let host = match &settings.host {
        Some(host) => host.clone(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map_or_else(|_| "default".to_owned(), |name| name.trim().to_owned()),
    };
    store.join(&host, &instance(&local).await?);
    let (region, zone) = (settings.region.to_string(), settings.zone.to_string());
    Ok((Arc::new(local), store, FleetMember { host, region, zone, opener }))
}

/// This host's instance: what distinguishes it from another host of the same name, and stays over a restart of lbd. The
/// boot id is part of it because an image that is copied may hold a state directory.
async fn instance(local: &LocalFile) -> anyhow::Result<String> {
    let saved = local.load(INSTANCE).await?.and_then(|bytes| String::from_utf8(bytes).ok());
    let id = match saved.filter(|id| !id.is_empty()) {
        Some(id) => id,
        None => {
            let id = format!("{:016x}", rand::random::<u64>());
            local.save(INSTANCE, id.clone().into_bytes()).await?;
            id
        }
    };
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Ok(format!("{id} {}", boot.trim()))
}

/// Reads the states that were in force within the longest drain time of any service.
pub async fn recent_history(store: &dyn Store) -> Vec<Past> {
    let head = store.head();
    let drain_s = head.desired.services.values().map(|s| s.drain_s).max().unwrap_or(0);
    let (now_ms, boot_ms) = (clock::unix_ms(), clock::boot().as_millis() as i64);
    let since_ms = now_ms.saturating_sub(u64::from(drain_s) * 1_000);
    let found = tokio::time::timeout(HISTORY_TIMEOUT, since(store, since_ms, HISTORY_REVISIONS));
    let found = match found.await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot read the history: transitions in progress are unknown");
            vec![head]
        }
        Err(_) => {
            tracing::warn!("reading the history takes too long: transitions in progress are unknown");
            vec![head]
        }
    };
    tracing::info!("transitions of tables are rebuilt from the last {} revisions", found.len());
    let past = |stored: Stored| Past {
        from_ms: boot_ms - (now_ms as i64 - stored.revision.time_ms as i64),
        desired: stored.desired,
    };
    found.into_iter().map(past).collect()
}

/// Saves the reconciler's memory after each change.
pub async fn save_memory(mut kept: watch::Receiver<Vec<u8>>, store: Arc<LocalFile>) -> anyhow::Result<()> {
    while kept.changed().await.is_ok() {
        tokio::time::sleep(SAVE_DELAY).await;
        let bytes = kept.borrow_and_update().clone();
        if let Err(error) = store.save(MEMORY, bytes).await {
            tracing::error!(%error, "cannot save the reconciler's memory");
        }
    }
    Ok(())
}

/// Saves state that is otherwise saved with a delay.
pub async fn flush(local: &dyn Local, control: &Control, memory: &watch::Receiver<Vec<u8>>) {
    if let Err(error) = Checker::save(control.health(), local).await {
        tracing::error!(%error, "cannot save the health verdicts");
    }
    if let Err(error) = Watcher::save(control.replicas(), local).await {
        tracing::error!(%error, "cannot save the replica state");
    }
    let memory = memory.borrow().clone();
    if !memory.is_empty()
        && let Err(error) = local.save(MEMORY, memory).await
    {
        tracing::error!(%error, "cannot save the reconciler's memory");
    }
}
