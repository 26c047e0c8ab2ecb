//! `lbctl doctor`.

use super::{Context, Exit, Failure};
use crate::{
    desired::model::Name,
    lbctl::{
        doctor::{self, DaemonView, DoctorPlan, Finding, Level},
        render::Tone,
    },
};
use clap::Args;
use std::{collections::BTreeMap, path::PathBuf};

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
    /// Check only the backends of this service
    #[arg(long, value_name = "SERVICE")]
    service: Option<Name>,
    /// Print every finding; otherwise only the first of those that are alike, and their number
    #[arg(long)]
    all: bool,
}

/// Runs all checks and prints the findings.
pub async fn run(context: &mut Context<'_>, doctor: Doctor) -> Result<Exit, Failure> {
    let view = match fetch_view(context, doctor.service.as_ref()).await {
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
    print(context, &found, doctor.all)?;
    let worst = found.iter().map(|f| f.level).max().unwrap_or(Level::Ok);
    Ok(if worst == Level::Fail { Exit::No } else { Exit::Ok })
}

async fn fetch_view(context: &Context<'_>, service: Option<&Name>) -> Result<DaemonView, Failure> {
    let client = &context.client;
    let status = client.get("/v1/status", &()).await?;
    let (services, backends) = match service {
        None => (client.get("/v1/services", &()).await?, client.get("/v1/backends", &()).await?),
        Some(name) => (
            vec![client.get(&format!("/v1/services/{name}"), &()).await?],
            client.get(&format!("/v1/services/{name}/backends"), &()).await?,
        ),
    };
    Ok(DaemonView { status, services, backends })
}

/// Findings of a kind that are printed one by one.
const ALIKE: usize = 3;

/// What findings about different backends have in common: level, first word of the subject, and the text without its
/// numbers and names.
fn kind(finding: &Finding) -> (Level, String) {
    let plain = |text: &str| -> String {
        text.chars().filter(|c| !c.is_ascii_hexdigit() && !matches!(c, '.' | ':')).collect()
    };
    let (about, subject) = finding.about.split_once(' ').unwrap_or((&finding.about, ""));
    let mut what = plain(&finding.what);
    let name = plain(subject.rsplit(['/', ' ']).next().unwrap_or_default());
    if !name.is_empty() {
        what = what.replace(&name, "");
    }
    (finding.level, format!("{about} {what}"))
}

/// The findings to print, each with the number of further ones that are like it, and the numbers of all by level.
fn summarize(found: &[Finding], all: bool) -> (Vec<(&Finding, usize)>, String) {
    let mut kinds: BTreeMap<(Level, String), usize> = BTreeMap::new();
    let mut shown: Vec<(&Finding, usize)> = Vec::new();
    let mut last: BTreeMap<(Level, String), usize> = BTreeMap::new();
    for finding in found {
        let kind = kind(finding);
        let count = kinds.entry(kind.clone()).or_default();
        *count += 1;
        if all || *count <= ALIKE {
            last.insert(kind, shown.len());
            shown.push((finding, 0));
        } else if let Some(&at) = last.get(&kind) {
            shown[at].1 += 1;
        }
    }
    let count = |level| found.iter().filter(|f| f.level == level).count();
    let (ok, warn, fail) = (count(Level::Ok), count(Level::Warn), count(Level::Fail));
    (shown, format!("{fail} failed, {warn} warnings, {ok} ok"))
}

fn print(context: &mut Context<'_>, found: &[Finding], all: bool) -> Result<(), Failure> {
    let out = &mut context.out;
    if out.json {
        return Ok(out.json(&found, false)?);
    }
    let (shown, counts) = summarize(found, all);
    for (Finding { level, about, what, fix }, more) in shown {
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
        if more > 0 {
            out.line(format!("      and {more} more like this (--all prints them)"))?;
        }
    }
    out.line(counts)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_of_findings_that_are_alike_are_a_few_lines() {
        let finding = |level, about: String, what: String| Finding { level, about, what, fix: None };
        let mut found = vec![finding(Level::Ok, "kernel".to_owned(), "6.18".to_owned())];
        for i in 0..10_000 {
            let about = format!("path to web/w{i}");
            found.push(finding(
                Level::Ok,
                about.clone(),
                format!("MTU 1500 to 10.1.{}.{}", i / 250, i % 250),
            ));
            found.push(finding(
                Level::Warn,
                about,
                format!("its next hop 10.1.{}.{} is not resolved", i / 250, i % 250),
            ));
        }
        found.push(finding(Level::Fail, "path to web/x".to_owned(), "another thing".to_owned()));
        let (shown, counts) = summarize(&found, false);
        assert_eq!(shown.len(), 1 + 3 + 3 + 1);
        assert_eq!(shown.iter().map(|(_, more)| more).sum::<usize>(), 2 * 9_997);
        assert_eq!(counts, "1 failed, 10000 warnings, 10001 ok");
        assert_eq!(summarize(&found, true).0.len(), found.len());
    }
}
