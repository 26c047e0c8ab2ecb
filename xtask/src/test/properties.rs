//! The suite `property`: finds property tests and runs them over many more cases than the unit suite does.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::{CRATES, cargo};
use crate::shell;

/// Cases per property; the unit suite uses proptest's default of 256.
const PROPERTY_CASES: u32 = 500;

/// Returns the commands that run every module and every integration test with properties.
pub fn commands(profile: [&str; 2]) -> Result<Vec<Command>> {
    let mut commands = Vec::new();
    for name in CRATES {
        let root = shell::workspace().join(name);
        let modules = with_properties(&root.join("src"))?;
        if !modules.is_empty() {
            let mut command = cargo(&["test", "--package", name, "--lib"]);
            command.args(features(name));
            command.args(profile).arg("--").args(modules.iter().map(|file| module_path(file)));
            commands.push(command);
        }
        let files = with_properties(&root.join("tests"))?;
        let targets: BTreeSet<String> = files.iter().filter_map(|file| target_of(file)).collect();
        if !targets.is_empty() {
            let mut command = cargo(&["test", "--package", name]);
            command.args(features(name));
            command.args(profile).args(targets.iter().flat_map(|target| ["--test", target]));
            commands.push(command);
        }
    }
    for command in &mut commands {
        command
            .env("PROPTEST_CASES", env::var("PROPTEST_CASES").unwrap_or_else(|_| PROPERTY_CASES.to_string()));
    }
    Ok(commands)
}

/// Returns the arguments with which a crate has the features that suite `unit` builds it with.
fn features(name: &str) -> &'static [&'static str] {
    if name == "lb-userspace" { &["--features", "test-support"] } else { &[] }
}

/// Returns the files under `directory` that contain properties, relative to it.
fn with_properties(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        let Ok(entries) = fs::read_dir(&next) else { continue };
        for entry in entries {
            let path = entry.with_context(|| format!("cannot read {}", next.display()))?.path();
            if path.is_dir() {
                open.push(path);
            } else if fs::read_to_string(&path).is_ok_and(|text| text.contains(concat!("proptest!", " {"))) {
                found.push(path.strip_prefix(directory).unwrap_or(&path).to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Returns the module path of a file: `compile/mod.rs` is `compile`, `maglev/tests.rs` is `maglev::tests`.
fn module_path(file: &Path) -> String {
    let path = file.with_extension("");
    let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).filter(|part| part != "mod").collect();
    parts.join("::")
}

/// Returns the test program of a file: `native` for `native.rs` and `native/hostile.rs`.
fn target_of(file: &Path) -> Option<String> {
    let first = Path::new(file.iter().next()?);
    Some(first.file_stem()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_module_it_holds() {
        assert_eq!(module_path(Path::new("maglev/tests.rs")), "maglev::tests");
        assert_eq!(module_path(Path::new("compile/mod.rs")), "compile");
        assert_eq!(target_of(Path::new("native/hostile.rs")).as_deref(), Some("native"));
        assert_eq!(target_of(Path::new("native.rs")).as_deref(), Some("native"));
    }
}
