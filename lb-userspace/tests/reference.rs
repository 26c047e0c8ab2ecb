//! Generates the pages of `docs/reference/` from the code: settings, command lines, metrics, drop reasons, API.
//!
//! Each test builds one page and compares it with the checked-in file. `cargo xtask docs` runs the same tests with
//! `LB_WRITE_REFERENCE=1`, which writes the files instead. A key, metric or reason that the tables beside this file do
//! not describe fails the test.

#![allow(clippy::unwrap_used, reason = "a test file, helpers included")]

mod reference {
    pub mod api;
    pub mod cli;
    pub mod keys;
    pub mod metrics;
    pub mod reasons;
    pub mod settings;
    pub mod text;
}

use reference::{api, cli, metrics, reasons, settings};
use std::{env, fs, path::Path};

/// Compares a page with the checked-in file, or writes it.
fn page(name: &str, text: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs/reference");
    let path = directory.join(name);
    if env::var_os("LB_WRITE_REFERENCE").is_some_and(|value| value == "1") {
        fs::create_dir_all(&directory).unwrap();
        fs::write(&path, text).unwrap();
        return;
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    let line = checked_in.lines().zip(text.lines()).position(|(old, new)| old != new);
    let line = line.unwrap_or_else(|| checked_in.lines().count().min(text.lines().count()));
    assert!(
        checked_in == text,
        "docs/reference/{name} differs from the code, first in line {}:\n  file: {}\n  code: {}\n\
         run `cargo xtask docs` and commit the result",
        line + 1,
        checked_in.lines().nth(line).unwrap_or("(end of file)"),
        text.lines().nth(line).unwrap_or("(end of page)"),
    );
}

#[test]
fn settings_page() {
    page("settings.md", &settings::page());
}

#[test]
fn lbctl_page() {
    page("lbctl.md", &cli::page(lb_userspace::lbctl::commands::command(), cli::LBCTL));
}

#[test]
fn lbd_page() {
    use clap::CommandFactory;
    page("lbd.md", &cli::page(lb_userspace::lbd::args::LbdArgs::command(), cli::LBD));
}

#[test]
fn metrics_page() {
    page("metrics.md", &metrics::page());
}

#[test]
fn reasons_page() {
    page("drop-reasons.md", &reasons::page());
}

#[test]
fn api_page() {
    page("api.md", &api::page());
}

/// Alerts name metrics and labels that exist: a misspelt one would never fire.
#[test]
fn alerts_name_metrics_that_exist() {
    let metrics = metrics::names();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/alerts.yml");
    let text = fs::read_to_string(file).unwrap();
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').map(str::to_owned).collect()
    };
    let mut named = Vec::new();
    for rule in text.split("- alert: ").skip(1) {
        let alert = rule.lines().next().unwrap();
        let used: Vec<String> = words(rule).into_iter().filter(|word| word.starts_with("lb_")).collect();
        assert!(!used.is_empty(), "{alert} names no metric");
        for metric in &used {
            assert!(metrics.contains_key(metric), "{alert}: there is no metric {metric}");
        }
        let known: Vec<&str> = used.iter().flat_map(|m| &metrics[m]).map(String::as_str).collect();
        let shown = rule.split("$labels.").skip(1).filter_map(|rest| words(rest).into_iter().next());
        let grouped = rule
            .split(" (")
            .zip(rule.split(" (").skip(1))
            .filter(|(before, _)| ["by", "on"].iter().any(|word| before.ends_with(word)));
        let grouped = grouped.flat_map(|(_, list)| words(list.split(')').next().unwrap()));
        for label in shown.chain(grouped).filter(|label| !label.is_empty()) {
            // Prometheus adds the instance.
            let is_known = label == "instance" || known.contains(&label.as_str());
            assert!(is_known, "{alert}: its metrics have no label {label}");
        }
        named.extend(used);
    }
    for needed in ["lb_service_spill_unplaced_requests", "lb_rollout_region_ready_backends"] {
        assert!(named.iter().any(|metric| metric == needed), "no alert for {needed}");
    }
}
