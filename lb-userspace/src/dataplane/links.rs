//! Links: which program runs on which interface. Pinned, so that they outlive the daemon.

use super::{DataplaneError, pins, sys};
use aya::programs::{ProgramError, Xdp, XdpMode, links::FdLink, xdp::XdpLinkId};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// An interface that the program runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Index.
    pub ifindex: u32,
    /// `driver` or `generic`.
    pub mode: &'static str,
}

/// A pinned link that is attached.
pub struct Link {
    /// What it is attached to, and how.
    pub interface: Interface,
    fd: OwnedFd,
}

impl Link {
    /// Puts a program under it, in one step.
    pub fn update(&self, program: &impl std::os::fd::AsFd) -> Result<(), DataplaneError> {
        sys::update_link(&self.fd, program).map_err(|error| attach_error(&self.interface.name, error))
    }
}

/// Modes, and their names in reports and in the names of pinned links.
const MODES: [(XdpMode, &str); 2] = [(XdpMode::Driver, "driver"), (XdpMode::Skb, "generic")];

/// Where an interface's link is pinned. A BPF filesystem has no dots in names.
fn link_path(pin_path: &Path, interface: &str, mode: &str) -> PathBuf {
    pin_path.join(format!("link-{mode}-{}", interface.replace('.', "-")))
}

/// Index of an interface.
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

/// The pinned link of an interface, if it is still attached to it. One that is left over from an interface that has
/// gone is removed.
pub fn find(pin_path: &Path, name: &str, ifindex: u32) -> Result<Option<Link>, DataplaneError> {
    for (_, mode) in MODES {
        let path = link_path(pin_path, name, mode);
        if !path.exists() {
            continue;
        }
        let pin = |source| DataplaneError::Pin { what: "cannot open link", path: path.clone(), source };
        let fd = sys::open(&path).map_err(pin)?;
        let info = sys::link_info(&fd).map_err(pin)?;
        if info.ifindex == ifindex {
            let interface = Interface { name: name.to_owned(), ifindex, mode };
            return Ok(Some(Link { interface, fd }));
        }
        pins::remove(&path)?;
    }
    Ok(None)
}

/// Attaches a program to an interface that has none of ours, and pins the link.
pub fn attach(
    pin_path: &Path,
    program: &mut Xdp,
    name: &str,
    ifindex: u32,
    allow_generic: bool,
) -> Result<Interface, DataplaneError> {
    for (flag, mode) in MODES {
        match program.attach_to_if_index(ifindex, flag) {
            Ok(id) => {
                pin(program, id, &link_path(pin_path, name, mode), name)?;
                return Ok(Interface { name: name.to_owned(), ifindex, mode });
            }
            Err(e) if flag == XdpMode::Driver && allow_generic && is_unsupported(&e) => {}
            Err(e) => return Err(program_error(name, e)),
        }
    }
    unreachable!("the last mode either attaches or is an error")
}

/// Whether the driver cannot do it, as against the request being wrong.
fn is_unsupported(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EOPNOTSUPP | libc::EINVAL))
}

fn pin(program: &mut Xdp, id: XdpLinkId, path: &Path, interface: &str) -> Result<(), DataplaneError> {
    let link = program.take_link(id).map_err(|e| program_error(interface, e))?;
    let link = FdLink::try_from(link).map_err(|_| DataplaneError::Attach {
        interface: interface.to_owned(),
        source: io::Error::other("this kernel has no XDP links (Linux 5.9 has)"),
    })?;
    link.pin(path).map(drop).map_err(|e| DataplaneError::Pin {
        what: "cannot pin link",
        path: path.to_owned(),
        source: io::Error::other(e),
    })
}

fn errno(error: &ProgramError) -> Option<i32> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = cause {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        cause = e.source();
    }
    match error {
        ProgramError::SyscallError(e) => e.io_error.raw_os_error(),
        _ => None,
    }
}

fn program_error(interface: &str, error: ProgramError) -> DataplaneError {
    let source = errno(&error).map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error);
    attach_error(interface, source)
}

fn attach_error(interface: &str, source: io::Error) -> DataplaneError {
    let interface = interface.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM) => DataplaneError::Denied { what: "attach the program" },
        Some(libc::EBUSY | libc::EEXIST) => DataplaneError::Busy { interface },
        Some(libc::EOPNOTSUPP) => DataplaneError::NoDriverMode { interface, source },
        _ => DataplaneError::Attach { interface, source },
    }
}

/// Detaches from interfaces that are no longer wanted.
pub fn drop_others(pin_path: &Path, interfaces: &[String]) -> Result<(), DataplaneError> {
    let wanted: BTreeSet<PathBuf> =
        interfaces.iter().flat_map(|i| MODES.map(|(_, mode)| link_path(pin_path, i, mode))).collect();
    for path in pins::entries(pin_path)? {
        let is_link = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("link-"));
        if is_link && !wanted.contains(&path) {
            pins::remove(&path)?;
        }
    }
    Ok(())
}

/// Numbers of the programs under all pinned links.
pub fn programs(pin_path: &Path) -> Result<BTreeSet<u32>, DataplaneError> {
    let all = pins::entries(pin_path)?;
    let links =
        all.iter().filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("link-")));
    let running = links.filter_map(|path| sys::link_info(&sys::open(path).ok()?).ok());
    Ok(running.filter(|info| info.ifindex != 0).map(|info| info.program).collect())
}
