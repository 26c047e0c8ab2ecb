//! `lbctl store`.

use super::{Context, Exit, Failure, WriteFlags};
use crate::{
    desired::store::backup::Backup,
    lbctl::render::store as render,
    serve::api::store::{Accept, Filled, Migrate, StoreInfo},
};
use clap::Subcommand;
use reqwest::Method;
use std::{
    fs::File,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Subcommands of `lbctl store`.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Show the store, its members, and the lag of each region (exit code 1 if disconnected, migrated elsewhere, a host is gone, or a member is unhealthy)
    Status,
    /// Copy all revisions to another, empty store; this store then refuses changes
    #[command(after_help = "Example: lbctl store migrate --to etcd://10.0.0.1,10.0.0.2,10.0.0.3\n\
        Then restart each lbd with the same URL as --store.")]
    Migrate {
        /// Destination: file:///DIRECTORY, or etcd://HOST:PORT,HOST:PORT[/PREFIX] (etcds:// for TLS)
        #[arg(long, value_name = "URL")]
        to: String,
    },
    /// Write all kept revisions to a new file
    Backup {
        /// File to create, or - for standard output; must not exist yet
        file: PathBuf,
    },
    /// Restore a backup: all its revisions if the store is empty, otherwise its newest state as a new revision
    Restore {
        /// File, or - for standard input
        file: PathBuf,
        #[command(flatten)]
        write: WriteFlags,
    },
    /// Accept a store that is empty (removes the services that the maps still forward), or that is older than what this
    /// host has seen (an empty one is filled with what this host knows)
    Accept {
        /// Revision of the store, as `lbctl status` shows it; without it, print what can be accepted
        revision: Option<u64>,
    },
    /// Undo a migration: the store that was migrated away accepts changes again
    #[command(after_help = "Do this only if no lbd uses the other store: the two stores would diverge.")]
    Unretire {
        /// Confirm that no lbd uses the other store
        #[arg(long, required = true)]
        yes: bool,
    },
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: StoreCommand) -> Result<Exit, Failure> {
    match command {
        StoreCommand::Status => {
            let info: StoreInfo = context.client.get("/v1/store", &()).await?;
            status(context, &info)
        }
        StoreCommand::Migrate { to } => {
            let body = Migrate { to };
            let client = context.client.with_long_timeout();
            let filled: Filled = client.send(Method::POST, "/v1/store/migrate", &(), Some(&body)).await?;
            if context.out.json {
                context.out.json(&filled, false)?;
            }
            let Filled { store, revisions, revision, .. } = &filled;
            say!("{revisions} revisions, up to {revision}, copied to {store}");
            say!("this store now refuses changes: restart each lbd with --store {store}");
            Ok(Exit::Ok)
        }
        StoreCommand::Backup { file } => {
            let backup: Backup = context.client.with_long_timeout().get("/v1/store/backup", &()).await?;
            let bytes = backup.to_bytes().map_err(|e| Failure::Internal(e.to_string()))?;
            if file == Path::new("-") {
                context.out.raw(&bytes)?;
            } else {
                write_new(&file, &bytes).map_err(|e| cannot("write", &file, &e))?;
            }
            let newest = backup.revisions.last().map_or(0, |e| e.revision.number);
            say!("{} revisions, up to {newest}, written to {}", backup.revisions.len(), file.display());
            Ok(Exit::Ok)
        }
        StoreCommand::Restore { file, write } => {
            let mut bytes = Vec::new();
            let read = if file == Path::new("-") {
                std::io::stdin().read_to_end(&mut bytes)
            } else {
                File::open(&file).and_then(|mut f| f.read_to_end(&mut bytes))
            };
            read.map_err(|e| cannot("read", &file, &e))?;
            let refused = |e: crate::desired::store::StoreError| {
                let fix = Some("give a file that `lbctl store backup` wrote".to_owned());
                Failure::Refused { what: e.to_string(), fix, details: Vec::new() }
            };
            let backup = Backup::parse(&file.display().to_string(), &bytes).map_err(refused)?;
            let path = "/v1/store/restore";
            let client = context.client.with_long_timeout();
            let filled: Filled = client.send(Method::POST, path, &write.query(), Some(&backup)).await?;
            report_restored(context, &filled)
        }
        StoreCommand::Accept { revision: None } => {
            let info: StoreInfo = context.client.get("/v1/store", &()).await?;
            Err(describe_acceptable(&info))
        }
        StoreCommand::Accept { revision: Some(revision) } => {
            let body = Some(Accept { revision });
            let info: StoreInfo =
                context.client.send(Method::POST, "/v1/store/accept", &(), body.as_ref()).await?;
            status(context, &info)
        }
        StoreCommand::Unretire { .. } => {
            let info: StoreInfo =
                context.client.send(Method::POST, "/v1/store/unretire", &(), None::<&()>).await?;
            say!("this store accepts changes again, from revision {} on", info.revision.number);
            status(context, &info)
        }
    }
}

/// Says what `store accept` could accept; never a success, since nothing was accepted.
fn describe_acceptable(info: &StoreInfo) -> Failure {
    let (what, fix) = match (info.orphaned_services, info.link.set_back) {
        (0, None) => {
            let why = info.link.problem.as_deref().unwrap_or("this host uses the store's newest revision");
            (format!("there is nothing to accept: {why}"), None)
        }
        (0, Some(found)) => {
            let seen = info.revision.number;
            let what = format!("the store is at revision {found}, but this host has seen {seen}");
            (what, Some(format!("run `lbctl store accept {found}` to use revision {found}")))
        }
        (services, _) => {
            let what = format!("the store is empty, but the maps hold services ({services})");
            (what, Some("run `lbctl store accept 0` to remove them".to_owned()))
        }
    };
    Failure::Refused { what, fix, details: Vec::new() }
}

fn status(context: &mut Context<'_>, info: &StoreInfo) -> Result<Exit, Failure> {
    if context.out.json {
        context.out.json(info, false)?;
    } else {
        render::status(&mut context.out, info)?;
    }
    let is_healthy = info.link.connected
        && info.link.moved.is_none()
        && info.orphaned_services == 0
        && info.gone.is_empty()
        && info.link.name_taken.is_none()
        && info.about.members.iter().all(|m| m.healthy);
    Ok(if is_healthy { Exit::Ok } else { Exit::No })
}

fn report_restored(context: &mut Context<'_>, filled: &Filled) -> Result<Exit, Failure> {
    if context.out.json {
        context.out.json(filled, false)?;
    }
    match &filled.change {
        None => {
            say!("{} revisions, up to {}, restored to {}", filled.revisions, filled.revision, filled.store)
        }
        Some(change) => {
            if change.dry_run && !context.out.json {
                crate::lbctl::render::change::differences(&mut context.out, &change.differences)?;
            }
            say!("{}", crate::lbctl::render::change::summary("restored", change));
        }
    }
    Ok(Exit::Ok)
}

fn cannot(what: &str, file: &Path, error: &std::io::Error) -> Failure {
    let what = format!("cannot {what} {}: {error}", file.display());
    Failure::Refused { what, fix: None, details: Vec::new() }
}

/// Creates a file that only its owner can read, because the state contains addresses.
fn write_new(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut new = File::options().write(true).create_new(true).mode(0o600).open(file)?;
    let written = new.write_all(bytes).and_then(|()| new.sync_all());
    if written.is_err() {
        // A partial backup is useless.
        let _ = std::fs::remove_file(file);
    }
    written
}
