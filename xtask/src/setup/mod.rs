//! `cargo xtask setup`: prepares a fresh Debian or Ubuntu so that everything
//! builds and every suite runs. Each part installs only what is missing, so
//! that a second run takes a moment.

use std::time::Instant;

use anyhow::{Result, bail};

mod apt;
mod bpf;
mod packages;

/// Which parts to set up; if none is given, all that the load balancer needs.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Options {
    /// Set up the BPF toolchain, which builds the XDP programs.
    #[arg(long)]
    pub bpf: bool,
    /// Install the programs that the demo and the tests run: nginx, iperf3, ethtool, …
    #[arg(long)]
    pub packages: bool,
    /// Download libtorch and a model, for the inference worker.
    #[arg(long)]
    pub inference: bool,
}

impl Options {
    /// Everything that the load balancer, its demo and its tests need.
    pub const BALANCER: Self = Self { bpf: true, packages: true, inference: false };

    fn is_empty(self) -> bool {
        !(self.bpf || self.packages || self.inference)
    }
}

/// Sets up the chosen parts, also after a part has failed. The error names
/// every failed part.
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
    part(options.bpf, "BPF toolchain", bpf::install);
    part(options.inference, "libtorch", crate::inference::libtorch::install);
    part(options.inference, "model", crate::inference::model::install);
    if !failed.is_empty() {
        bail!("set-up is incomplete, see the errors above: {}", failed.join(", "));
    }
    eprintln!("set-up: complete in {:.1} s", started.elapsed().as_secs_f32());
    Ok(())
}
