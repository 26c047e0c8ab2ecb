//! `lbctl region`, `lbctl policy` and `lbctl audit`.

use super::{Context, Exit, Failure, WriteFlags};
use crate::{
    desired::model::Name,
    lbctl::render::region as render,
    observed::regions::Explained,
    plan::policy::audit::Residency,
    serve::api::{region_drain::RegionDrain, regions::Regions},
};
use clap::{Args, Subcommand};
use reqwest::Method;

/// Subcommands of `lbctl region`.
#[derive(Debug, Subcommand)]
pub enum RegionCommand {
    /// List regions: round-trip time, which hosts see them up, and how many backends take flows
    #[command(visible_aliases = ["ls", "status"])]
    List,
    /// Declare a region; once any region is declared, undeclared names are refused as mistakes
    Add(OneRegion),
    /// Stop sending new flows to a region's backends; established flows continue, and VIPs that no host serves afterwards
    /// stay announced for them. One region at a time
    Drain(DrainRegion),
    /// Send new flows to a drained region again
    Undrain(OneRegion),
    /// Remove the declaration of a region
    #[command(visible_alias = "remove")]
    Rm(OneRegion),
}

/// Arguments of `add`, `undrain` and `rm`.
#[derive(Debug, Args)]
pub struct OneRegion {
    /// Name of the region
    name: Name,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `drain`.
#[derive(Debug, Args)]
pub struct DrainRegion {
    #[command(flatten)]
    one: OneRegion,
    /// Drain the region although this leaves services without any backend that takes new flows
    #[arg(long)]
    force: bool,
}

/// Subcommands of `lbctl policy`.
#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Show how a service is spread over regions, zones and versions: every input, and the decision
    Explain {
        /// Name of the service
        service: Name,
    },
}

/// Subcommands of `lbctl audit`.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// List each service's residency, its backends' regions, and findings: a violation, or no backend left (exit code 1)
    Residency,
}

/// Runs `lbctl region`.
pub async fn run(context: &mut Context<'_>, command: RegionCommand) -> Result<Exit, Failure> {
    let (one, method, tail, what) = match command {
        RegionCommand::List => {
            let list: Regions = context.client.get("/v1/regions", &()).await?;
            if context.out.json {
                context.out.json(&list, false)?;
            } else {
                render::regions(&mut context.out, &list)?;
            }
            return Ok(Exit::Ok);
        }
        RegionCommand::Add(one) => (one, Method::POST, "", "declared"),
        RegionCommand::Drain(DrainRegion { one, force }) => {
            let query = RegionDrain::new(one.write.query(), force);
            let (what, path) =
                (format!("region {} drains", one.name), format!("/v1/regions/{}/drain", one.name));
            return context.write(&what, Method::POST, &path, &query, None::<&()>).await;
        }
        RegionCommand::Undrain(one) => (one, Method::POST, "/undrain", "takes new flows again"),
        RegionCommand::Rm(one) => (one, Method::DELETE, "", "is no longer declared"),
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
