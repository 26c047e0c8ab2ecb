//! What was run, when, on what: one record for each boot, kept in `tests/kernels.json`, from which
//! docs/compatibility.md is made. A new run of the same takes the old one's place.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::shell;

/// One check in one boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// `gue v6`.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// Why not, or what was measured.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Check {
    /// `CHECK`, name, `ok` or `FAILED`, seconds, detail; tabs between. And the seconds.
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

    /// A test as libtest reports it.
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

/// One boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which kernels this stands for: `6.1`, `newest`.
    pub line: String,
    /// The kernel package's version.
    pub kernel: String,
    /// The driver.
    pub driver: String,
    /// The network's setting.
    pub setting: String,
    /// The commit that was run.
    pub commit: String,
    /// The day, UTC.
    pub date: String,
    /// What ran the machine.
    pub emulator: String,
    /// In the order in which they ran.
    pub checks: Vec<Check>,
}

impl Record {
    fn is_same_place(&self, other: &Self) -> bool {
        (&self.line, &self.driver, &self.setting) == (&other.line, &other.driver, &other.setting)
    }
}

/// Where the records lie.
pub fn file() -> PathBuf {
    shell::workspace().join("tests/kernels.json")
}

/// Every record that is checked in.
pub fn read() -> Result<Vec<Record>> {
    let file = file();
    let Ok(text) = fs::read_to_string(&file) else { return Ok(Vec::new()) };
    serde_json::from_str(&text).with_context(|| format!("{} does not hold records of runs", file.display()))
}

/// Puts `new` in its place among the others.
pub fn add(records: &mut Vec<Record>, new: Record) {
    match records.iter_mut().find(|record| record.is_same_place(&new)) {
        Some(old) => *old = new,
        None => records.push(new),
    }
}

/// Writes all records.
pub fn write(records: &[Record]) -> Result<()> {
    let text = serde_json::to_string_pretty(records).context("records can be written")? + "\n";
    let file = file();
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// The commit of the working tree, marked where something else than results is not committed.
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

/// Today, UTC.
pub fn today() -> String {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = civil(elapsed.as_secs() / 86_400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// The date of a day since 1970-01-01, by years that begin in March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
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
    fn days_have_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(20_785), (2026, 11, 28));
        assert_eq!(civil(19_782), (2024, 2, 29));
    }
}
