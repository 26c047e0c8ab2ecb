//! The services of the configuration file: loaded at the start and on SIGHUP.

use super::{describe, notify};
use crate::{
    desired::{
        config::{ConfigError, File, Hook, Options, export, merge},
        model::{Desired, differences},
        store::{Local, Stored},
    },
    serve::api::{self, Control, types},
};
use anyhow::Context;
use sd_notify::NotifyState;
use std::path::Path;

/// Key, in the local store, of the configuration file's services as they were last loaded.
const FILE_SERVICES: &str = "config-file";

/// Makes what changed in the configuration file since it was last loaded part of the desired state. The first time, the
/// file's services become the desired state.
pub async fn load_services(
    control: &Control,
    local: &dyn Local,
    path: &Path,
    desired: Desired,
) -> anyhow::Result<()> {
    let text = export(&desired).into_bytes();
    let before = local.load(FILE_SERVICES).await?;
    if before.as_ref() == Some(&text) {
        tracing::info!(file = %path.display(), "services of the file are unchanged since they were last loaded: keeping the store's state");
        return Ok(());
    }
    // A text that this version cannot read says nothing about who changed what since.
    let mut before = before.and_then(|text| File::parse(std::str::from_utf8(&text).ok()?).ok()?.desired);
    if let Some(before) = &mut before {
        before.forget_unnamed(&desired);
    }
    let message = format!("services of {}", path.display());
    let query = types::WriteQuery { message: Some(message), force: true, ..Default::default() };
    let author = api::Author::daemon();
    let mut kept = 0;
    let change = control.write(&author, &query, |state| {
        let mut wanted = desired.clone();
        wanted.keep_operations(state);
        if let Some(before) = &before {
            let mut of_file = desired.clone();
            of_file.keep_operations(state);
            let mut before = before.clone();
            before.keep_operations(state);
            match merge(&before, &of_file, state) {
                Ok(merged) => {
                    kept = differences(&wanted, &merged).len();
                    wanted = merged;
                }
                // Cannot happen with fields that are valid each by itself; the file alone is valid.
                Err(error) => {
                    tracing::warn!(%error, "cannot merge the file with later changes: the file wins")
                }
            }
        }
        *state = wanted;
        Ok(())
    });
    let change = change.await.with_context(|| format!("cannot apply the services of {}", path.display()))?;
    local.save(FILE_SERVICES, text).await?;
    let (revision, changes) = (change.revision, change.differences.len());
    tracing::info!(file = %path.display(), revision, changes, kept, "services loaded; `kept` counts what lbctl changed since and the file did not");
    Ok(())
}

/// Decides about mistakes in the services of the file at the start: with a stored state, lbd starts on that and reports
/// them; returns them in words.
///
/// # Errors
/// Nothing is stored to start on.
pub fn tolerate(mistakes: Option<ConfigError>, head: &Stored) -> anyhow::Result<Option<String>> {
    match mistakes {
        Some(error) if head.revision.number == 0 => Err(error.into()),
        Some(error) => {
            tracing::error!(
                revision = head.revision.number,
                "the services of the configuration file have mistakes; starting with the stored state: {error}"
            );
            Ok(Some(error.to_string()))
        }
        None => Ok(None),
    }
}

/// Handles SIGHUP: reads the configuration file again. If the file is invalid, logs the error and changes nothing.
pub async fn reload(
    control: &Control,
    local: &dyn Local,
    config: Option<&Path>,
    (started_with, hooks): (&Options, &[Hook]),
) {
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
        if file.options != *started_with || file.hooks != hooks {
            tracing::warn!("[lbd] or [[hook]] has changed: restart lbd to apply it (no packet is lost)");
        }
        match file.desired {
            Some(desired) => load_services(control, local, path, desired).await,
            None => Ok(()),
        }
    };
    match result.await {
        Ok(()) => {
            control.set_file_problem(None);
            tracing::info!("configuration reloaded");
        }
        Err(error) => {
            let what = describe(&error);
            tracing::error!("cannot reload the configuration, nothing was changed: {what}");
            control.set_file_problem(Some(what));
        }
    }
    notify(&[NotifyState::Ready]);
}
