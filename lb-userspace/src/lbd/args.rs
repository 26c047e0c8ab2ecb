//! The command line of `lbd`.

use crate::desired::config::{LogFormat, LogLevel, Options};
use clap::{Args, Parser, Subcommand};
use std::{net::IpAddr, path::PathBuf};

const EXIT_CODES: &str = "\
Exit codes:
  0  stopped as asked
  1  failed while running
  2  the command line or the configuration file is wrong
  4  refused: no privileges, no XDP, another lbd is there, or the store or the pins do not fit
  5  refused for now: none of the interfaces is there, or their drivers do not take the program as
     they are set up (MTU, queues, offloads); started again later, lbd may succeed

Every flag of `ingress` is also a key of [lbd] in the configuration file; flags win over the
environment, the environment over the file.";

/// XDP load balancer: the daemon
#[derive(Debug, Parser)]
#[command(name = "lbd", version, after_help = EXIT_CODES, max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Balance packets that arrive on this host's interfaces
    Ingress(Box<Ingress>),
    /// Take encapsulated packets on a worker, and hand them to its own stack
    Worker(Worker),
    /// Stop forwarding: remove programs and maps that a daemon left pinned
    Detach(Detach),
}

/// `lbd ingress`.
#[derive(Debug, Args)]
pub struct Ingress {
    /// Configuration file: settings in [lbd], and services, which become the desired state
    #[arg(long, value_name = "FILE", env = "LBD_CONFIG")]
    pub config: Option<PathBuf>,
    /// Settings.
    #[command(flatten)]
    pub options: Options,
    /// Stop forwarding instead: remove programs and maps, and end
    #[arg(long)]
    pub detach: bool,
}

/// `lbd detach`.
#[derive(Debug, Args)]
pub struct Detach {
    /// Directory of the pins
    #[arg(long, value_name = "DIR", env = "LBD_PIN_PATH", default_value = "/sys/fs/bpf/lb")]
    pub pin_path: PathBuf,
}

/// `lbd worker`.
#[derive(Debug, Args)]
pub struct Worker {
    /// Interface on which encapsulated packets arrive; may be repeated
    #[arg(
        long,
        value_name = "IFACE",
        env = "LBD_IFACE",
        value_delimiter = ',',
        required_unless_present = "detach"
    )]
    pub iface: Vec<String>,
    /// Address of this worker, as the balancer knows it; may be repeated [default: those of the interfaces]
    #[arg(long, value_name = "ADDRESS", env = "LBD_ADDRESS", value_delimiter = ',')]
    pub address: Vec<IpAddr>,
    /// VIP that this worker serves, put on the loopback interface; may be repeated
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "LBD_VIP",
        value_delimiter = ',',
        required_unless_present = "detach"
    )]
    pub vip: Vec<IpAddr>,
    /// UDP port on which GUE arrives
    #[arg(long, value_name = "PORT", env = "LBD_GUE_PORT", default_value_t = lb_common::settings::GUE_PORT)]
    pub gue_port: u16,
    /// Answer SYNs by cookie before the stack sees them, while a listener's queue is full
    #[arg(long, value_name = "BOOL", env = "LBD_SYN_COOKIES", num_args = 0..=1, default_missing_value = "true", default_value = "true", action = clap::ArgAction::Set)]
    pub syn_cookies: bool,
    /// Directory in a bpf filesystem where programs, maps and links are pinned
    #[arg(long, value_name = "DIR", env = "LBD_PIN_PATH", default_value = "/sys/fs/bpf/lb-worker")]
    pub pin_path: PathBuf,
    /// Address on which metrics are served over HTTP at /metrics, or off
    #[arg(long, value_name = "ADDRESS", env = "LBD_METRICS", default_value = "off")]
    pub metrics: String,
    /// Attach in generic mode (slow) where the driver has no XDP support
    #[arg(long, env = "LBD_ALLOW_GENERIC", num_args = 0..=1, default_missing_value = "true", default_value = "false")]
    pub allow_generic: bool,
    /// Switch off offloads of the NIC that do not go with XDP (LRO, VLAN tags taken off) before attaching
    #[arg(long, env = "LBD_FIX_OFFLOADS", num_args = 0..=1, default_missing_value = "true", default_value = "false")]
    pub fix_offloads: bool,
    /// How much is logged
    #[arg(long, value_name = "LEVEL", env = "LBD_LOG_LEVEL", default_value = "info")]
    pub log_level: LogLevel,
    /// How log lines look
    #[arg(long, value_name = "FORMAT", env = "LBD_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What the XDP program logs, per packet
    #[arg(long, value_name = "LEVEL", env = "LBD_XDP_LOG_LEVEL", default_value = "off")]
    pub xdp_log_level: LogLevel,
    /// Stop instead: remove programs and maps, take the VIPs given off the loopback interface, and end
    #[arg(long)]
    pub detach: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        super::Cli::command().debug_assert();
    }
}
