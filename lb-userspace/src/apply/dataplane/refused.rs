//! A program that the verifier refused: extracts the reason as one line, and saves the complete log in a file.

use aya::programs::ProgramError;
use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

/// Maximum number of characters of a reason.
const SHOWN: usize = 300;

/// The verifier's verdict on a program.
pub struct VerifierVerdict {
    /// The reason, in one line.
    pub reason: String,
    /// Path of the log file.
    pub log: Option<PathBuf>,
}

/// Extracts the reason from the verifier's log, and saves the log.
pub fn examine(program: &str, error: &ProgramError) -> VerifierVerdict {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return VerifierVerdict { reason: error.to_string(), log: None };
    };
    let log = verifier_log.to_string();
    let log = log.trim();
    if log.is_empty() {
        return VerifierVerdict { reason: io_error.to_string(), log: None };
    }
    let reason = format!("{} ({io_error})", last_reason(log));
    match write(program, log) {
        Ok(path) => VerifierVerdict { reason, log: Some(path) },
        Err(error) => {
            tracing::warn!(%error, program, "cannot save the verifier's log");
            VerifierVerdict { reason, log: None }
        }
    }
}

/// Finds the line with the reason: the last one that is neither statistics nor a piece of the program.
fn last_reason<'a>(log: &'a str) -> String {
    const STATISTICS: [&str; 5] =
        ["processed ", "verification time", "stack depth", "insns_processed", "max_states"];
    // Some reasons do not end their line.
    let reason = |line: &'a str| line.split("verification time").next().unwrap_or(line).trim();
    let lines = log.lines().map(reason).filter(|line| !line.is_empty());
    let is_reason = |line: &&str| {
        !STATISTICS.iter().any(|s| line.starts_with(s)) && !line.starts_with(|c: char| c.is_ascii_digit())
    };
    let last = lines.clone().rfind(is_reason).or_else(|| lines.clone().next_back());
    last.unwrap_or_default().chars().take(SHOWN).collect()
}

fn write(program: &str, log: &str) -> io::Result<PathBuf> {
    // The directory from systemd outlives the process; without systemd, use the temporary directory.
    let directory = std::env::var_os("RUNTIME_DIRECTORY").map_or_else(std::env::temp_dir, PathBuf::from);
    let path = directory.join(format!("lbd-verifier-{program}-{}.log", std::process::id()));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Never follow another user's link in a world-writable directory.
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(log.as_bytes())?;
    Ok(path)
}

/// Release of the running kernel.
pub fn kernel_release() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_line_that_says_something() {
        for (log, reason) in [
            (
                "0: R1=ctx(off=0,imm=0) R10=fp0\n; let x = 1;\n0: (b7) r0 = 2\ninvalid read from stack R10 off=-424 size=8\n\
                 processed 61 insns (limit 1000000) max_states_per_insn 0\n",
                "invalid read from stack R10 off=-424 size=8",
            ),
            (
                "1: (95) exit\nBPF program is too large. Processed 1000001 insn\nverification time 2 usec\nstack depth 480\n\
                 processed 1000001 insns (limit 1000000)",
                "BPF program is too large. Processed 1000001 insn",
            ),
            (
                "R3 unbounded memory access, make sure to bounds check any such access",
                "R3 unbounded memory access, make sure to bounds check any such access",
            ),
            ("processed 3 insns", "processed 3 insns"),
            (
                "nonzero insn_off 7523 for the first func info recordverification time 313 usec\nstack depth 0\n",
                "nonzero insn_off 7523 for the first func info record",
            ),
        ] {
            assert_eq!(last_reason(log), reason);
        }
        assert_eq!(last_reason(&"x".repeat(5_000)).len(), SHOWN);
    }
}
