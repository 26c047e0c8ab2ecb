//! Generates docs/compatibility.md from the records of runs.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context, Result};

use super::{
    matrix::{self, SETTINGS},
    results::{self, Record},
};
use crate::shell;

const HEAD: &str = "# Compatibility

What was run on which kernel with which NIC, when, and what came of it. `cargo xtask test kernels --full` runs it in
virtual machines and writes this file from `tests/kernels.json`; do not edit it. `cargo xtask compatibility` writes it
again from records that are there.

One run boots a Debian kernel in QEMU (emulated, two processors, 2.5 GiB), starts `lbd ingress` and `lbd worker` with
shipped defaults, and checks: TCP with compared content in modes ipip, gue, l2, nat and with `p2c`, IPv4 and IPv6; UDP
whole and in three fragments; pings of VIPs; drain; `kill -9` and restart; upgrade to another ABI version.
Throughput is not measured: an emulator says nothing about it. NICs are QEMU's models of them, run by the kernel's
real drivers.
";

/// Path of the document.
fn file() -> PathBuf {
    shell::workspace().join("docs/compatibility.md")
}

/// Writes the document from the records that are checked in.
pub fn write() -> Result<()> {
    let file = file();
    fs::write(&file, render(&results::read()?)).with_context(|| format!("cannot write {}", file.display()))
}

/// Renders the document.
fn render(records: &[Record]) -> String {
    let mut text = HEAD.to_owned();
    kernels(&mut text, records).expect("writing to a string cannot fail");
    programs(&mut text, records).expect("writing to a string cannot fail");
    drivers(&mut text, records).expect("writing to a string cannot fail");
    failures(&mut text, records).expect("writing to a string cannot fail");
    text
}

fn lines() -> impl Iterator<Item = &'static str> {
    matrix::LINES.into_iter().chain([matrix::NEWEST])
}

fn find<'a>(records: &'a [Record], line: &str, driver: &str, setting: &str) -> Option<&'a Record> {
    records.iter().find(|r| r.line == line && r.driver == driver && r.setting == setting)
}

/// Returns the record of veth pairs with the default setting.
fn default_record<'a>(records: &'a [Record], line: &str) -> Option<&'a Record> {
    find(records, line, matrix::DRIVERS[0].name, SETTINGS[0].name)
}

fn summary(record: &Record) -> String {
    let passed = record.checks.iter().filter(|check| check.passed).count();
    match record.checks.len() - passed {
        0 => format!("all {passed}"),
        _ if record.checks.len() == 1 => "does not start".to_owned(),
        failed => format!("**{failed} of {} failed**", record.checks.len()),
    }
}

fn kernels(text: &mut String, records: &[Record]) -> std::fmt::Result {
    writeln!(
        text,
        "\n## Kernels\n\n| line | package | checks | commit | date | emulator |\n|---|---|---|---|---|---|"
    )?;
    for line in lines() {
        match default_record(records, line) {
            Some(r) => writeln!(
                text,
                "| {line} | {} | {} | {} | {} | {} |",
                r.kernel,
                summary(r),
                r.commit,
                r.date,
                r.emulator
            )?,
            None => writeln!(text, "| {line} | – | not run | | | |")?,
        }
    }
    writeln!(
        text,
        "\nThe oldest supported kernel is 6.1. 5.15, 6.6 and 6.8 themselves were not run: Debian has no packages of them."
    )
}

/// Parses the figures of the check `programs`, such as `ingress 254000, nat 301000`.
fn figures(record: &Record) -> BTreeMap<&str, &str> {
    let check = record.checks.iter().find(|check| check.name == "programs" && check.passed);
    let pairs = check.map(|check| check.detail.split(", ")).into_iter().flatten();
    pairs.filter_map(|pair| pair.rsplit_once(' ')).collect()
}

fn programs(text: &mut String, records: &[Record]) -> std::fmt::Result {
    let run: Vec<(&str, BTreeMap<&str, &str>)> =
        lines().filter_map(|line| Some((line, figures(default_record(records, line)?)))).collect();
    let mut names: Vec<&str> = run.iter().flat_map(|(_, figures)| figures.keys().copied()).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "\n## The verifier\n\nInstructions that each kernel's verifier walks for each program as it ships; the kernel's limit is 1,000,000,\n\
         ours half of it. 0: the kernel does not count (before 5.16).\n"
    )?;
    let heads: Vec<&str> = run.iter().map(|(line, _)| *line).collect();
    writeln!(text, "| program | {} |\n|---|{}", heads.join(" | "), "---|".repeat(heads.len()))?;
    for name in names {
        let cells: Vec<&str> = run.iter().map(|(_, f)| f.get(name).copied().unwrap_or("–")).collect();
        writeln!(text, "| {name} | {} |", cells.join(" | "))?;
    }
    Ok(())
}

fn drivers(text: &mut String, records: &[Record]) -> std::fmt::Result {
    writeln!(text, "\n## Drivers\n")?;
    let heads: Vec<&str> = lines().collect();
    writeln!(text, "| driver, setting | {} |\n|---|{}", heads.join(" | "), "---|".repeat(heads.len()))?;
    for work in matrix::work(true, &[], &[]) {
        let cell = |line| match find(records, line, work.driver.name, work.setting.name) {
            Some(record) => summary(record),
            None => "not run".to_owned(),
        };
        let cells: Vec<String> = lines().map(cell).collect();
        writeln!(text, "| {} | {} |", work.name(), cells.join(" | "))?;
    }
    writeln!(
        text,
        "\n`verifier` is every program with every shipped setting, within budget. Each cell says when it was run in `tests/kernels.json`. Not part of the matrix yet: VRFs, bonds of several ports."
    )
}

fn failures(text: &mut String, records: &[Record]) -> std::fmt::Result {
    let failed = records.iter().flat_map(|record| {
        record.checks.iter().filter(|check| !check.passed).map(move |check| (record, check))
    });
    let mut is_first = true;
    for (record, check) in failed {
        if is_first {
            writeln!(text, "\n## What failed\n")?;
            is_first = false;
        }
        writeln!(
            text,
            "- {} ({}), {}, {}: {}: `{}`",
            record.line,
            record.kernel,
            record.driver,
            record.setting,
            check.name,
            check.detail.replace('`', "'")
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::results::Check;

    fn record(line: &str, checks: &[(&str, bool, &str)]) -> Record {
        Record {
            line: line.into(),
            kernel: format!("{line}.7-1"),
            driver: "veth".into(),
            setting: SETTINGS[0].name.into(),
            commit: "abc".into(),
            date: "2026-11-28".into(),
            emulator: "QEMU 10".into(),
            checks: checks
                .iter()
                .map(|(name, passed, detail)| Check {
                    name: (*name).into(),
                    passed: *passed,
                    detail: (*detail).into(),
                })
                .collect(),
        }
    }

    #[test]
    fn the_document_is_what_the_records_say() {
        let there = fs::read_to_string(file()).unwrap_or_default();
        let records = results::read().unwrap_or_else(|error| panic!("{error:#}"));
        assert!(
            there == render(&records),
            "docs/compatibility.md differs from tests/kernels.json: run `cargo xtask compatibility`"
        );
    }

    #[test]
    fn failures_and_missing_runs_are_listed() {
        let records = [
            record("6.1", &[("start", false, "refused: `R1` unbounded")]),
            record("6.12", &[("programs", true, "ingress 254000, nat 3"), ("ping", true, "")]),
        ];
        let text = render(&records);
        for part in [
            "| 6.1 | 6.1.7-1 | does not start | abc | 2026-11-28 |",
            "| 6.12 | 6.12.7-1 | all 2 |",
            "| 5.10 | – | not run |",
            "| ingress | – | 254000 |",
            "start: `refused: 'R1' unbounded`",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }

    #[test]
    fn no_record_reveals_the_machine_that_ran_it() {
        let text = fs::read_to_string(results::file()).unwrap_or_default();
        let home = std::env::var("HOME").unwrap_or_default();
        for word in ["://", &shell::workspace().display().to_string(), &format!("{home}/")] {
            assert!(word == "/" || !text.contains(word), "tests/kernels.json names {word}");
        }
    }
}
