//! `lbd worker`: takes encapsulated packets on a worker and hands them to its own stack.
//!
//! Input: interfaces, this worker's addresses, the VIPs that it serves. Output: the decap program attached,
//! the VIPs on the loopback interface, and a warning for each setting of the host that would lose packets.
//! Runs until told to stop; decapsulation goes on after it. Called by the binary.

use crate::{
    config::SettingsError,
    daemon::{args::Worker, xdp_log},
    dataplane::{DataplaneError, DecapDataplane, DecapOptions, detach},
    metrics,
    neighbour::netlink::address_in,
    worker_route,
};
use anyhow::Context;
use futures_util::TryStreamExt;
use lb_common::{Address, mapped, settings::DecapSettings};
use rtnetlink::{
    Handle,
    packet_route::address::{
        AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol,
    },
};
use sd_notify::NotifyState;
use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::signal::unix::{SignalKind, signal};

/// Marks the addresses that we put on the loopback interface (IFA_PROTO, Linux 5.18), so that we take off
/// only our own.
const OURS: u8 = 0x6c;
/// Index of the loopback interface: the first in every network namespace.
const LOOPBACK: u32 = 1;
/// Largest packet of a client whose path has the usual MTU.
const USUAL_MTU: u32 = 1_500;
/// Largest encapsulation: IPv6, UDP and GUE.
const OVERHEAD: u32 = 40 + 8 + 4;

/// Runs until told to stop.
///
/// # Errors
/// The start failed; nothing that ran before was touched.
pub async fn run(args: Worker) -> anyhow::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    tokio::spawn(connection);
    if args.detach {
        return stop_for_good(&handle, &args).await;
    }
    check_vips(&args.vip)?;
    let metrics = match args.metrics.as_str() {
        "off" => None,
        text => Some(
            text.parse().with_context(|| format!("--metrics {text:?} is neither ADDRESS:PORT nor off"))?,
        ),
    };
    let metrics = metrics::bind(metrics, true).await?;
    let addresses = if args.address.is_empty() {
        own_addresses(&handle, &args.iface).await?
    } else {
        args.address.iter().copied().collect()
    };
    if addresses.is_empty() {
        let what = format!("{} has none: give the worker's with --address", args.iface.join(", "));
        return Err(SettingsError { setting: "address", what }.into());
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let options = DecapOptions {
        interfaces: args.iface.clone(),
        allow_generic: args.allow_generic,
        pin_path: args.pin_path.clone(),
        settings: DecapSettings { gue_port: args.gue_port, ..DecapSettings::DEFAULT },
        log_level: xdp_log::number(args.xdp_log_level),
        cookies: args.syn_cookies,
    };
    // What it must know stands in its maps at once: a first packet after the attachment is let through or
    // dropped by rule, never by chance. Adopted maps already hold what the last daemon served.
    let mut decap = tokio::task::spawn_blocking(move || DecapDataplane::attach(&options)).await??;
    decap.set_addresses(&addresses.iter().map(to_address).collect())?;
    decap.set_vips(&args.vip.iter().map(to_address).collect())?;
    if let Some(from) = decap.take_over()? {
        tracing::info!(from, to = lb_common::ABI_VERSION, "taken over from another ABI version");
    }
    for i in &decap.interfaces {
        tracing::info!(interface = i.name, mode = i.mode, adopted = decap.adopted, "attached");
    }
    put_vips(&handle, &args.vip).await?;
    for warning in warnings(&handle, &args).await {
        tracing::warn!("{warning}");
    }
    xdp_log::start(decap.bpf_mut(), args.xdp_log_level);
    let decap = Arc::new(Mutex::new(decap));
    if args.syn_cookies {
        tokio::spawn(worker_route::follow(Arc::clone(&decap)));
    }
    if let Some(listener) = metrics {
        let text =
            move || metrics::worker_text(&decap.lock().unwrap_or_else(PoisonError::into_inner).reasons());
        tokio::spawn(metrics::serve_text(listener, std::future::pending(), text));
    } else {
        // Keeps the pins' lock for as long as we live.
        std::mem::forget(decap);
    }
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    tracing::info!(addresses = %list(&addresses), vips = %list(&args.vip), "ready");
    let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = tokio::time::sleep(watchdog.unwrap_or(Duration::from_secs(3_600))) => {
                let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            }
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    tracing::info!("stopping; decapsulation goes on, and the VIPs stay");
    Ok(())
}

fn list<'a>(addresses: impl IntoIterator<Item = &'a IpAddr>) -> String {
    addresses.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn check_vips(vips: &[IpAddr]) -> Result<(), SettingsError> {
    let bad = vips.iter().find(|vip| vip.is_unspecified() || vip.is_multicast() || vip.is_loopback());
    match bad {
        Some(vip) => Err(SettingsError {
            setting: "vip",
            what: format!("{vip} is no address that clients could reach"),
        }),
        None => Ok(()),
    }
}

fn to_address(ip: &IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

async fn addresses_of(handle: &Handle, ifindex: u32) -> anyhow::Result<Vec<AddressMessage>> {
    let request = handle.address().get().set_link_index_filter(ifindex);
    request.execute().try_collect().await.context("cannot read the addresses of interfaces")
}

/// Global addresses of interfaces.
async fn own_addresses(handle: &Handle, interfaces: &[String]) -> anyhow::Result<BTreeSet<IpAddr>> {
    let mut found = BTreeSet::new();
    for name in interfaces {
        let Ok(ifindex) = nix::net::if_::if_nametoindex(name.as_str()) else {
            let all = nix::net::if_::if_nameindex().context("cannot list interfaces")?;
            let mut present: Vec<String> =
                all.iter().map(|i| i.name().to_string_lossy().into_owned()).collect();
            present.sort();
            let (interface, present) = (name.clone(), present.join(", "));
            return Err(DataplaneError::NoInterface { interface, present }.into());
        };
        let all = addresses_of(handle, ifindex).await?;
        let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        found.extend(all.iter().filter_map(address_in).filter(|ip| !link_local(ip)));
    }
    Ok(found)
}

/// Puts VIPs on the loopback interface, and takes off those that an earlier start put there.
async fn put_vips(handle: &Handle, vips: &[IpAddr]) -> anyhow::Result<()> {
    let up = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
    handle.link().set(up).execute().await.context("cannot set the loopback interface up")?;
    for vip in vips {
        let length = if vip.is_ipv4() { 32 } else { 128 };
        let mut request = handle.address().add(LOOPBACK, *vip, length).replace();
        let message = request.message_mut();
        message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(OURS)));
        if vip.is_ipv6() {
            // On the loopback interface there is nobody to ask, and a tentative address takes no packets.
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.with_context(|| format!("cannot put {vip} on the loopback interface"))?;
    }
    let keep: BTreeSet<IpAddr> = vips.iter().copied().collect();
    take_off(handle, |ip, ours| ours && !keep.contains(&ip)).await
}

/// Takes addresses off the loopback interface; `which` sees each with whether it is marked as ours.
async fn take_off(handle: &Handle, which: impl Fn(IpAddr, bool) -> bool) -> anyhow::Result<()> {
    for message in addresses_of(handle, LOOPBACK).await? {
        let Some(ip) = address_in(&message) else { continue };
        let mark = AddressAttribute::Protocol(AddressProtocol::Other(OURS));
        if which(ip, message.attributes.contains(&mark)) {
            tracing::info!(vip = %ip, "taken off the loopback interface");
            let request = handle.address().del(message);
            request
                .execute()
                .await
                .with_context(|| format!("cannot take {ip} off the loopback interface"))?;
        }
    }
    Ok(())
}

async fn stop_for_good(handle: &Handle, args: &Worker) -> anyhow::Result<()> {
    let pins = args.pin_path.clone();
    tokio::task::spawn_blocking(move || detach(&pins)).await??;
    take_off(handle, |ip, ours| ours || args.vip.contains(&ip)).await?;
    tracing::info!(pins = %args.pin_path.display(), "detached");
    Ok(())
}

/// A number under `/proc/sys/net/`.
fn sysctl(path: &str) -> Option<u32> {
    fs::read_to_string(format!("/proc/sys/net/{path}")).ok()?.trim().parse().ok()
}

/// What about this host would lose packets, each with the command that mends it.
async fn warnings(handle: &Handle, args: &Worker) -> Vec<String> {
    let mut found = Vec::new();
    let (v4, v6) = (args.vip.iter().any(IpAddr::is_ipv4), args.vip.iter().any(IpAddr::is_ipv6));
    for name in &args.iface {
        let of = |scope: &str, key: &str| sysctl(&format!("ipv4/conf/{scope}/{key}")).unwrap_or(0);
        let effective = |key: &str| of("all", key).max(of(name, key));
        if v4 && effective("rp_filter") == 1 {
            found.push(format!(
                "strict reverse path filtering on {name} drops clients whose replies leave by another interface: \
                 `sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{name}.rp_filter=2`"
            ));
        }
        if v4 && effective("arp_ignore") == 0 {
            found.push(format!(
                "{name} answers ARP for the VIPs, which takes them from the balancer if both share a link: \
                 `sysctl -w net.ipv4.conf.{name}.arp_ignore=1 net.ipv4.conf.{name}.arp_announce=2`"
            ));
        }
        if v6 && sysctl(&format!("ipv6/conf/{name}/disable_ipv6")) == Some(1) {
            found.push(format!(
                "IPv6 is off on {name}, and packets for IPv6 VIPs are dropped: \
                 `sysctl -w net.ipv6.conf.{name}.disable_ipv6=0`"
            ));
        }
        if let Some(mtu) = mtu(handle, name).await
            && mtu < USUAL_MTU + OVERHEAD
        {
            found.push(format!(
                "{name} has MTU {mtu}: packets of {USUAL_MTU} bytes do not fit once encapsulated, so the balancer \
                 tells clients to send smaller ones; with jumbo frames between balancer and workers they need not: \
                 `ip link set dev {name} mtu 1600` or more, here and there"
            ));
        }
    }
    found
}

async fn mtu(handle: &Handle, name: &str) -> Option<u32> {
    use rtnetlink::packet_route::link::LinkAttribute;
    let message = handle.link().get().match_name(name.to_owned()).execute().try_next().await.ok()??;
    message.attributes.iter().find_map(|a| if let LinkAttribute::Mtu(mtu) = a { Some(*mtu) } else { None })
}
