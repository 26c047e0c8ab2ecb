//! Records of boots: what was run, when, and on what. They are kept in `tests/kernels.json`, from which
//! docs/compatibility.md is generated. A new run replaces the record of the same line, driver and setting.

use std::{fs, path::PathBuf, process::Command, time::SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::shell;

/// One check in one boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Name, such as `gue v6`.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// Why it failed, or what was measured.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Check {
    /// Parses a line of `CHECK`, name, `ok` or `FAILED`, seconds and detail, separated by tabs; also returns the seconds.
    pub fn parse(line: &str) -> Option<(Self, f32)> {
        let parts: Vec<&str> = line.split('\t').collect();
        // libtest writes `test NAME ... ` before a test's first line.
        let [head, name, result, seconds, detail] = parts[..] else { return None };
        if !head.ends_with("CHECK") {
            return None;
        }
        let check = Self { name: name.to_owned(), passed: result == "ok", detail: detail.to_owned() };
        Some((check, seconds.parse().ok()?))
    }

    /// Parses a test's result line as libtest prints it.
    pub fn parse_test(line: &str) -> Option<Self> {
        let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
        let passed = match result {
            "ok" => true,
            "FAILED" => false,
            _ => return None,
        };
        Some(Self { name: name.to_owned(), passed, detail: String::new() })
    }
}

/// Record of one boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Kernel line: `6.1`, `newest`.
    pub line: String,
    /// Version of the kernel package.
    pub kernel: String,
    /// Driver.
    pub driver: String,
    /// Network setting.
    pub setting: String,
    /// Commit that was tested.
    pub commit: String,
    /// Date, UTC.
    pub date: String,
    /// Emulator and its version.
    pub emulator: String,
    /// Checks, in the order in which they ran.
    pub checks: Vec<Check>,
}

impl Record {
    fn replaces(&self, other: &Self) -> bool {
        (&self.line, &self.driver, &self.setting) == (&other.line, &other.driver, &other.setting)
    }
}

/// Path of the records.
pub fn file() -> PathBuf {
    shell::workspace().join("tests/kernels.json")
}

/// Reads all records.
pub fn read() -> Result<Vec<Record>> {
    let file = file();
    let Ok(text) = fs::read_to_string(&file) else { return Ok(Vec::new()) };
    serde_json::from_str(&text).with_context(|| format!("cannot parse the records in {}", file.display()))
}

/// Adds a record, or replaces the one of the same line, driver and setting.
pub fn add(records: &mut Vec<Record>, new: Record) {
    match records.iter_mut().find(|record| record.replaces(&new)) {
        Some(old) => *old = new,
        None => records.push(new),
    }
}

/// Writes all records.
pub fn write(records: &[Record]) -> Result<()> {
    let text = serde_json::to_string_pretty(records).context("cannot write the records as JSON")? + "\n";
    let file = file();
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Returns the commit of the working tree, marked as dirty if anything but recorded results is uncommitted.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.current_dir(shell::workspace()).args(arguments);
        shell::with_output(&mut git, &[]).map(|text| text.trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    // What earlier runs have recorded changes nothing of what is tested.
    let results = [":/", ":(top,exclude)tests/kernels.json", ":(top,exclude)docs/compatibility.md"];
    let changes = git(&[&["status", "--porcelain", "--untracked-files=no", "--"][..], &results].concat());
    if changes.is_some_and(|changes| changes.is_empty()) { commit } else { format!("{commit}-dirty") }
}

/// Returns today's date, UTC.
pub fn today() -> String {
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    now.split('T').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_read_from_the_guest_s_lines() {
        let (check, seconds) =
            Check::parse("test everything_once ... CHECK\tgue v6\tok\t1.5\t").expect("a check");
        assert_eq!((check.name.as_str(), check.passed, seconds), ("gue v6", true, 1.5));
        let (check, _) = Check::parse("CHECK\tstart\tFAILED\t60.0\trefused | why").expect("a check");
        assert_eq!((check.passed, check.detail.as_str()), (false, "refused | why"));
        assert_eq!(Check::parse("CHECK it"), None);
        assert!(!Check::parse_test("test decap_with_every_setting ... FAILED").expect("a test").passed);
        assert_eq!(Check::parse_test("test result: ok. 1 passed"), None);
    }

    #[test]
    fn a_new_run_takes_the_place_of_the_old_one() {
        let record = |line: &str, date: &str| Record {
            line: line.into(),
            kernel: "6.1.1-1".into(),
            driver: "veth".into(),
            setting: "as it comes".into(),
            commit: "c".into(),
            date: date.into(),
            emulator: "QEMU 10".into(),
            checks: Vec::new(),
        };
        let mut all = vec![record("6.1", "2026-01-01"), record("6.12", "2026-01-01")];
        add(&mut all, record("6.1", "2026-02-01"));
        assert_eq!(all, [record("6.1", "2026-02-01"), record("6.12", "2026-01-01")]);
    }

    #[test]
    fn today_is_a_date() {
        let today = today();
        assert!(today.len() == 10 && today.split('-').count() == 3, "{today}");
    }
}
