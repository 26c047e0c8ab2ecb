//! Commands of the suite inference.

use super::{INFERENCE_WORKER, cargo, run_as_root};
use crate::inference;
use anyhow::Result;
use std::process::Command;

/// Returns the tests of the worker alone, then behind the load balancer. Always optimised: unoptimised kernels take
/// minutes, and libtorch's bindings would be built twice.
pub(super) fn inference_commands() -> Result<Vec<Command>> {
    let mut behind_lb = cargo(&["test", "--manifest-path", "tests/e2e/Cargo.toml", "--test", "inference"]);
    run_as_root(&mut behind_lb);
    behind_lb.env("LB_INFERENCE_WORKER", inference::build_worker()?);
    behind_lb.env("LB_INFERENCE_MODEL", inference::model::ensure()?);
    behind_lb.args(["--", "--ignored", "--test-threads=1"]);
    let balancer = cargo(&["build", "--package", "lb-userspace", "--bins"]);
    let clippy = inference_clippy()?;
    let mut test = inference_test(&[])?;
    test.env("LB_TEST_PYTHON", inference::python::ensure(inference::python::TEST)?);
    Ok(vec![clippy, test, balancer, behind_lb])
}

fn inference_test(arguments: &[&str]) -> Result<Command> {
    inference::cargo(&[&["test", "--no-fail-fast"], &INFERENCE_WORKER[..], arguments].concat())
}

fn inference_clippy() -> Result<Command> {
    let mut clippy = inference::cargo(&[&["clippy"], &INFERENCE_WORKER[..], &["--all-targets"]].concat())?;
    clippy.args(["--", "-D", "warnings"]);
    Ok(clippy)
}

/// What [`inference_commands`] build.
pub(super) fn inference_builds() -> Result<Vec<Command>> {
    let worker = inference::cargo(&[&["build"], &INFERENCE_WORKER[..]].concat())?;
    Ok(vec![inference_test(&["--no-run"])?, worker, inference_clippy()?])
}
