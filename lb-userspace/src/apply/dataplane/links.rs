//! Links: the program that runs on each interface. Pinned, so that they outlive the daemon.
//!
//! A link belongs to an interface index; the name of its pin is for people, and changes when the interface is renamed.

use super::{DataplaneError, advice::Refusal, expected::OurLink, extack, kernel::BPF_XDP, pins, sys};
use crate::apply::ethtool::{Ethtool, LinkState};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// An interface that the program runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttachedInterface {
    /// Name.
    pub name: String,
    /// Index.
    pub ifindex: u32,
    /// `driver` or `generic`.
    pub mode: &'static str,
    /// Why the driver does not run the program, if lbd knows.
    pub why_generic: Option<String>,
}

/// A pinned link that is attached.
pub struct XdpLink {
    /// Interface and mode of the link.
    pub interface: AttachedInterface,
    fd: OwnedFd,
}

impl XdpLink {
    /// Replaces the program under the link in one step.
    pub fn update(&self, program: &impl AsFd) -> Result<(), DataplaneError> {
        sys::update_link(&self.fd, program).map_err(|error| {
            let i = &self.interface;
            match error.raw_os_error() {
                Some(libc::EPERM) => DataplaneError::Denied { what: "replace the program" },
                _ => refusal(&i.name, i.mode == GENERIC, None, error.raw_os_error().unwrap_or(libc::EIO)),
            }
        })
    }
}

/// `XDP_FLAGS_SKB_MODE` and `XDP_FLAGS_DRV_MODE`.
const SKB_MODE: u32 = 1 << 1;
const DRV_MODE: u32 = 1 << 2;
/// Modes, as in reports and in the names of pinned links.
const DRIVER: &str = "driver";
/// Generic mode, which every interface supports.
pub const GENERIC: &str = "generic";
/// Longest time until an interface has its carrier again: some drivers reinitialise their rings for a program.
const CARRIER: Duration = Duration::from_secs(10);
/// Interval at which the carrier is checked.
const CARRIER_POLL: Duration = Duration::from_millis(50);

/// Path of an interface's pinned link. Names in a BPF filesystem have no dots.
fn link_path(pin_path: &Path, interface: &str, mode: &str) -> PathBuf {
    pin_path.join(format!("{}{mode}-{}", pins::LINK, interface.replace('.', "-")))
}

/// Returns the index of an interface.
pub fn index_of(name: &str) -> Result<u32, DataplaneError> {
    nix::net::if_::if_nametoindex(name).map_err(|_| {
        let all = nix::net::if_::if_nameindex();
        let mut present: Vec<String> = all
            .map(|all| all.iter().map(|i| i.name().to_string_lossy().into_owned()).collect())
            .unwrap_or_default();
        present.sort();
        DataplaneError::NoInterface { interface: name.to_owned(), present: present.join(", ") }
    })
}

/// A pinned link, attached or not.
struct Pinned {
    path: PathBuf,
    mode: &'static str,
    fd: OwnedFd,
    info: sys::LinkInfo,
}

/// Lists all pinned links.
fn pinned(pin_path: &Path) -> Result<Vec<Pinned>, DataplaneError> {
    let mut all = Vec::new();
    for path in pins::entries(pin_path)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(pins::LINK) else { continue };
        let mode = if rest.starts_with(GENERIC) { GENERIC } else { DRIVER };
        let pin = |source| DataplaneError::Pin { what: "cannot open link", path: path.clone(), source };
        let fd = sys::open(&path).map_err(pin)?;
        let info = sys::link_info(&fd).map_err(pin)?;
        all.push(Pinned { path, mode, fd, info });
    }
    Ok(all)
}

/// Finds the pinned link that is attached to an interface. If the interface was renamed since, the pin is renamed
/// too.
pub fn find(pin_path: &Path, name: &str, ifindex: u32) -> Result<Option<XdpLink>, DataplaneError> {
    let Some(found) = pinned(pin_path)?.into_iter().find(|pin| pin.info.ifindex == ifindex) else {
        return Ok(None);
    };
    let path = link_path(pin_path, name, found.mode);
    if found.path != path {
        free_path(&path)?;
        rename(&found.path, &path)?;
        tracing::info!(interface = name, was = %found.path.display(), "renamed the pinned link of a renamed interface");
    }
    let interface = AttachedInterface { name: name.to_owned(), ifindex, mode: found.mode, why_generic: None };
    Ok(Some(XdpLink { interface, fd: found.fd }))
}

/// Lists our links.
pub fn ours(pin_path: &Path) -> Result<Vec<OurLink>, DataplaneError> {
    if !pin_path.exists() {
        return Ok(Vec::new());
    }
    let all = pinned(pin_path)?.into_iter().filter(|pin| pin.info.ifindex != 0);
    Ok(all.map(|pin| OurLink { ifindex: pin.info.ifindex, program: pin.info.program }).collect())
}

/// Index of the interface of the link that is pinned under an interface's name, whatever the interface's name is now.
pub fn pinned_to(pin_path: &Path, name: &str) -> Option<u32> {
    let path = [DRIVER, GENERIC]
        .map(|mode| link_path(pin_path, name, mode))
        .into_iter()
        .find(|path| path.exists())?;
    let info = sys::link_info(&sys::open(&path).ok()?).ok()?;
    (info.ifindex != 0).then_some(info.ifindex)
}

/// Mode of our link to an interface.
pub fn mode_of(pin_path: &Path, ifindex: u32) -> Option<&'static str> {
    pinned(pin_path).ok()?.into_iter().find(|pin| pin.info.ifindex == ifindex).map(|pin| pin.mode)
}

/// Frees the path of a link's pin: a link to another interface, which had this name before, gets a temporary name until
/// that interface is looked up; a dead link is removed.
fn free_path(path: &Path) -> Result<(), DataplaneError> {
    if !path.exists() {
        return Ok(());
    }
    let pin = |source| DataplaneError::Pin { what: "cannot open link", path: path.to_owned(), source };
    let info = sys::link_info(&sys::open(path).map_err(pin)?).map_err(pin)?;
    if info.ifindex == 0 {
        return pins::remove(path);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    rename(path, &path.with_file_name(format!("{name}~{}", info.ifindex)))
}

fn rename(from: &Path, to: &Path) -> Result<(), DataplaneError> {
    fs::rename(from, to).map_err(|source| DataplaneError::Pin {
        what: "cannot rename",
        path: from.to_owned(),
        source,
    })
}

/// Attaches a program to an interface that has no link of ours, and pins the link. Waits until the interface has its
/// carrier again, if it had one.
pub fn attach(
    pin_path: &Path,
    program: &impl AsFd,
    name: &str,
    ifindex: u32,
    allow_generic: bool,
) -> Result<AttachedInterface, DataplaneError> {
    let had_carrier = has_carrier(name);
    let mut why_generic = None;
    let (link, mode) = match create(program, name, ifindex, DRV_MODE) {
        Ok(link) => (link, DRIVER),
        Err(error) if allow_generic && matches!(error, DataplaneError::NotTaken { .. }) => {
            tracing::warn!(interface = name, "falling back to generic mode: {error}");
            if let DataplaneError::NotTaken { driver, why, advice, .. } = error {
                why_generic = Some(format!("driver {driver}: {why}; {advice}"));
            }
            (create(program, name, ifindex, SKB_MODE)?, GENERIC)
        }
        Err(error) => return Err(error),
    };
    let path = link_path(pin_path, name, mode);
    free_path(&path)?;
    sys::pin(&link, &path).map_err(|source| DataplaneError::Pin { what: "cannot pin link", path, source })?;
    if had_carrier {
        wait_for_carrier(name);
    }
    Ok(AttachedInterface { name: name.to_owned(), ifindex, mode, why_generic })
}

fn create(program: &impl AsFd, name: &str, ifindex: u32, mode: u32) -> Result<OwnedFd, DataplaneError> {
    sys::create_link(program, ifindex, BPF_XDP, mode).map_err(|error| {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        match errno {
            libc::EPERM => DataplaneError::Denied { what: "attach the program" },
            libc::EBUSY | libc::EEXIST => DataplaneError::Busy { interface: name.to_owned() },
            _ => match index_of(name) {
                // The interface disappeared meanwhile.
                Err(gone) => gone,
                Ok(_) => refusal(name, mode == SKB_MODE, extack::reason(program, ifindex, mode), errno),
            },
        }
    })
}

/// Builds the error for a program that the driver refused.
fn refusal(name: &str, is_generic: bool, sentence: Option<String>, errno: i32) -> DataplaneError {
    let tool = Ethtool::open().ok();
    let driver = tool.as_ref().and_then(|t| t.driver(name).ok()).unwrap_or_else(|| "unknown".to_owned());
    let mtu = tool.and_then(|t| t.mtu(name).ok());
    let refusal = Refusal { interface: name, driver: &driver, mtu, sentence: sentence.as_deref(), errno };
    let (interface, why, advice) = (name.to_owned(), refusal.why(), refusal.advice());
    let may_pass = refusal.may_pass();
    if is_generic {
        DataplaneError::NotEvenGeneric { interface, driver, why, advice, may_pass }
    } else {
        DataplaneError::NotTaken { interface, driver, why, advice, may_pass }
    }
}

fn has_carrier(name: &str) -> bool {
    Ethtool::open().and_then(|tool| tool.state(name)).is_ok_and(|state| state == LinkState::Up)
}

/// Waits for the carrier. Interfaces are attached one by one, so a host with two uplinks keeps one while the other resets.
fn wait_for_carrier(name: &str) {
    let until = Instant::now() + CARRIER;
    while !has_carrier(name) {
        if Instant::now() > until {
            tracing::warn!(
                interface = name,
                "the interface has no carrier {CARRIER:?} after the program was attached; check the link and `dmesg`"
            );
            return;
        }
        std::thread::sleep(CARRIER_POLL);
    }
}

/// Detaches from an interface, by removing the pin of its link.
pub fn detach(pin_path: &Path, interface: &AttachedInterface) -> Result<(), DataplaneError> {
    pins::remove(&link_path(pin_path, &interface.name, interface.mode))
}

/// Detaches from interfaces that are no longer configured.
pub fn drop_others(pin_path: &Path, wanted: &BTreeSet<u32>) -> Result<(), DataplaneError> {
    let others = pinned(pin_path)?.into_iter().filter(|pin| !wanted.contains(&pin.info.ifindex));
    others.map(|pin| pin.path).try_for_each(|path| pins::remove(&path))
}

/// Ids of the programs under all pinned links.
pub fn programs(pin_path: &Path) -> Result<BTreeSet<u32>, DataplaneError> {
    let running = pinned(pin_path)?.into_iter().filter(|pin| pin.info.ifindex != 0);
    Ok(running.map(|pin| pin.info.program).collect())
}

/// Largest MTU of the interfaces; 0 if none can be read.
pub fn largest_mtu<'a>(names: impl Iterator<Item = &'a str>) -> u32 {
    let Ok(tool) = Ethtool::open() else { return 0 };
    names.filter_map(|name| tool.mtu(name).ok()).max().unwrap_or(0)
}
