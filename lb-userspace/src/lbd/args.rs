//! The command line of `lbd`.

use crate::desired::config::{LogFormat, LogLevel, Options};
use clap::{Args, Parser, Subcommand};
use std::{net::IpAddr, path::PathBuf};

const EXIT_CODES: &str = "\
Exit codes:
  0  stopped as asked
  1  failed while running
  2  the command line or the configuration file is invalid
  4  refused: no privileges, no XDP, another lbd is running, or the store or pins do not match
  5  refused for now: none of the interfaces exists, or their drivers reject the program with their
     current settings (MTU, queues, offloads); a later start may succeed

Every flag of `ingress` is also a key of [lbd] in the configuration file. Flags take precedence over
the environment, and the environment over the file.";

/// XDP load balancer: the daemon
#[derive(Debug, Parser)]
#[command(name = "lbd", version, after_help = EXIT_CODES, max_term_width = 100, disable_help_subcommand = true)]
pub struct LbdArgs {
    /// Subcommand
    #[command(subcommand)]
    pub command: LbdCommand,
}

/// Subcommands of `lbd`.
#[derive(Debug, Subcommand)]
pub enum LbdCommand {
    /// Run the load balancer on this host's interfaces
    Ingress(Box<Ingress>),
    /// Decapsulate packets on a worker and pass them to its network stack
    Worker(WorkerArgs),
    /// Stop forwarding: remove the programs and maps that a daemon left pinned
    Detach(Detach),
}

/// Arguments of `lbd ingress`.
#[derive(Debug, Args)]
pub struct Ingress {
    /// Configuration file: settings in [lbd], and services that become the desired state
    #[arg(long, value_name = "FILE", env = "LBD_CONFIG")]
    pub config: Option<PathBuf>,
    /// Settings.
    #[command(flatten)]
    pub options: Options,
    /// Stop forwarding: remove the pinned programs and maps, then exit
    #[arg(long)]
    pub detach: bool,
}

/// Arguments of `lbd detach`.
#[derive(Debug, Args)]
pub struct Detach {
    /// Directory in which the programs and maps are pinned
    #[arg(long, value_name = "DIR", env = "LBD_PIN_PATH", default_value = "/sys/fs/bpf/lb")]
    pub pin_path: PathBuf,
}

/// Arguments of `lbd worker`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// Interface on which encapsulated packets arrive; may be repeated
    #[arg(
        long,
        value_name = "IFACE",
        env = "LBD_IFACE",
        value_delimiter = ',',
        required_unless_present = "detach"
    )]
    pub iface: Vec<String>,
    /// Address of this worker, as configured on the load balancer; may be repeated [default: those of the interfaces]
    #[arg(long, value_name = "ADDRESS", env = "LBD_ADDRESS", value_delimiter = ',')]
    pub address: Vec<IpAddr>,
    /// VIP that this worker serves, added to the loopback interface; may be repeated
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "LBD_VIP",
        value_delimiter = ',',
        required_unless_present = "detach"
    )]
    pub vip: Vec<IpAddr>,
    /// UDP port on which GUE packets arrive
    #[arg(long, value_name = "PORT", env = "LBD_GUE_PORT", default_value_t = lb_common::settings::GUE_PORT)]
    pub gue_port: u16,
    /// Answer SYNs with SYN cookies in XDP while a listener's queue is full
    #[arg(long, value_name = "BOOL", env = "LBD_SYN_COOKIES", num_args = 0..=1, default_missing_value = "true", default_value = "true", action = clap::ArgAction::Set)]
    pub syn_cookies: bool,
    /// Directory in a bpf filesystem where programs, maps and links are pinned
    #[arg(long, value_name = "DIR", env = "LBD_PIN_PATH", default_value = "/sys/fs/bpf/lb-worker")]
    pub pin_path: PathBuf,
    /// Address on which to serve metrics over HTTP at /metrics, or off
    #[arg(long, value_name = "ADDRESS", env = "LBD_METRICS", default_value = "off")]
    pub metrics: String,
    /// Attach in generic mode (slow) if the driver has no XDP support
    #[arg(long, env = "LBD_ALLOW_GENERIC", num_args = 0..=1, default_missing_value = "true", default_value = "false")]
    pub allow_generic: bool,
    /// Before attaching, disable NIC offloads that are incompatible with XDP (LRO, VLAN tag stripping)
    #[arg(long, env = "LBD_FIX_OFFLOADS", num_args = 0..=1, default_missing_value = "true", default_value = "false")]
    pub fix_offloads: bool,
    /// Log level
    #[arg(long, value_name = "LEVEL", env = "LBD_LOG_LEVEL", default_value = "info")]
    pub log_level: LogLevel,
    /// Log format
    #[arg(long, value_name = "FORMAT", env = "LBD_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Log level of the XDP program, which logs per packet
    #[arg(long, value_name = "LEVEL", env = "LBD_XDP_LOG_LEVEL", default_value = "off")]
    pub xdp_log_level: LogLevel,
    /// Stop: remove the programs and maps, remove the given VIPs from the loopback interface, then exit
    #[arg(long)]
    pub detach: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        super::LbdArgs::command().debug_assert();
    }
}
