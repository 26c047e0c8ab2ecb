//! `cargo xtask setup`: brings a fresh Debian or Ubuntu to where everything
//! builds and every suite runs. Each part looks first and installs only what is
//! missing, so that a second run takes a moment.

use std::time::Instant;

use anyhow::{Result, bail};

mod apt;
mod bpf;
mod packages;

/// Which parts to set up; without any, all that the balancer needs.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Options {
    /// The BPF tool chain, for building the XDP programs.
    #[arg(long)]
    pub bpf: bool,
    /// The programs that the demo and the tests run: nginx, iperf3, ethtool, …
    #[arg(long)]
    pub packages: bool,
    /// libtorch and a model, for the inference worker.
    #[arg(long)]
    pub inference: bool,
}

impl Options {
    /// Everything that the balancer, its demo and its tests need.
    pub const BALANCER: Self = Self { bpf: true, packages: true, inference: false };

    fn is_empty(self) -> bool {
        !(self.bpf || self.packages || self.inference)
    }
}

/// Sets up the chosen parts. The error names every part that failed and its
/// remedy; parts after a failed one are still done.
pub fn run(options: &Options) -> Result<()> {
    let options = if options.is_empty() { Options::BALANCER } else { *options };
    let started = Instant::now();
    let mut failed = Vec::new();
    let mut part = |wanted: bool, name: &str, install: fn() -> Result<String>| {
        if !wanted {
            return;
        }
        match install() {
            Ok(found) => eprintln!("{name}: {found}"),
            Err(error) => {
                eprintln!("{name}: {error:#}");
                failed.push(name.to_owned());
            }
        }
    };
    part(options.packages, "programs", packages::install);
    part(options.bpf, "BPF tool chain", bpf::install);
    part(options.inference, "libtorch", crate::inference::libtorch::install);
    part(options.inference, "model", crate::inference::model::install);
    if !failed.is_empty() {
        bail!("set-up is incomplete: {}", failed.join(", "));
    }
    eprintln!("set-up: complete in {:.1} s", started.elapsed().as_secs_f32());
    Ok(())
}
