//! Logging to standard error, as text or JSON.

use crate::{
    desired::config::{LogFormat, LogLevel},
    printable::Lines,
};
use std::io::IsTerminal;
use tracing_subscriber::{EnvFilter, fmt};

/// Sets up logging for the process: our own modules at `level`, libraries at most at `warn`.
pub fn init(level: LogLevel, format: LogFormat) {
    let ours = level.label();
    let others = level.min(LogLevel::Warn).label();
    let filter =
        EnvFilter::new(format!("{others},lb_userspace={ours},lbd={ours},ingress={ours},decap={ours}"));
    // The journal adds timestamps itself.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let is_coloured = colour && format == LogFormat::Text && !journal;
    let builder =
        fmt().with_env_filter(filter).with_writer(move || Lines::new(std::io::stderr(), is_coloured));
    // A second call, in tests, changes nothing.
    let _ = match format {
        LogFormat::Json => builder.json().flatten_event(true).with_target(false).try_init(),
        LogFormat::Text if journal => builder.without_time().with_ansi(false).with_target(false).try_init(),
        LogFormat::Text => builder.with_ansi(colour).with_target(false).try_init(),
    };
}
