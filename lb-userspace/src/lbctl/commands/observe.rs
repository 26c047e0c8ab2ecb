//! `lbctl status`, `stats`, `flows` and `explain`.

use super::{Context, Exit, Failure, lists::ListFlags};
use crate::{
    desired::model::{Name, Protocol},
    lbctl::{
        render::{observe, units::parse_duration},
        top::{self, TopOptions},
    },
    serve::{api::types, explain::ConnectionId},
};
use clap::Args;
use std::{io::IsTerminal, net::SocketAddr, time::Duration};

/// Width of the text of `lbctl top --once` where there is no terminal.
const ONCE_WIDTH: u16 = 80;

/// Arguments of `lbctl stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Print repeatedly, with rates
    #[arg(short, long)]
    watch: bool,
    /// With --watch: time between two prints
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "1s")]
    interval: Duration,
    /// With --watch: stop after this many prints
    #[arg(long, value_name = "N", requires = "watch")]
    count: Option<u64>,
}

/// Arguments of `lbctl top`.
#[derive(Debug, Args)]
#[command(after_help = "Keys: ? explains them, q quits. Counters and rates are this host's.")]
pub struct TopArgs {
    /// Show the backends of this service first
    service: Option<Name>,
    /// Time between two samples
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "1s")]
    interval: Duration,
    /// Print one screen as text, with the rates over one interval, and end
    #[arg(long)]
    once: bool,
}

/// Arguments of `lbctl flows`.
#[derive(Debug, Args)]
pub struct FlowsArgs {
    /// List only flows of this service
    #[arg(long, value_name = "SERVICE")]
    service: Option<Name>,
    /// List only flows to this backend
    #[arg(long, value_name = "BACKEND", requires = "service")]
    backend: Option<Name>,
    /// Maximum number of flows to list
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    #[command(flatten)]
    list: ListFlags,
}

/// Arguments of `lbctl explain`.
#[derive(Debug, Args)]
#[command(after_help = "Example: lbctl explain 192.0.2.7:40000 10.0.0.1:80 tcp")]
pub struct Explain {
    /// Address of the client, as ADDRESS:PORT (IPv6 in brackets)
    #[arg(value_parser = address_port)]
    source: SocketAddr,
    /// Address of the service (VIP), as ADDRESS:PORT (IPv6 in brackets)
    #[arg(value_parser = address_port)]
    destination: SocketAddr,
    /// Protocol: tcp or udp
    protocol: Protocol,
    /// With QUIC: destination connection ID of the packet
    #[arg(long, value_name = "HEX")]
    connection_id: Option<ConnectionId>,
}

/// Parses an address with a port.
fn address_port(text: &str) -> Result<SocketAddr, String> {
    let expected = "expected ADDRESS:PORT, such as 192.0.2.7:40000 or [2001:db8::7]:40000";
    text.parse().map_err(|_| expected.to_owned())
}

/// Prints lbd's status.
pub async fn status(context: &mut Context<'_>) -> Result<Exit, Failure> {
    let status: types::Status = context.client.get("/v1/status", &()).await?;
    if context.out.json {
        context.out.json(&status, false)?;
    } else {
        observe::status(&mut context.out, &status)?;
    }
    Ok(if status.healthy { Exit::Ok } else { Exit::No })
}

/// Prints counters, once or repeatedly.
pub async fn stats(context: &mut Context<'_>, stats: StatsArgs) -> Result<Exit, Failure> {
    let mut before: Option<types::Stats> = None;
    let mut printed = 0;
    loop {
        let now: types::Stats = context.client.get("/v1/stats", &()).await?;
        if context.out.json {
            context.out.json(&now, stats.watch)?;
        } else {
            if stats.watch && context.out.colour {
                // Cursor home, clear screen: colour is only on where the output is a terminal.
                context.out.raw(b"\x1b[H\x1b[2J")?;
            }
            observe::stats(&mut context.out, &now, before.as_ref())?;
        }
        context.out.flush()?;
        printed += 1;
        if !stats.watch || stats.count.is_some_and(|count| printed >= count) {
            return Ok(Exit::Ok);
        }
        before = Some(now);
        tokio::select! {
            () = tokio::time::sleep(stats.interval) => {}
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Ok),
        }
    }
}

/// Shows services and backends with their rates.
pub async fn top(context: &mut Context<'_>, args: TopArgs) -> Result<Exit, Failure> {
    if context.out.json {
        let what = "top has no JSON output: use `lbctl stats --watch -o json`".to_owned();
        return Err(Failure::Usage { what });
    }
    let options = TopOptions { interval: args.interval, service: args.service };
    if args.once {
        let width = context.out.columns().unwrap_or(ONCE_WIDTH);
        let text = top::once(&context.client, &options, width).await?;
        context.out.raw(text.as_bytes())?;
    } else if std::io::stdout().is_terminal() {
        top::run(&context.client, &options).await?;
    } else {
        let what = "standard output is not a terminal: give --once for one screen as text".to_owned();
        return Err(Failure::Usage { what });
    }
    Ok(Exit::Ok)
}

/// Lists tracked flows.
pub async fn flows(context: &mut Context<'_>, flows: FlowsArgs) -> Result<Exit, Failure> {
    context.list(&flows.list, async |context| list_flows(context, &flows).await).await
}

async fn list_flows(context: &mut Context<'_>, flows: &FlowsArgs) -> Result<Exit, Failure> {
    let mut query = vec![("limit", flows.limit.to_string())];
    query.extend(flows.service.as_ref().map(|s| ("service", s.to_string())));
    query.extend(flows.backend.as_ref().map(|b| ("backend", b.to_string())));
    let list: types::Flows = context.client.get("/v1/flows", &query).await?;
    if context.out.json {
        context.out.json(&list, false)?;
    } else if list.flows.is_empty() {
        say!("no tracked flows: the stateless lookup is right for all flows");
    } else {
        observe::flows(&mut context.out, &list)?;
        if list.more {
            context.out.flush()?;
            say!("more flows exist: raise --limit");
        }
    }
    Ok(Exit::Ok)
}

/// Explains where a packet goes.
pub async fn explain(context: &mut Context<'_>, explain: Explain) -> Result<Exit, Failure> {
    let mut query = vec![
        ("source", explain.source.to_string()),
        ("destination", explain.destination.to_string()),
        ("protocol", explain.protocol.to_string()),
    ];
    query.extend(explain.connection_id.map(|id| ("connection_id", id.to_string())));
    let found: types::Explanation = context.client.get("/v1/explain", &query).await?;
    if context.out.json {
        context.out.json(&found, false)?;
    } else {
        observe::explanation(&mut context.out, &found)?;
    }
    let forwarded = found.answers.iter().any(|a| a.backend.is_some());
    Ok(if forwarded { Exit::Ok } else { Exit::No })
}
