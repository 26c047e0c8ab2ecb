//! `lbctl host`.

use super::{Context, Exit, Failure, lists::ListFlags};
use crate::{
    lbctl::render::{host as render, units::parse_duration},
    serve::api::{
        host::{DrainRequest, HostInfo},
        members::HostMember,
    },
};
use clap::Subcommand;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use std::time::Duration;

/// Time between two polls of a drain that waits.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// A host is quiet when no packet has arrived for this long.
const QUIET_MS: u64 = 2_000;

/// Subcommands of `lbctl host`.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Show the VIPs that this host announces, and its drain
    Show,
    /// Withdraw this host's VIPs, so that routers send clients elsewhere; packets that still arrive are forwarded
    #[command(after_help = "Example: lbctl host drain --reason 'new kernel' --wait 60s && systemctl reboot")]
    Drain {
        /// Reason for the drain
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        /// Wait up to this time until no packet has arrived for 2 s (exit code 1 if packets still arrive)
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        wait: Option<Duration>,
    },
    /// Announce this host's VIPs again
    Undrain,
    /// List all hosts of the fleet: live or gone, version, revision, last seen, clock (exit code 1 if one is gone)
    List(ListFlags),
    /// Forget a host that left for good
    Forget {
        /// Name of the host
        name: String,
    },
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: HostCommand) -> Result<Exit, Failure> {
    let (info, exit) = match command {
        HostCommand::Show => (context.client.get("/v1/host", &()).await?, Exit::Ok),
        HostCommand::Undrain => {
            let info: HostInfo =
                context.client.send(Method::POST, "/v1/host/undrain", &(), None::<&()>).await?;
            (info, Exit::Ok)
        }
        HostCommand::Drain { reason, wait } => drain(context, reason, wait).await?,
        HostCommand::List(flags) => {
            let list = async |context: &mut Context<'_>| {
                let list: Vec<HostMember> = context.client.get("/v1/hosts", &()).await?;
                hosts(context, &list)
            };
            return context.list(&flags, list).await;
        }
        HostCommand::Forget { name } => {
            let path = format!("/v1/hosts/{}", utf8_percent_encode(&name, NON_ALPHANUMERIC));
            let list: Vec<HostMember> = context.client.send(Method::DELETE, &path, &(), None::<&()>).await?;
            return hosts(context, &list).map(|_| Exit::Ok);
        }
    };
    if context.out.json {
        context.out.json(&info, false)?;
    } else {
        render::host(&mut context.out, &info)?;
    }
    Ok(exit)
}

fn hosts(context: &mut Context<'_>, list: &[HostMember]) -> Result<Exit, Failure> {
    if context.out.json {
        context.out.json(&list, false)?;
    } else {
        render::hosts(&mut context.out, list)?;
    }
    Ok(if list.iter().all(|h| h.is_live) { Exit::Ok } else { Exit::No })
}

async fn drain(
    context: &mut Context<'_>,
    reason: String,
    wait: Option<Duration>,
) -> Result<(HostInfo, Exit), Failure> {
    let body = DrainRequest { reason };
    let mut info: HostInfo = context.client.send(Method::POST, "/v1/host/drain", &(), Some(&body)).await?;
    let is_off = |info: &HostInfo| info.announcement.as_ref().is_none_or(|a| a.on().next().is_none());
    let Some(wait) = wait else {
        let exit = if is_off(&info) { Exit::Ok } else { Exit::No };
        return Ok((info, exit));
    };
    let until = tokio::time::Instant::now() + wait;
    loop {
        let is_quiet = info.quiet_ms.is_some_and(|ms| ms >= QUIET_MS);
        if info.drain.is_none() {
            return Err(Failure::Refused {
                what: "the drain was ended while this command waited for it".to_owned(),
                fix: None,
                details: Vec::new(),
            });
        }
        if is_off(&info) && is_quiet {
            return Ok((info, Exit::Ok));
        }
        if tokio::time::Instant::now() >= until {
            return Ok((info, Exit::No));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
        info = context.client.get("/v1/host", &()).await?;
    }
}
