//! Options of an ingress host's dataplane: map sizes, features on demand, and the [`Request`] that loads it.

use super::{attach::Request, load::Switches};
use lb_common::{
    limits, names,
    settings::{IngressSettings, features},
    slot::LINE,
};
use std::path::PathBuf;
use zerocopy::IntoBytes;

/// Sizes of the maps, which stay fixed while the maps are pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapLimits {
    /// Services.
    pub services: u32,
    /// Backends over all services.
    pub backends: u32,
    /// Slots of all tables, live and being written.
    pub slots: u32,
    /// Entries of the tables of TCP and of UDP flows, each.
    pub flows: u32,
    /// Cached SYN choices.
    pub syns: u32,
    /// Bindings of mode `nat`.
    pub nat_flows: u32,
    /// Unconfirmed bindings per CPU.
    pub nat_embryonic: u32,
    /// Entries of the deny and allow lists together.
    pub guard_entries: u32,
    /// Sources whose rate of new flows is tracked.
    pub sources: u32,
    /// VIP addresses.
    pub vips: u32,
}

impl Default for MapLimits {
    fn default() -> Self {
        Self {
            services: limits::SERVICES,
            backends: limits::BACKENDS,
            slots: limits::SLOTS,
            flows: limits::FLOWS,
            syns: limits::SYNS,
            nat_flows: limits::NAT_FLOWS,
            nat_embryonic: limits::NAT_EMBRYONIC,
            guard_entries: limits::GUARD_ENTRIES,
            sources: limits::SOURCES,
            vips: limits::VIPS,
        }
    }
}

/// Features that cost something for every packet, and are therefore in the program only while they are used.
pub const ON_DEMAND: u32 = features::GUARD | features::RATE;

/// Features with which the program is loaded: the `configured` ones, without those that cost something when unused
/// ([`ON_DEMAND`]) unless they are `used`, and without the chain unless users' programs are `chained`.
pub const fn loaded_features(configured: u32, chained: bool, used: u32) -> u32 {
    let chain = if chained { features::ALL } else { !features::CHAIN };
    configured & chain & (used | !ON_DEMAND)
}

/// Options for attaching an ingress host's dataplane.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Names of the interfaces.
    pub interfaces: Vec<String>,
    /// Whether generic mode may be used where the driver does not support XDP.
    pub allow_generic: bool,
    /// Directory of the pins, on a BPF filesystem.
    pub pin_path: PathBuf,
    /// Map sizes.
    pub limits: MapLimits,
    /// Settings of the program; its features include those of [`ON_DEMAND`] that are used from the start.
    pub settings: IngressSettings,
    /// Features of [`ON_DEMAND`] that may be used later.
    pub may_have: u32,
    /// Log level of the program: 0 off, 1 error … 5 trace.
    pub log_level: u8,
}

/// Sizes of the maps whose size is configurable.
pub(super) fn sizes(l: &MapLimits) -> Vec<(&'static str, u32)> {
    vec![
        (names::SERVICE_INDEX, l.services),
        (names::SERVICES, l.services),
        (names::VIPS, l.vips),
        (names::PRIMARIES, l.slots.div_ceil(LINE)),
        (names::SECONDARIES, l.slots.div_ceil(LINE)),
        (names::BACKENDS, l.backends),
        (names::CHANGING_BACKENDS, l.backends),
        (names::BACKEND_STATS, l.backends),
        (names::QUIC_SERVERS, l.backends),
        (names::LOADS, l.backends),
        (names::OWN_ADDRESSES, l.backends + limits::NAT_SOURCES),
        (names::ROUND_ROBIN, l.services),
        (names::FLOWS, l.flows),
        (names::UDP_FLOWS, l.flows),
        (names::NAT_FLOWS, l.nat_flows),
        (names::NAT_REPLIES, l.nat_flows),
        (names::NAT_EMBRYONIC, l.nat_embryonic),
        (names::GUARD_ENTRIES, l.guard_entries),
        (names::SOURCES, l.sources),
        (names::LIMITS, l.services),
        (names::WRITE_BUDGETS, l.services),
    ]
}

/// Builds the settings global for what the kernel supports.
pub(super) fn settings(options: &AttachOptions) -> impl Fn(Switches) -> Vec<u8> + use<> {
    let settings = options.settings;
    move |switches| {
        let Switches { kernel, features } = switches;
        IngressSettings { kernel, features, ..settings }.as_bytes().to_vec()
    }
}

pub(super) fn request<'a>(
    options: &'a AttachOptions,
    sizes: &'a [(&'static str, u32)],
    settings: &'a dyn Fn(Switches) -> Vec<u8>,
) -> Request<'a> {
    let is_chained = options.settings.features & features::CHAIN != 0;
    Request {
        object: crate::apply::objects::INGRESS,
        program: if is_chained { names::PROGRAM_ROOT } else { names::PROGRAM_INGRESS },
        stages: &names::stage::INGRESS_PROGRAMS,
        chained: is_chained.then_some(names::PROGRAM_INGRESS),
        maps: &names::INGRESS_MAPS,
        shared: &names::SHARED,
        has_flows: true,
        sizes,
        features: options.settings.features,
        settings,
        log_level: options.log_level,
        pin_path: &options.pin_path,
        interfaces: &options.interfaces,
        allow_generic: options.allow_generic,
    }
}
