//! `lbd worker`: decapsulates packets on a worker and passes them to its network stack.
//!
//! Input: interfaces, this worker's addresses, the VIPs that it serves. Output: the attached decap program, the VIPs on
//! the loopback interface, and a warning for each host setting that would drop packets. Runs until SIGTERM or SIGINT;
//! decapsulation continues afterwards. Called by the binary.

use crate::{
    apply::{
        dataplane::{
            DataplaneError, DecapDataplane, DecapOptions, Interfaces, detach, interfaces_with_programs,
            pinned_vips,
        },
        link_events::LinkEvents,
        offloads,
    },
    desired::config::SettingsError,
    lbd::{
        worker_route,
        {args::WorkerArgs, xdp_log},
    },
    observed::neighbour::netlink::address_in,
    serve::metrics,
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
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Address protocol (IFA_PROTO) of the addresses that we add to the loopback interface: `ip address` shows it, and it
/// identifies them if the pins are gone. Kernels before 5.18 do not store it; the pinned maps also list our addresses.
const OWN_PROTOCOL: u8 = 0x6c;
/// Index of the loopback interface: the first in every network namespace.
const LOOPBACK: u32 = 1;
/// Largest packet of a client whose path has the usual MTU.
const USUAL_MTU: u32 = 1_500;
/// Largest encapsulation: IPv6, UDP and GUE.
const OVERHEAD: u32 = 40 + 8 + 4;

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// The start failed; nothing that ran before was touched.
pub async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
    tokio::spawn(connection);
    if args.detach {
        return detach_worker(&handle, &args).await;
    }
    check_vips(&args.vip)?;
    let metrics = bind_metrics(&args.metrics).await?;
    let addresses = worker_addresses(&handle, &args).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let mut decap = attach(&handle, &args, &addresses).await?;
    tokio::spawn(watch_interfaces(decap.interfaces.clone()));
    for warning in warnings(&handle, &args).await {
        tracing::warn!("{warning}");
    }
    xdp_log::start(decap.bpf_mut(), args.xdp_log_level);
    let decap = Arc::new(Mutex::new(decap));
    if args.syn_cookies {
        tokio::spawn(worker_route::keep_updated(Arc::clone(&decap)));
    }
    if let Some(listener) = metrics {
        let text =
            move || metrics::worker_text(&decap.lock().unwrap_or_else(PoisonError::into_inner).reasons());
        tokio::spawn(metrics::serve_text(listener, std::future::pending(), text));
    } else {
        // Keeps the lock of the pins until the process ends.
        std::mem::forget(decap);
    }
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    tracing::info!(addresses = %list(&addresses), vips = %list(&args.vip), "ready");
    wait_for_stop(&mut terminate, &mut interrupt).await;
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    tracing::info!("stopping: decapsulation continues, and the VIPs stay assigned");
    Ok(())
}

/// Binds the address of metrics, if it is not `off`.
async fn bind_metrics(address: &str) -> anyhow::Result<Option<tokio::net::TcpListener>> {
    let address = match address {
        "off" => None,
        text => Some(
            text.parse().with_context(|| format!("--metrics {text:?} is neither ADDRESS:PORT nor off"))?,
        ),
    };
    Ok(metrics::bind(address, true).await?)
}

/// Returns the addresses at which encapsulated packets arrive.
async fn worker_addresses(handle: &Handle, args: &WorkerArgs) -> anyhow::Result<BTreeSet<IpAddr>> {
    let addresses = if args.address.is_empty() {
        own_addresses(handle, &args.iface).await?
    } else {
        args.address.iter().copied().collect()
    };
    if addresses.is_empty() {
        let what =
            format!("{} has no address: give the worker's address with --address", args.iface.join(", "));
        return Err(SettingsError { setting: "address", what }.into());
    }
    Ok(addresses)
}

/// Attaches the program, fills its maps, and assigns the VIPs.
async fn attach(
    handle: &Handle,
    args: &WorkerArgs,
    addresses: &BTreeSet<IpAddr>,
) -> anyhow::Result<DecapDataplane> {
    if args.fix_offloads {
        args.iface.iter().for_each(|name| offloads::fix(name));
    }
    let options = DecapOptions {
        interfaces: args.iface.clone(),
        allow_generic: args.allow_generic,
        pin_path: args.pin_path.clone(),
        settings: DecapSettings { gue_port: args.gue_port, ..DecapSettings::DEFAULT },
        log_level: xdp_log::level_number(args.xdp_log_level),
        cookies: args.syn_cookies,
    };
    // The maps are filled right after the attachment, so that the first packets are passed or dropped by rule. Adopted
    // maps already hold what the last daemon served.
    let mut decap = tokio::task::spawn_blocking(move || DecapDataplane::attach(&options)).await??;
    decap.set_addresses(&addresses.iter().map(to_address).collect())?;
    // VIPs that were served before stay in the maps until their addresses are removed: if this start is killed, the next
    // start still knows them.
    let (before, vips) = (decap.served()?, args.vip.iter().map(to_address).collect::<BTreeSet<_>>());
    decap.set_vips(&before.union(&vips).copied().collect())?;
    if let Some(from) = decap.take_over()? {
        tracing::info!(from, to = lb_common::ABI_VERSION, "taken over from another ABI version");
    }
    log_programs(&decap);
    assign_vips(handle, &args.vip, &before.difference(&vips).map(to_ip).collect()).await?;
    decap.set_vips(&vips)?;
    Ok(decap)
}

/// Waits for SIGTERM or SIGINT, and notifies the service manager's watchdog meanwhile.
async fn wait_for_stop(terminate: &mut Signal, interrupt: &mut Signal) {
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
}

/// Logs which programs are attached where, and which are not available.
fn log_programs(decap: &DecapDataplane) {
    for one in &decap.left_out {
        tracing::warn!(program = one.program, "program not available: {}", one.reason);
    }
    for i in decap.interfaces.attached() {
        let why = i.why_generic.unwrap_or_default();
        tracing::info!(interface = i.name, mode = i.mode, why, adopted = decap.adopted, "attached");
    }
    for waiting in decap.interfaces.waiting() {
        tracing::warn!(interface = waiting.name, "not attached, retrying every second: {}", waiting.reason);
    }
}

/// Compares and repairs the interfaces while the worker runs.
async fn watch_interfaces(interfaces: Arc<Interfaces>) {
    let mut changes = LinkEvents::open();
    loop {
        changes.next().await;
        let interfaces = interfaces.clone();
        let Ok(repaired) = tokio::task::spawn_blocking(move || interfaces.repair()).await else { return };
        for i in repaired.new {
            tracing::info!(interface = i.name, mode = i.mode, "attached");
        }
    }
}

fn list<'a>(addresses: impl IntoIterator<Item = &'a IpAddr>) -> String {
    addresses.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn check_vips(vips: &[IpAddr]) -> Result<(), SettingsError> {
    let bad = vips.iter().find(|vip| vip.is_unspecified() || vip.is_multicast() || vip.is_loopback());
    match bad {
        Some(vip) => Err(SettingsError {
            setting: "vip",
            what: format!(
                "{vip} is not an address that clients can reach: give a unicast address other than loopback"
            ),
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

fn to_ip(address: &Address) -> IpAddr {
    Ipv6Addr::from(*address).to_canonical()
}

async fn addresses_of(handle: &Handle, ifindex: u32) -> anyhow::Result<Vec<AddressMessage>> {
    let request = handle.address().get().set_link_index_filter(ifindex);
    request.execute().try_collect().await.context("cannot read the addresses of interfaces")
}

/// Returns the addresses of interfaces, without link-local ones.
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

/// Assigns VIPs to the loopback interface, and removes the `obsolete` ones that an earlier start assigned.
async fn assign_vips(handle: &Handle, vips: &[IpAddr], obsolete: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
    let up = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
    handle.link().set(up).execute().await.context("cannot set the loopback interface up")?;
    for vip in vips {
        let length = if vip.is_ipv4() { 32 } else { 128 };
        let mut request = handle.address().add(LOOPBACK, *vip, length).replace();
        let message = request.message_mut();
        message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(OWN_PROTOCOL)));
        if vip.is_ipv6() {
            // The loopback interface needs no duplicate detection, and a tentative address receives no packets.
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.with_context(|| format!("cannot assign {vip} to the loopback interface"))?;
    }
    remove_addresses(handle, |ip, _| obsolete.contains(&ip)).await
}

/// Removes addresses from the loopback interface. `which` selects them, given whether an address is marked as ours.
async fn remove_addresses(handle: &Handle, which: impl Fn(IpAddr, bool) -> bool) -> anyhow::Result<()> {
    for message in addresses_of(handle, LOOPBACK).await? {
        let Some(ip) = address_in(&message) else { continue };
        let mark = AddressAttribute::Protocol(AddressProtocol::Other(OWN_PROTOCOL));
        if which(ip, message.attributes.contains(&mark)) {
            tracing::info!(vip = %ip, "removed from the loopback interface");
            let request = handle.address().del(message);
            request
                .execute()
                .await
                .with_context(|| format!("cannot remove {ip} from the loopback interface"))?;
        }
    }
    Ok(())
}

/// Removes the programs, the pins, and the VIPs that this worker added.
async fn detach_worker(handle: &Handle, args: &WorkerArgs) -> anyhow::Result<()> {
    let pins = args.pin_path.clone();
    let served = tokio::task::spawn_blocking(move || {
        let served = pinned_vips(&pins)?;
        detach(&pins).map(|()| (served, interfaces_with_programs()))
    });
    let (served, running) = served.await??;
    let served = served.map(|all| all.iter().map(to_ip).collect::<BTreeSet<_>>());
    if served.is_none() && !running.is_empty() {
        tracing::warn!(
            "nothing was pinned in {}, and an XDP program runs on {}: VIPs that lbd added to the loopback interface stay, \
             except those given with --vip. Is --pin-path right?",
            args.pin_path.display(),
            running.join(", ")
        );
    }
    // Without maps, the marked addresses are ours, unless another worker's program serves them.
    let without_maps = |is_marked: bool| is_marked && running.is_empty();
    let is_ours = |ip: &IpAddr, is_marked: bool| {
        served.as_ref().map_or(without_maps(is_marked), |all| all.contains(ip))
    };
    remove_addresses(handle, |ip, is_marked| is_ours(&ip, is_marked) || args.vip.contains(&ip)).await?;
    tracing::info!(pins = %args.pin_path.display(), "detached");
    Ok(())
}

/// Reads a number under `/proc/sys/net/`.
fn sysctl(path: &str) -> Option<u32> {
    fs::read_to_string(format!("/proc/sys/net/{path}")).ok()?.trim().parse().ok()
}

/// Returns a warning, with the command that fixes it, for each host setting that would drop packets.
async fn warnings(handle: &Handle, args: &WorkerArgs) -> Vec<String> {
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
                "{name} answers ARP for the VIPs, which diverts them from the load balancer if both share a link: \
                 `sysctl -w net.ipv4.conf.{name}.arp_ignore=1 net.ipv4.conf.{name}.arp_announce=2`"
            ));
        }
        if v6 && sysctl(&format!("ipv6/conf/{name}/disable_ipv6")) == Some(1) {
            found.push(format!(
                "IPv6 is disabled on {name}, so packets for IPv6 VIPs are dropped: \
                 `sysctl -w net.ipv6.conf.{name}.disable_ipv6=0`"
            ));
        }
        if let Some(mtu) = mtu(handle, name).await
            && mtu < USUAL_MTU + OVERHEAD
        {
            found.push(format!(
                "{name} has MTU {mtu}: encapsulated packets of {USUAL_MTU} bytes do not fit, so the load balancer tells \
                 clients to send smaller ones; to avoid this, raise the MTU on workers and load balancer: \
                 `ip link set dev {name} mtu 1600` or more"
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
