//! The command `lbd`: reads its arguments and runs `ingress`, `worker` or `detach`. Called by the binaries.

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
        args::{Cli, Command, Ingress},
        logging, run, told, worker,
    },
    serve::{api::SocketError, metrics::MetricsError},
};
use clap::Parser;
use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

/// Runs it; the exit code is as documented in the help.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Ingress(ingress) => start(*ingress),
        Command::Worker(args) => {
            logging::init(args.log_level, args.log_format);
            on_runtime(worker::run(args))
        }
        Command::Detach(args) => on_runtime(detach(args.pin_path)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be there to read it; the exit code says it too.
            let _ = writeln!(io::stderr(), "error: {}", told(&error));
            ExitCode::from(code(&error))
        }
    }
}

fn start(ingress: Ingress) -> anyhow::Result<()> {
    let file = ingress.config.as_deref().map(File::read).transpose()?;
    let said = file.as_ref().map(|f| f.options.clone()).unwrap_or_default();
    let settings = ingress.options.or(said).resolve()?;
    if ingress.detach {
        return on_runtime(detach(settings.pin_path));
    }
    if settings.iface.is_empty() {
        let what =
            "none given: name at least one with --iface, LBD_IFACE or iface = [...] in [lbd]".to_owned();
        return Err(SettingsError { setting: "iface", what }.into());
    }
    logging::init(settings.log_level, settings.log_format);
    on_runtime(run(settings, ingress.config, file))
}

/// VIPs first, so that no router sends what nobody forwards.
async fn detach(pin_path: PathBuf) -> anyhow::Result<()> {
    announce::withdraw().await?;
    Ok(tokio::task::spawn_blocking(move || dataplane::detach(&pin_path)).await??)
}

fn on_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // Work that blocks, such as a read of a map, is not waited for.
    runtime.shutdown_background();
    result
}

/// Exit code, as documented in the help.
fn code(error: &anyhow::Error) -> u8 {
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
