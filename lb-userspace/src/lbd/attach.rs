//! Attaches the dataplane of `lbd ingress` according to its settings, and takes over from another ABI version.
//!
//! Input: [`Settings`] and the stored state. Output: the attached [`Dataplane`], and the settings to compile for it.
//! Called at the start of `lbd ingress`.

use super::{nat_ports, processors, xdp_log};
use crate::{
    apply::{
        dataplane::{
            AttachOptions, Dataplane, KernelFeatures, MapLimits, Migrated, ON_DEMAND, Takeover,
            loaded_features,
        },
        offloads,
        reconcile::{Event, start_sweeper},
    },
    desired::{
        config::{Settings, SettingsError},
        model::Locality,
        store::Stored,
    },
    plan::compile,
};
use anyhow::Context;
use lb_common::{
    rate_limit::{self, Budgets},
    settings::{IngressSettings, features},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tokio::sync::mpsc;

/// Checks the ports of mode nat: a conflict is an error if the user chose the ports, a warning if they are the default.
pub fn check_nat_ports(settings: &Settings) -> anyhow::Result<()> {
    // With a pool, translated flows do not share addresses with this host's own connections.
    let has_pool = settings.nat_source_v4.is_some() && settings.nat_source_v6.is_some();
    if has_pool || settings.ingress.features & features::NAT == 0 {
        return Ok(());
    }
    match nat_ports::problem(settings.ingress.nat_first, settings.ingress.nat_last) {
        Some(what) if settings.nat_ports_required => Err(SettingsError { setting: "nat_ports", what }.into()),
        Some(what) => {
            tracing::warn!("nat_ports: {what}");
            Ok(())
        }
        None => Ok(()),
    }
}

/// Attaches the program, with the features that the stored state needs, and logs the result.
pub async fn attach(settings: &Settings, head: &Stored) -> anyhow::Result<Dataplane> {
    let options = attach_options(settings, features_at_start(head, &settings.pin_path));
    let fix_offloads = settings.fix_offloads;
    let attach = move || {
        if fix_offloads {
            // Before the program is attached: drivers recreate their rings for either change.
            options.interfaces.iter().for_each(|name| offloads::fix(name));
        }
        Dataplane::attach(&options)
    };
    let mut dataplane = tokio::task::spawn_blocking(attach).await??;
    log_programs(&dataplane);
    xdp_log::start(dataplane.bpf_mut(), settings.xdp_log_level);
    Ok(dataplane)
}

/// Returns the features to load at the start: those that the stored state uses; all, if the store is empty but pinned
/// programs may use them.
fn features_at_start(head: &Stored, pin_path: &Path) -> u32 {
    if head.revision.number == 0 && pin_path.exists() { ON_DEMAND } else { head.desired.features() }
}

/// Builds the options of the attachment. `used`: on-demand features that are in use from the start.
fn attach_options(settings: &Settings, used: u32) -> AttachOptions {
    let log_level = xdp_log::level_number(settings.xdp_log_level);
    // A program that logs is not reloaded, so it needs all features.
    let used = if log_level == 0 { used } else { ON_DEMAND };
    let limits = MapLimits {
        services: settings.max_services,
        backends: settings.max_backends,
        slots: settings.max_slots,
        flows: settings.max_flows,
        nat_flows: settings.max_nat_flows,
        nat_embryonic: rate_limit::nat_embryonic(
            settings.max_nat_flows,
            u32::from(settings.ingress.nat_last.saturating_sub(settings.ingress.nat_first)) + 1,
            processors::online(),
        ),
        guard_entries: settings.max_guard_entries,
        ..MapLimits::default()
    };
    let budgets = Budgets::of(limits.flows, limits.syns, limits.flows, processors::online());
    AttachOptions {
        interfaces: settings.iface.clone(),
        allow_generic: settings.allow_generic,
        pin_path: settings.pin_path.clone(),
        limits,
        settings: IngressSettings {
            features: loaded_features(settings.ingress.features, settings.chain, used),
            syns_per_s: budgets.syns,
            flows_per_s: budgets.flows,
            udp_per_s: budgets.udp,
            ..settings.ingress
        },
        may_have: settings.ingress.features & ON_DEMAND,
        log_level,
    }
}

/// Builds the settings to compile with. `lost`: features whose programs the kernel refused.
pub fn compile_settings(
    settings: &Settings,
    limits: MapLimits,
    attached: BTreeMap<u32, String>,
    here: Locality,
    lost: u32,
) -> compile::DeploymentSettings {
    compile::DeploymentSettings {
        here,
        ipip_source_v4: settings.ipip_source_v4,
        ipip_source_v6: settings.ipip_source_v6,
        nat_source_v4: settings.nat_source_v4,
        nat_source_v6: settings.nat_source_v6,
        attached,
        limits: compile::TableLimits {
            services: limits.services,
            backends: limits.backends,
            slots: limits.slots,
            flows: limits.flows,
            syns: limits.syns,
            udp_flows: limits.flows,
            vips: limits.vips,
            guard_entries: limits.guard_entries,
        },
        features_off: features::ALL & !settings.ingress.features | lost,
    }
}

/// Logs which programs are attached where, and which are not available.
fn log_programs(dataplane: &Dataplane) {
    let kernel = KernelFeatures::get();
    tracing::info!(frags = dataplane.frags, ?kernel, "programs loaded");
    for one in &dataplane.left_out {
        tracing::warn!(
            program = one.program,
            feature = one.feature_name(),
            "program not available: {}",
            one.reason
        );
    }
    for i in dataplane.interfaces.attached() {
        if i.mode == "driver" {
            tracing::info!(interface = i.name, mode = i.mode, adopted = dataplane.adopted, "attached");
        } else {
            let why = i.why_generic.unwrap_or_default();
            tracing::warn!(
                interface = i.name,
                mode = i.mode,
                why,
                "attached in generic mode, which is much slower than driver mode"
            );
        }
    }
    for waiting in dataplane.interfaces.waiting() {
        tracing::warn!(interface = waiting.name, "not attached, retrying every second: {}", waiting.reason);
    }
}

/// Completes the start once the tables are written: takes over from another ABI version, then starts the sweeper.
pub async fn take_over_and_sweep(
    takeover: Option<Takeover>,
    home: PathBuf,
    events: mpsc::Sender<Event>,
) -> anyhow::Result<()> {
    if let Some(takeover) = takeover {
        take_over(takeover).await?;
    }
    // Only after all flows are migrated, because the sweeper reports slots without flows.
    start_sweeper(home, events).context("cannot start the sweeper")
}

/// Replaces the program of another ABI version by ours, now that the tables are written.
async fn take_over(takeover: Takeover) -> anyhow::Result<()> {
    let (from, to, began) = (takeover.abi(), lb_common::ABI_VERSION, std::time::Instant::now());
    let carried = tokio::task::spawn_blocking(move || takeover.finish())
        .await?
        .with_context(|| format!("cannot take over from ABI version {from} with {to}"))?;
    let Migrated { entries, reassigned, no_room, lost } = carried;
    tracing::info!(from, to, ?entries, reassigned, no_room, took = ?began.elapsed(), "taken over from another ABI version");
    for (map, abi, what) in lost {
        tracing::warn!(
            map,
            abi,
            what,
            "cannot migrate its flows: they are assigned like flows of a new host"
        );
    }
    Ok(())
}
