//! `lbctl doctor`.

use super::{Context, Exit, Failure};
use crate::lbctl::{
    doctor::{self, DaemonView, DoctorPlan, Finding, Level},
    render::Tone,
};
use clap::Args;
use std::path::PathBuf;

/// Arguments of `lbctl doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: sudo lbctl doctor\n\nExit code 1 if a check fails; warnings alone leave it 0."
)]
pub struct Doctor {
    /// Directory in which lbd pins its BPF programs and maps
    #[arg(
        long,
        value_name = "DIR",
        env = "LBD_PIN_PATH",
        hide_env_values = true,
        default_value = "/sys/fs/bpf/lb"
    )]
    pin_path: PathBuf,
    /// Do not send packets to the workers
    #[arg(long)]
    no_probes: bool,
}

/// Runs all checks and prints the findings.
pub async fn run(context: &mut Context<'_>, doctor: Doctor) -> Result<Exit, Failure> {
    let view = match fetch_view(context).await {
        Ok(view) => Ok(view),
        Err(Failure::Client(error)) => Err(error),
        Err(other) => return Err(other),
    };
    let plan = DoctorPlan { pin_path: doctor.pin_path, probe: !doctor.no_probes };
    let mut found = doctor::examine(&plan, view.as_ref().ok()).await;
    if let Err(error) = view {
        found.push(Finding {
            level: Level::Fail,
            about: "lbd".to_owned(),
            what: error.to_string(),
            fix: Some("start it (`systemctl start lbd`), or give its socket with --socket".to_owned()),
        });
    }
    print(context, &found)?;
    let worst = found.iter().map(|f| f.level).max().unwrap_or(Level::Ok);
    Ok(if worst == Level::Fail { Exit::No } else { Exit::Ok })
}

async fn fetch_view(context: &Context<'_>) -> Result<DaemonView, Failure> {
    let client = &context.client;
    Ok(DaemonView {
        status: client.get("/v1/status", &()).await?,
        services: client.get("/v1/services", &()).await?,
        backends: client.get("/v1/backends", &()).await?,
    })
}

fn print(context: &mut Context<'_>, found: &[Finding]) -> Result<(), Failure> {
    let out = &mut context.out;
    if out.json {
        return Ok(out.json(&found, false)?);
    }
    for Finding { level, about, what, fix } in found {
        let (word, tone) = match level {
            Level::Ok => ("ok  ", Tone::Good),
            Level::Warn => ("warn", Tone::Warn),
            Level::Fail => ("fail", Tone::Bad),
        };
        let word = out.paint(tone, word);
        out.line(format!("{word}  {about}: {what}"))?;
        if let Some(fix) = fix {
            let label = out.paint(Tone::Strong, "fix:");
            out.line(format!("      {label} {fix}"))?;
        }
    }
    Ok(())
}
