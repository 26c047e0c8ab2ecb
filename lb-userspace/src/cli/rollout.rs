//! `lbctl rollout`: the lock that lets one roll-out at a time touch the regions.

use super::{Context, Exit, Failure};
use crate::{
    api::store::{LockRequest, Unlock},
    client::ClientError,
    model::Name,
    render::{store as render, units::parse_duration},
    store::Lock,
};
use clap::{Args, Subcommand};
use reqwest::Method;
use std::time::Duration;

/// Pause between attempts to get a lock that somebody else holds.
const AGAIN: Duration = Duration::from_secs(1);

/// What to do with roll-outs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take the lock, or renew it; with a command, hold it for as long as that runs
    #[command(
        after_help = "Examples:\n  lbctl rollout lock --reason 'new kernel in eu' -- ./drain-and-upgrade eu\n  \
        token=$(lbctl rollout lock --ttl 30m) && ./drain us; lbctl rollout unlock --token $token"
    )]
    Lock(LockArgs),
    /// Release the lock
    Unlock(UnlockArgs),
    /// Who holds which lock (exit code 1 if the named one is held)
    Status {
        /// Lock [default: all]
        name: Option<Name>,
    },
}

/// `rollout lock`.
#[derive(Debug, Args)]
pub struct LockArgs {
    /// Lock
    #[arg(default_value = "rollout")]
    name: Name,
    /// What for; others are told
    #[arg(long, value_name = "TEXT", default_value = "no reason given")]
    reason: String,
    /// So long without renewal, and it is free again
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10m")]
    ttl: Duration,
    /// Wait so long for whoever holds it
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "0s")]
    wait: Duration,
    /// Renew the lock that was answered with this token
    #[arg(long, value_name = "TOKEN", conflicts_with_all = ["wait", "command"])]
    token: Option<String>,
    /// Command to run while the lock is held; it is ended if the lock is lost
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// `rollout unlock`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("whose").required(true)))]
pub struct UnlockArgs {
    /// Lock
    #[arg(default_value = "rollout")]
    name: Name,
    /// What `rollout lock` printed
    #[arg(long, value_name = "TOKEN", group = "whose")]
    token: Option<String>,
    /// Release it whoever holds it
    #[arg(long, group = "whose")]
    force: bool,
}

/// Runs one.
pub async fn run(context: &mut Context<'_>, command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Lock(args) => lock(context, args).await,
        Command::Unlock(UnlockArgs { name, token, force }) => {
            let path = format!("/v1/locks/{name}");
            let query = Unlock { token, force };
            let left: Vec<Lock> = context.client.send(Method::DELETE, &path, &query, None::<&()>).await?;
            if context.out.json {
                context.out.json(&left, false)?;
            }
            eprintln!("lock {name} released");
            Ok(Exit::Ok)
        }
        Command::Status { name } => {
            let mut locks: Vec<Lock> = context.client.get("/v1/locks", &()).await?;
            locks.retain(|lock| name.as_ref().is_none_or(|name| *name.as_str() == lock.name));
            if context.out.json {
                context.out.json(&locks, false)?;
            } else if locks.is_empty() {
                eprintln!("no lock is held");
            } else {
                render::locks(&mut context.out, &locks)?;
            }
            Ok(if name.is_some() && !locks.is_empty() { Exit::No } else { Exit::Ok })
        }
    }
}

async fn lock(context: &mut Context<'_>, args: LockArgs) -> Result<Exit, Failure> {
    let LockArgs { name, reason, ttl, wait, token, command } = args;
    let path = format!("/v1/locks/{name}");
    let request = LockRequest { reason, ttl_s: ttl.as_secs(), token };
    let until = tokio::time::Instant::now() + wait;
    let lock = loop {
        match context.client.send::<Lock>(Method::POST, &path, &(), Some(&request)).await {
            Err(ClientError::Refused { info })
                if info.code == "held" && tokio::time::Instant::now() + AGAIN <= until =>
            {
                tokio::time::sleep(AGAIN).await;
            }
            other => break other?,
        }
    };
    let token = lock.token.clone().unwrap_or_default();
    if !command.is_empty() {
        let request = LockRequest { token: Some(token), ..request };
        return run_with(context, &path, &request, &command).await;
    }
    if context.out.json {
        context.out.json(&lock, false)?;
    } else {
        context.out.line(&token)?;
    }
    eprintln!("lock {name} is held for {} s; renew or release it with this token", lock.left_s);
    Ok(Exit::Ok)
}

/// Runs a command while renewing the lock, then releases it.
async fn run_with(
    context: &mut Context<'_>,
    path: &str,
    request: &LockRequest,
    command: &[String],
) -> Result<Exit, Failure> {
    let cannot = |e: std::io::Error| Failure::Refused {
        what: format!("cannot run {}: {e}", command[0]),
        fix: None,
        details: Vec::new(),
    };
    let started = tokio::process::Command::new(&command[0]).args(&command[1..]).kill_on_drop(true).spawn();
    let ended = match started {
        Err(error) => Err(cannot(error)),
        Ok(mut child) => {
            let every = Duration::from_secs(request.ttl_s.div_ceil(3));
            let mut last = tokio::time::Instant::now();
            loop {
                tokio::select! {
                    status = child.wait() => break status.map_err(cannot),
                    () = tokio::time::sleep(every) => {}
                }
                match context.client.send::<Lock>(Method::POST, path, &(), Some(request)).await {
                    Ok(_) => last = tokio::time::Instant::now(),
                    // An lbd that restarts, or is cut off for a moment, has not lost the lock yet.
                    Err(error) if last.elapsed().as_secs() + every.as_secs() < request.ttl_s => {
                        eprintln!("the lock is not renewed yet: {error}");
                    }
                    Err(error) => {
                        eprintln!("the lock is lost, and the command is ended");
                        let _ = child.kill().await;
                        return Err(error.into());
                    }
                }
            }
        }
    };
    let query = Unlock { token: request.token.clone(), force: false };
    let released = context.client.send::<Vec<Lock>>(Method::DELETE, path, &query, None::<&()>).await;
    let status = ended?;
    released?;
    Ok(if status.success() { Exit::Ok } else { Exit::No })
}
