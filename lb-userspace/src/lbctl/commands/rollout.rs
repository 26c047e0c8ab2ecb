//! `lbctl rollout`: new versions of models, and the lock that admits one rollout at a time.

use super::{Context, Exit, Failure, WriteFlags};
use crate::{
    desired::{
        model::{Name, Rollout, percent},
        store::Lock,
    },
    lbctl::{
        client::ClientError,
        render::{region as render_region, store as render, units::parse_duration},
    },
    observed::regions::RolloutShown,
    serve::api::{
        locks::{HeldLock, LockRequest, Unlock},
        rollouts::{StartRollout, WhichRollout},
    },
};
use clap::{Args, Subcommand};
use reqwest::Method;
use std::time::Duration;

/// Pause between attempts to take a lock that somebody else holds.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Subcommands of `lbctl rollout`.
#[derive(Debug, Subcommand)]
pub enum RolloutCommand {
    /// Send a share of the new flows to replicas of a new version, and abort if they do badly
    #[command(after_help = "Example: lbctl rollout start --model llama-8b --version v2 --to 5%")]
    Start(Start),
    /// Change the share of a running rollout, or the regions that it includes
    #[command(after_help = "Example: lbctl rollout step --to 25% --regions east,west")]
    Step(Step),
    /// Send all new flows to the new version, in all regions; where no replica runs it, the old version serves
    Promote(Forced),
    /// Send no new flows to the new version
    Abort(Which),
    /// Remove a rollout: all replicas take flows by their weights again
    Clear(Forced),
    /// Take or renew the lock; with a command, hold the lock while the command runs
    #[command(
        after_help = "Examples:\n  lbctl rollout lock --reason 'new kernel in eu' -- ./drain-and-upgrade eu\n  \
        token=$(lbctl rollout lock --ttl 30m) && ./drain us; lbctl rollout unlock --token $token"
    )]
    Lock(LockArgs),
    /// Release the lock
    Unlock(UnlockArgs),
    /// Show rollouts and held locks (exit code 1 if the named lock is held)
    Status {
        /// Name of a lock [default: all]
        name: Option<Name>,
    },
}

/// Arguments of `lbctl rollout start`.
#[derive(Debug, Args)]
pub struct Start {
    /// Name of the model, as replicas report it
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// New version of the model, as replicas report it
    #[arg(long, value_name = "VERSION")]
    version: String,
    /// Share of the new flows that the new version gets, in percent
    #[arg(long, value_name = "PERCENT", value_parser = share)]
    to: u16,
    /// Regions that the rollout includes, separated by commas; in others, the old version serves [default: all]
    #[arg(long, value_name = "REGIONS", value_delimiter = ',')]
    regions: Vec<Name>,
    /// Name of a service; may be repeated [default: all whose replicas report the model]
    #[arg(long, value_name = "SERVICE")]
    service: Vec<Name>,
    /// Abort if more of the new version's requests fail, and more than the old version's; 0 for never
    #[arg(long, value_name = "PERCENT", default_value = "5", value_parser = whole_percent)]
    max_errors: u32,
    /// Abort if the new version's time to first token exceeds this percentage of the old version's; 0 for never
    #[arg(long, value_name = "PERCENT", default_value = "200", value_parser = whole_percent)]
    max_latency: u32,
    /// Requests that the new version must have served before it is judged
    #[arg(long, value_name = "N", default_value_t = 20)]
    min_requests: u32,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `lbctl rollout step`, `promote`, `abort` and `clear`.
#[derive(Debug, Args)]
pub struct Which {
    /// Name of the model [default: the only one with a rollout]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Name of a service [default: all]
    #[arg(long, value_name = "SERVICE")]
    service: Option<Name>,
    /// Reason, kept with the rollout
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `lbctl rollout promote` and `clear`.
#[derive(Debug, Args)]
pub struct Forced {
    #[command(flatten)]
    which: Which,
    /// Also if this sends flows to a version that the rollout keeps them from: one that was aborted, in regions that
    /// the rollout does not include, or more than its share
    #[arg(long)]
    force: bool,
}

/// Arguments of `lbctl rollout step`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).multiple(true)))]
pub struct Step {
    /// Share of the new flows that the new version gets, in percent [default: unchanged]
    #[arg(long, value_name = "PERCENT", value_parser = share, group = "what")]
    to: Option<u16>,
    /// Regions that the rollout includes, separated by commas [default: unchanged]
    #[arg(long, value_name = "REGIONS", value_delimiter = ',', group = "what")]
    regions: Vec<Name>,
    /// Include all regions
    #[arg(long, group = "what", conflicts_with = "regions")]
    all_regions: bool,
    #[command(flatten)]
    which: Which,
}

/// Parses `5%`, `2.5 %` or `5` to thousandths.
fn share(text: &str) -> Result<u16, String> {
    let bad = || "give a percentage from 0.1 to 100, such as 5% or 2.5%".to_owned();
    let number: f64 = text.trim_end_matches('%').trim().parse().map_err(|_| bad())?;
    let permille = (number * 10.0).round();
    if !(1.0..=1_000.0).contains(&permille) || (permille - number * 10.0).abs() > 1e-6 {
        return Err(bad());
    }
    Ok(permille as u16)
}

fn whole_percent(text: &str) -> Result<u32, String> {
    text.trim_end_matches('%').trim().parse().map_err(|_| "give a whole percentage, such as 5%".to_owned())
}

async fn change(
    context: &mut Context<'_>,
    (verb, done): (&str, &str),
    which: Which,
    more: WhichRollout,
) -> Result<Exit, Failure> {
    let Which { model, service, reason, write } = which;
    let body = WhichRollout { model, service, reason, ..more };
    let path = format!("/v1/rollouts/{verb}");
    context.write(done, Method::POST, &path, &write.query(), Some(&body)).await
}

async fn step(context: &mut Context<'_>, args: Step) -> Result<Exit, Failure> {
    let Step { to, regions, all_regions, which } = args;
    let is_set = all_regions || !regions.is_empty();
    let more = WhichRollout { permille: to, regions: is_set.then_some(regions), ..WhichRollout::default() };
    change(context, ("step", "rollout changed"), which, more).await
}

async fn start(context: &mut Context<'_>, args: Start) -> Result<Exit, Failure> {
    let Start { model, version, to, regions, service, max_errors, max_latency, min_requests, write } = args;
    let too_much = |_| Failure::Usage { what: format!("--max-errors {max_errors} is above 100") };
    let what = format!("version {version} of {model} gets {}", percent(to));
    let rollout = Rollout {
        model,
        version,
        permille: to,
        regions,
        state: crate::desired::model::RolloutState::Running,
        since_ms: 0,
        reason: String::new(),
        most_errors_percent: max_errors.try_into().map_err(too_much)?,
        most_latency_percent: max_latency,
        least_requests: min_requests,
    };
    let body = StartRollout { services: service, rollout };
    context.write(&what, Method::POST, "/v1/rollouts", &write.query(), Some(&body)).await
}

/// Arguments of `lbctl rollout lock`.
#[derive(Debug, Args)]
pub struct LockArgs {
    /// Name of the lock
    #[arg(default_value = "rollout")]
    name: Name,
    /// Reason for the lock, shown to others
    #[arg(long, value_name = "TEXT", default_value = "no reason given")]
    reason: String,
    /// Time after which the lock expires unless it is renewed
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10m")]
    ttl: Duration,
    /// Time to wait for the current holder to release the lock
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "0s")]
    wait: Duration,
    /// Renew the lock that this token was printed for
    #[arg(long, value_name = "TOKEN", conflicts_with_all = ["wait", "command"])]
    token: Option<String>,
    /// Command to run while the lock is held. It finds the token in LBCTL_LOCK_TOKEN, so that `lbctl region drain` and
    /// `lbctl rollout start` in the command use the lock. Signals go to the command, its exit status is that of lbctl,
    /// and it is ended if the lock is lost
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Arguments of `lbctl rollout unlock`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("whose").required(true)))]
pub struct UnlockArgs {
    /// Name of the lock
    #[arg(default_value = "rollout")]
    name: Name,
    /// Token that `rollout lock` printed
    #[arg(long, value_name = "TOKEN", group = "whose")]
    token: Option<String>,
    /// Release the lock even if somebody else holds it
    #[arg(long, group = "whose")]
    force: bool,
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: RolloutCommand) -> Result<Exit, Failure> {
    match command {
        RolloutCommand::Start(args) => start(context, args).await,
        RolloutCommand::Step(args) => step(context, args).await,
        RolloutCommand::Promote(Forced { which, force }) => {
            let more = WhichRollout { force, ..WhichRollout::default() };
            change(context, ("promote", "the new version is promoted"), which, more).await
        }
        RolloutCommand::Abort(which) => {
            let done = "the new version gets no new flows";
            change(context, ("abort", done), which, WhichRollout::default()).await
        }
        RolloutCommand::Clear(Forced { which, force }) => {
            let more = WhichRollout { force, ..WhichRollout::default() };
            change(context, ("clear", "rollout cleared"), which, more).await
        }
        RolloutCommand::Lock(args) => lock(context, args).await,
        RolloutCommand::Unlock(UnlockArgs { name, token, force }) => {
            let path = format!("/v1/locks/{name}");
            let query = Unlock { token, force };
            let left: Vec<HeldLock> = context.client.send(Method::DELETE, &path, &query, None::<&()>).await?;
            if context.out.json {
                context.out.json(&left, false)?;
            }
            say!("lock {name} released");
            Ok(Exit::Ok)
        }
        RolloutCommand::Status { name } => status(context, name).await,
    }
}

async fn status(context: &mut Context<'_>, name: Option<Name>) -> Result<Exit, Failure> {
    let mut locks: Vec<HeldLock> = context.client.get("/v1/locks", &()).await?;
    locks.retain(|held| name.as_ref().is_none_or(|name| *name.as_str() == held.lock.name));
    let rollouts: Vec<RolloutShown> = match name {
        Some(_) => Vec::new(),
        None => context.client.get("/v1/rollouts", &()).await?,
    };
    if context.out.json && name.is_none() {
        context.out.json(&serde_json::json!({ "rollouts": rollouts, "locks": locks }), false)?;
        return Ok(Exit::Ok);
    }
    if !rollouts.is_empty() {
        render_region::rollouts(&mut context.out, &rollouts)?;
    }
    if context.out.json {
        context.out.json(&locks, false)?;
    } else if locks.is_empty() {
        say!("no lock is held");
    } else {
        if !rollouts.is_empty() {
            context.out.line("")?;
        }
        render::locks(&mut context.out, &locks)?;
    }
    Ok(if name.is_some() && !locks.is_empty() { Exit::No } else { Exit::Ok })
}

async fn lock(context: &mut Context<'_>, args: LockArgs) -> Result<Exit, Failure> {
    let LockArgs { name, reason, ttl, wait, token, command } = args;
    let path = format!("/v1/locks/{name}");
    let request = LockRequest { reason, ttl_s: ttl.as_secs(), token };
    let until = tokio::time::Instant::now() + wait;
    let lock = loop {
        match context.client.send::<Lock>(Method::POST, &path, &(), Some(&request)).await {
            Err(ClientError::Refused { info })
                if info.code == "held" && tokio::time::Instant::now() + RETRY_INTERVAL <= until =>
            {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            other => break other?,
        }
    };
    let token = lock.token.clone().unwrap_or_default();
    if !command.is_empty() {
        let request = LockRequest { token: Some(token), ..request };
        return super::locked::run(context, &path, &request, &command).await;
    }
    if context.out.json {
        context.out.json(&lock, false)?;
    } else {
        context.out.line(&token)?;
    }
    say!("lock {name} is held for {} s: renew or release it with the token", lock.left_s);
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percentages_with_a_tenth_at_most() {
        assert_eq!(
            [share("5%"), share("2.5 %"), share("100"), share("0.1%")].map(Result::unwrap),
            [50, 25, 1_000, 1]
        );
        for bad in ["", "0", "0.05%", "101%", "-5%", "five", "NaN", "inf"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }
}
