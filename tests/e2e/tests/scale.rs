//! 100 services with 100 backends each: how long a change takes from the API
//! call to the written map. The bounds hold for optimised builds
//! (`cargo xtask test e2e --release`); others get ten times as long.

use std::{fmt::Write as _, net::Ipv4Addr, time::Duration};

use anyhow::{Context, Result, ensure};
use test_support::{
    bed::{Bed, Layout},
    daemon::Ingress,
};

const SERVICES: u8 = 100;
const BACKENDS: u8 = 100;
const CHANGES: usize = if cfg!(debug_assertions) { 20 } else { 200 };
const PATIENCE: Duration = Duration::from_millis(if cfg!(debug_assertions) { 2_000 } else { 10 });

/// Without probes: 10,000 backends that nobody has built.
fn configuration(backends: u8, table_size: Option<u32>) -> Result<String> {
    let mut text = String::new();
    for service in 1..=SERVICES {
        let vip = Ipv4Addr::new(10, 99, 1, service);
        writeln!(text, "[[service]]\nname = \"s{service}\"\nvip = \"{vip}\"\nport = 80\nprotocol = \"tcp\"")?;
        if let Some(size) = table_size {
            writeln!(text, "table_size = {size}")?;
        }
        writeln!(text, "[service.health]\nkind = \"none\"")?;
        for backend in 1..=backends {
            let address = Ipv4Addr::new(10, 1, service, backend);
            writeln!(text, "[[service.backend]]\nname = \"b{backend}\"\naddress = \"{address}\"")?;
        }
    }
    Ok(text)
}

#[test]
fn a_change_among_ten_thousand_backends_is_written_in_time() -> Result<()> {
    let bed = Bed::new(Layout { workers: 1, ..Layout::default() })?;
    let ingress = Ingress::start(&bed, &[])?;
    let lbctl = ingress.lbctl()?;
    let path = bed.path("services.toml");
    std::fs::write(&path, configuration(BACKENDS, None)?)?;
    let applied = lbctl.json(&["config", "apply", &path.display().to_string()])?;
    println!("10,000 backends at once: {}", applied["applied"]);

    let mut times = Vec::with_capacity(CHANGES);
    for number in 0..CHANGES {
        // Each backend drains, and is back with the next change.
        let place = number / 2;
        let (service, backend) = (format!("s{}", place % 100 + 1), format!("b{}", place * 7 % 100 + 1));
        let verb = if number % 2 == 0 { "drain" } else { "undrain" };
        let change = lbctl.json(&["backend", verb, &service, &backend])?;
        let micros = change["applied"]["took_us"].as_u64();
        times.push(Duration::from_micros(micros.with_context(|| format!("not applied: {change}"))?));
    }
    times.sort_unstable();
    let p99 = times[(times.len() - 1) * 99 / 100];
    println!("{} changes: median {:?}, p99 {p99:?}", times.len(), times[times.len() / 2]);
    ensure!(p99 < PATIENCE, "p99 is {p99:?}");
    Ok(())
}
