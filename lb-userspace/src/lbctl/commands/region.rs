//! `lbctl region`, `lbctl policy` and `lbctl audit`.

use super::{Context, Exit, Failure, WriteFlags};
use crate::{
    desired::model::Name, lbctl::render::region as render, observed::regions::Explained,
    plan::policy::audit::Residency, serve::api::regions::Regions,
};
use clap::{Args, Subcommand};
use reqwest::Method;

/// What to do with regions.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List regions: how far away, who sees them up, how many backends take flows there
    #[command(visible_aliases = ["ls", "status"])]
    List,
    /// Declare a region; once one is, names of others are refused as mistakes
    Add(One),
    /// Send no new flows to any backend of a region; established ones stay. One region at a time
    Drain(One),
    /// Send it new flows again
    Undrain(One),
    /// Take back a declaration
    #[command(visible_alias = "remove")]
    Rm(One),
}

/// One region to change.
#[derive(Debug, Args)]
pub struct One {
    /// Region
    name: Name,
    #[command(flatten)]
    write: WriteFlags,
}

/// What to do with policy.
#[derive(Debug, Subcommand)]
pub enum Policy {
    /// How a service is spread over regions, zones and versions: every input, and the decision
    Explain {
        /// Service
        service: Name,
    },
}

/// What to audit.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Each service's residency, where its backends are, and whether something violates it or nothing is left (exit code 1)
    Residency,
}

/// Runs `lbctl region`.
pub async fn run(context: &mut Context<'_>, command: Command) -> Result<Exit, Failure> {
    let (one, method, tail, what) = match command {
        Command::List => {
            let list: Regions = context.client.get("/v1/regions", &()).await?;
            if context.out.json {
                context.out.json(&list, false)?;
            } else {
                render::regions(&mut context.out, &list)?;
            }
            return Ok(Exit::Ok);
        }
        Command::Add(one) => (one, Method::POST, "", "declared"),
        Command::Drain(one) => (one, Method::POST, "/drain", "drains"),
        Command::Undrain(one) => (one, Method::POST, "/undrain", "takes new flows again"),
        Command::Rm(one) => (one, Method::DELETE, "", "is no longer declared"),
    };
    let path = format!("/v1/regions/{}{tail}", one.name);
    let what = format!("region {} {what}", one.name);
    context.write(&what, method, &path, &one.write.query(), None::<&()>).await
}

/// Runs `lbctl policy`.
pub async fn policy(context: &mut Context<'_>, command: Policy) -> Result<Exit, Failure> {
    let Policy::Explain { service } = command;
    let explained: Explained = context.client.get(&format!("/v1/policy/{service}"), &()).await?;
    if context.out.json {
        context.out.json(&explained, false)?;
    } else {
        render::explained(&mut context.out, &explained)?;
    }
    Ok(Exit::Ok)
}

/// Runs `lbctl audit`.
pub async fn audit(context: &mut Context<'_>, command: Audit) -> Result<Exit, Failure> {
    let Audit::Residency = command;
    let list: Vec<Residency> = context.client.get("/v1/residency", &()).await?;
    if context.out.json {
        context.out.json(&list, false)?;
    } else {
        render::residency(&mut context.out, &list)?;
    }
    Ok(if list.iter().all(|r| r.findings.is_empty()) { Exit::Ok } else { Exit::No })
}
