//! Log lines of the XDP programs (aya-log), where they were loaded with a level.

use crate::desired::config::LogLevel;
use aya::Ebpf;
use aya_log::EbpfLogger;
use lb_common::Reason;
use std::{borrow::Cow, time::Duration};

/// How often lines are fetched. Only while someone looks into something: by default there are none.
const PERIOD: Duration = Duration::from_millis(50);

/// Level as the program's global has it.
pub fn number(level: LogLevel) -> u8 {
    level as u8
}

/// Starts passing the program's log lines on, if it was loaded with a level.
pub fn start(bpf: &mut Ebpf, level: LogLevel) {
    if level == LogLevel::Off {
        return;
    }
    let mut logger = match EbpfLogger::init_with_logger(bpf, Named) {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "the program's log cannot be read"),
    };
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(PERIOD).await;
            logger.flush();
        }
    });
}

/// Passes lines on with names in place of the numbers of reasons: programs have no strings to spare.
struct Named;

impl log::Log for Named {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        log::logger().enabled(metadata)
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        let mut line = log::Record::builder();
        line.metadata(record.metadata().clone());
        line.module_path(record.module_path()).file(record.file()).line(record.line());
        log::logger().log(&line.args(format_args!("{}", named(&text))).build());
    }

    fn flush(&self) {
        log::logger().flush();
    }
}

fn named(text: &str) -> Cow<'_, str> {
    let number = text.strip_prefix("reason ").and_then(|rest| rest.parse().ok());
    match number.and_then(Reason::from_index) {
        Some(reason) => format!("{}: {}", reason.label(), reason.describe().trim()).into(),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_names() {
        let line = format!("reason {}", Reason::NoRoute as u32);
        assert_eq!(named(&line), "no_route: No route to the backend");
        assert_eq!(named("reason 9999"), "reason 9999");
        assert_eq!(named("service 1 backend 2"), "service 1 backend 2");
    }
}
