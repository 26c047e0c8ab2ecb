//! Log lines of the XDP programs (aya-log), where they were loaded with a level.

use crate::config::LogLevel;
use aya::Ebpf;
use aya_log::EbpfLogger;
use std::time::Duration;

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
    let mut logger = match EbpfLogger::init(bpf) {
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
