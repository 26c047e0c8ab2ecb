//! The services of the configuration file: loaded at the start and on SIGHUP.

use super::{describe, notify};
use crate::{
    desired::{
        config::{File, Options, export},
        model::Desired,
        store::Local,
    },
    serve::api::{self, Control, types},
};
use anyhow::Context;
use sd_notify::NotifyState;
use std::path::Path;

/// Key, in the local store, of the configuration file's services as they were last loaded.
const FILE_SERVICES: &str = "config-file";

/// When a file's services become the desired state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadWhen {
    /// If they differ from those that were last loaded from the file, so that changes made by `lbctl` since then stay.
    IfChanged,
    /// Always, because the operator asked for it.
    Always,
}

/// Makes the services of the configuration file the desired state.
pub async fn load_services(
    control: &Control,
    local: &dyn Local,
    path: &Path,
    desired: Desired,
    load: LoadWhen,
) -> anyhow::Result<()> {
    let text = export(&desired).into_bytes();
    if load == LoadWhen::IfChanged && local.load(FILE_SERVICES).await?.as_ref() == Some(&text) {
        tracing::info!(file = %path.display(), "services of the file are unchanged since they were last loaded: keeping the store's state");
        return Ok(());
    }
    let message = format!("services of {}", path.display());
    let query = types::WriteQuery { message: Some(message), ..Default::default() };
    let author = api::Author::daemon();
    let change = control.write(&author, &query, |state| {
        let mut wanted = desired.clone();
        wanted.keep_operations(state);
        *state = wanted;
        Ok(())
    });
    let change = change.await.with_context(|| format!("cannot apply the services of {}", path.display()))?;
    local.save(FILE_SERVICES, text).await?;
    let (revision, changes) = (change.revision, change.differences.len());
    tracing::info!(file = %path.display(), revision, changes, "services loaded");
    Ok(())
}

/// Handles SIGHUP: reads the configuration file again. If the file is invalid, logs the error and changes nothing.
pub async fn reload(control: &Control, local: &dyn Local, config: Option<&Path>, started_with: &Options) {
    let usec = NotifyState::monotonic_usec_now();
    match usec {
        Ok(usec) => notify(&[NotifyState::Reloading, usec]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
    let result = async {
        let path = config.context("lbd was started without --config: no file to reload")?;
        let owned = path.to_owned();
        let file = tokio::task::spawn_blocking(move || File::read(&owned)).await??;
        file.options.clone().resolve()?;
        if file.options != *started_with {
            tracing::warn!("[lbd] has changed: restart lbd to apply it (no packet is lost)");
        }
        match file.desired {
            Some(desired) => load_services(control, local, path, desired, LoadWhen::Always).await,
            None => Ok(()),
        }
    };
    match result.await {
        Ok(()) => tracing::info!("configuration reloaded"),
        Err(error) => {
            tracing::error!("cannot reload the configuration, nothing was changed: {}", describe(&error))
        }
    }
    notify(&[NotifyState::Ready]);
}
