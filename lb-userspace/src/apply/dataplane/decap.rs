//! The dataplane of a worker: the `decap` program and its maps.

use super::{
    DataplaneError, Interfaces, RefusedProgram,
    attach::{self, Attached, Request, take},
    load::Switches,
    pins::Home,
    reader,
    takeover::Takeover,
};
use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, PerCpuArray},
};
use lb_common::{
    Address, Reason, names,
    reply::{ReplyHop, family},
    settings::{DecapSettings, features},
};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use zerocopy::IntoBytes;

/// Options for attaching a worker's dataplane.
#[derive(Clone, Debug)]
pub struct DecapOptions {
    /// Names of the interfaces.
    pub interfaces: Vec<String>,
    /// Whether generic mode may be used where the driver does not support XDP.
    pub allow_generic: bool,
    /// Directory of the pins, on a BPF filesystem.
    pub pin_path: PathBuf,
    /// Settings of the program.
    pub settings: DecapSettings,
    /// Log level of the program: 0 off, 1 error … 5 trace.
    pub log_level: u8,
    /// Whether SYNs may be answered with SYN cookies.
    pub cookies: bool,
}

/// The writer of a worker's maps.
pub struct DecapDataplane {
    addresses: HashMap<MapData, Address, u32>,
    vips: HashMap<MapData, Address, u32>,
    reasons: PerCpuArray<MapData, u64>,
    reply_hops: Array<MapData, ReplyHop>,
    /// Interfaces that the program runs on, and those that wait for it.
    pub interfaces: Arc<Interfaces>,
    /// Programs that the kernel refused.
    pub left_out: Vec<RefusedProgram>,
    /// Whether maps of an earlier daemon were taken over.
    pub adopted: bool,
    pin_path: PathBuf,
    takeover: Option<Takeover>,
    bpf: Ebpf,
    _lock: fs::File,
}

impl DecapDataplane {
    /// Loads and attaches, or takes over what an earlier daemon left running.
    pub fn attach(options: &DecapOptions) -> Result<Self, DataplaneError> {
        let settings = |switches: Switches| {
            DecapSettings { kernel: switches.kernel, ..options.settings }.as_bytes().to_vec()
        };
        let attached = attach::attach(&Request {
            object: crate::apply::objects::DECAP,
            program: names::PROGRAM_DECAP,
            stages: if options.cookies { &names::stage::DECAP_PROGRAMS } else { &[] },
            chained: None,
            maps: &names::DECAP_MAPS,
            shared: &[],
            has_flows: false,
            sizes: &[],
            features: features::ALL,
            settings: &settings,
            log_level: options.log_level,
            pin_path: &options.pin_path,
            interfaces: &options.interfaces,
            allow_generic: options.allow_generic,
        })?;
        let Attached { mut bpf, interfaces, waiting, frags, left_out, adopted, takeover, lock, home: _ } =
            attached;
        let interfaces = Interfaces::with(
            names::PROGRAM_DECAP,
            (options.pin_path.clone(), options.interfaces.clone(), options.allow_generic),
            frags,
            interfaces,
            waiting,
        );
        Ok(Self {
            addresses: take(&mut bpf, names::DECAP_ADDRESSES)?,
            vips: take(&mut bpf, names::DECAP_VIPS)?,
            reasons: take(&mut bpf, names::REASONS)?,
            reply_hops: take(&mut bpf, names::REPLY_HOPS)?,
            interfaces: Arc::new(interfaces),
            left_out,
            adopted,
            pin_path: options.pin_path.clone(),
            takeover,
            bpf,
            _lock: lock,
        })
    }

    /// Replaces another ABI version's program by ours, and returns that version, if there was one. Call it when the
    /// maps are filled.
    pub fn take_over(&mut self) -> Result<Option<u32>, DataplaneError> {
        let Some(takeover) = self.takeover.take() else { return Ok(None) };
        let abi = takeover.abi();
        takeover.finish()?;
        Ok(Some(abi))
    }

    /// Sets the addresses at which encapsulated packets are accepted.
    pub fn set_addresses(&mut self, addresses: &BTreeSet<Address>) -> Result<(), DataplaneError> {
        set(&mut self.addresses, names::DECAP_ADDRESSES, addresses)
    }

    /// VIPs served here, by our maps and by those of another ABI version that still forwards. They outlive the
    /// daemon, so that the next one knows which of the host's addresses lbd added.
    pub fn served(&self) -> Result<BTreeSet<Address>, DataplaneError> {
        let map = |source| DataplaneError::Map { map: names::DECAP_VIPS, source };
        let mut served: BTreeSet<Address> = self.vips.keys().collect::<Result<_, _>>().map_err(map)?;
        served.extend(pinned_vips(&self.pin_path)?.unwrap_or_default());
        Ok(served)
    }

    /// Sets the VIPs that are served here.
    pub fn set_vips(&mut self, vips: &BTreeSet<Address>) -> Result<(), DataplaneError> {
        set(&mut self.vips, names::DECAP_VIPS, vips)
    }

    /// Sets the next hop of answers to clients of one family; with none, the stack answers.
    pub fn set_reply_hop(&mut self, is_ipv6: bool, hop: Option<ReplyHop>) -> Result<(), DataplaneError> {
        let place = if is_ipv6 { family::V6 } else { family::V4 };
        let map = |source| DataplaneError::Map { map: names::REPLY_HOPS, source };
        let known = self.reply_hops.get(&place, 0).map_err(map)?;
        let hop = hop.unwrap_or_default();
        if known == hop {
            return Ok(());
        }
        // Clear the entry first, so that no packet sees a mixture of two hops.
        self.reply_hops.set(place, ReplyHop { ifindex: 0, ..hop }, 0).map_err(map)?;
        super::grace_period();
        self.reply_hops.set(place, hop, 0).map_err(map)
    }

    /// Counters of each reason, summed over all CPUs.
    pub fn reasons(&self) -> Vec<(Reason, u64)> {
        reader::reasons(&self.reasons)
    }

    /// The loaded object, for aya-log.
    pub fn bpf_mut(&mut self) -> &mut Ebpf {
        &mut self.bpf
    }
}

/// VIPs in the maps of all ABI versions that are pinned in a directory; none if there are no such maps.
pub fn pinned_vips(pin_path: &Path) -> Result<Option<BTreeSet<Address>>, DataplaneError> {
    if !pin_path.exists() {
        return Ok(None);
    }
    let mut found = None;
    for home in Home::others(pin_path)?.into_iter().chain([Home::ours(pin_path)]) {
        let path = home.path.join(names::DECAP_VIPS);
        if !path.exists() {
            continue;
        }
        let map = |source| DataplaneError::Map { map: names::DECAP_VIPS, source };
        let data = MapData::from_pin(&path).map_err(map)?;
        let vips: HashMap<MapData, Address, u32> = HashMap::try_from(Map::HashMap(data)).map_err(map)?;
        let vips: BTreeSet<Address> = vips.keys().collect::<Result<_, _>>().map_err(map)?;
        found.get_or_insert_with(BTreeSet::new).extend(vips);
    }
    Ok(found)
}

/// Adds missing addresses, then removes unwanted ones, so that one that stays is never absent.
fn set(
    map: &mut HashMap<MapData, Address, u32>,
    name: &'static str,
    wanted: &BTreeSet<Address>,
) -> Result<(), DataplaneError> {
    let error = |source| DataplaneError::Map { map: name, source };
    for address in wanted {
        map.insert(address, 1, 0).map_err(error)?;
    }
    let present: Vec<Address> = map.keys().collect::<Result<_, _>>().map_err(error)?;
    for address in present.iter().filter(|a| !wanted.contains(*a)) {
        super::absent_is_fine(map.remove(address)).map_err(error)?;
    }
    Ok(())
}
