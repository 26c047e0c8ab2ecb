//! The command `lbd`: parses its arguments and runs `ingress`, `worker` or `detach`. Called by the binaries.

use crate::{
    apply::{
        announce::{self, AnnounceError},
        dataplane::{self, DataplaneError},
    },
    desired::{
        config::{ConfigError, File, SettingsError},
        store::StoreError,
    },
    lbd::{
        args::{Ingress, LbdArgs, LbdCommand},
        describe, logging, run, worker,
    },
    serve::{api::SocketError, metrics::MetricsError},
};
use clap::Parser;
use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

/// Runs the command; the exit codes are documented in the help.
pub fn main() -> ExitCode {
    let result = match LbdArgs::parse().command {
        LbdCommand::Ingress(ingress) => start(*ingress),
        LbdCommand::Worker(args) => {
            logging::init(args.log_level, args.log_format);
            on_runtime(worker::run(args))
        }
        LbdCommand::Detach(args) => on_runtime(detach(args.pin_path)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed; the exit code tells of the failure too.
            let _ = writeln!(io::stderr(), "error: {}", describe(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn start(ingress: Ingress) -> anyhow::Result<()> {
    let (file, mistakes) = ingress.config.as_deref().map(File::read_leniently).transpose()?.unzip();
    let mistakes = mistakes.flatten();
    let from_file = file.as_ref().map(|f| f.options.clone()).unwrap_or_default();
    let settings = ingress.options.or(from_file).resolve()?;
    if ingress.detach {
        return on_runtime(detach(settings.pin_path));
    }
    if settings.iface.is_empty() {
        let what = "no interface given: set at least one with --iface, LBD_IFACE or iface = [...] in [lbd]"
            .to_owned();
        return Err(SettingsError { setting: "iface", what }.into());
    }
    logging::init(settings.log_level, settings.log_format);
    on_runtime(run(settings, ingress.config, file, mistakes))
}

/// Withdraws the VIPs, then removes the programs: routers must stop sending before forwarding stops.
async fn detach(pin_path: PathBuf) -> anyhow::Result<()> {
    announce::withdraw().await?;
    Ok(tokio::task::spawn_blocking(move || dataplane::detach(&pin_path)).await??)
}

fn on_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // Does not wait for blocking work, such as reading a map.
    runtime.shutdown_background();
    result
}

/// Returns the exit code of an error, as documented in the help.
fn exit_code(error: &anyhow::Error) -> u8 {
    let is = |check: fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(check);
    if is(|e| e.is::<SettingsError>() || e.is::<ConfigError>()) {
        2
    } else if error.chain().any(|e| e.downcast_ref::<DataplaneError>().is_some_and(DataplaneError::may_pass))
    {
        5
    } else if is(|e| {
        e.is::<DataplaneError>()
            || e.is::<AnnounceError>()
            || e.is::<StoreError>()
            || e.is::<SocketError>()
            || e.is::<MetricsError>()
    }) {
        4
    } else {
        1
    }
}
