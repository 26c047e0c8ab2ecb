//! Forwards log lines of the XDP programs (aya-log) if they were loaded with a log level.

use crate::desired::config::LogLevel;
use aya::Ebpf;
use aya_log::EbpfLogger;
use lb_common::Reason;
use std::{borrow::Cow, time::Duration};

/// How often to fetch lines; only used if a log level is set, which it is not by default.
const PERIOD: Duration = Duration::from_millis(50);

/// Returns the log level as the program's global encodes it.
pub fn level_number(level: LogLevel) -> u8 {
    level as u8
}

/// Starts forwarding the program's log lines, if it was loaded with a level.
pub fn start(bpf: &mut Ebpf, level: LogLevel) {
    if level == LogLevel::Off {
        return;
    }
    let mut logger = match EbpfLogger::init_with_logger(bpf, ReasonNames) {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "cannot read the log of the XDP program"),
    };
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(PERIOD).await;
            logger.flush();
        }
    });
}

/// Forwards lines with the names of reasons in place of their numbers, which the programs log to save strings.
struct ReasonNames;

impl log::Log for ReasonNames {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        log::logger().enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        let mut line = log::Record::builder();
        line.metadata(record.metadata().clone());
        line.module_path(record.module_path()).file(record.file()).line(record.line());
        log::logger().log(&line.args(format_args!("{}", with_reason_name(&text))).build());
    }

    fn flush(&self) {
        log::logger().flush();
    }
}

fn with_reason_name(text: &str) -> Cow<'_, str> {
    let number = text.strip_prefix("reason ").and_then(|rest| rest.parse().ok());
    match number.and_then(Reason::from_index) {
        Some(reason) => format!("{}: {}", reason.label(), reason.describe()).into(),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_names() {
        let line = format!("reason {}", Reason::NoRoute as u32);
        assert_eq!(with_reason_name(&line), "no_route: No route to the backend");
        assert_eq!(with_reason_name("reason 9999"), "reason 9999");
        assert_eq!(with_reason_name("service 1 backend 2"), "service 1 backend 2");
    }
}
