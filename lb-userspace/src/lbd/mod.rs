//! The daemon `lbd`: `lbd ingress` ([`run`]) and `lbd worker` ([`worker`]).

pub mod args;
mod attach;
pub mod command;
mod hardware;
mod hooks;
mod ingress;
mod live;
pub mod logging;
mod nat_ports;
mod own_thread;
mod processors;
mod reconciler_client;
pub mod report;
mod services_file;
pub mod state;
mod supervise;
pub mod worker;
mod worker_route;
pub mod xdp_log;

pub use hardware::TRUNCATED_RISES;
pub use ingress::run;
pub use live::LiveEngine;
pub use reconciler_client::ReconcilerClient;

use sd_notify::NotifyState;

/// Describes an error with its causes, without causes that the text already contains.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Notifies the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}
