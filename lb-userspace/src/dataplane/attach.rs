//! Loads a program with its maps pinned, and attaches it to interfaces by pinned links.
//!
//! Pins outlive the daemon: forwarding goes on without it. A new daemon reuses the maps and replaces
//! the program under each link in one step (`BPF_LINK_UPDATE`), so that no packet meets no program.

use super::{DataplaneError, stages};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, MapError},
    programs::{
        ProgramError, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        xdp::{XdpLink, XdpLinkId},
    },
};
use lb_common::{ABI_VERSION, names};
use serde::Serialize;
use std::{
    collections::BTreeSet,
    fs, io,
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
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

/// What to load, and where to attach it.
pub struct Request<'a> {
    /// BPF object.
    pub object: &'static [u8],
    /// Program in it.
    pub program: &'static str,
    /// Programs that it jumps to, and their places in `STAGES`.
    pub stages: &'a [(&'static str, u32)],
    /// Maps to pin.
    pub maps: &'a [&'static str],
    /// Map sizes that differ from the object's.
    pub sizes: &'a [(&'static str, u32)],
    /// The settings global, as bytes.
    pub settings: &'a [u8],
    /// aya-log's level.
    pub log_level: u8,
    /// Directory of the pins, on a BPF filesystem.
    pub pin_path: &'a Path,
    /// Interfaces.
    pub interfaces: &'a [String],
    /// Whether generic mode will do where the driver has none.
    pub allow_generic: bool,
}

/// What came of it.
pub struct Attached {
    /// The loaded object.
    pub bpf: Ebpf,
    /// Where it runs.
    pub interfaces: Vec<Interface>,
    /// Whether maps of an earlier daemon were taken over.
    pub adopted: bool,
    /// Keeps other daemons out while it lives.
    pub lock: fs::File,
}

/// Makes the pin directory, checks what is in it, loads, attaches.
pub fn attach(request: &Request<'_>) -> Result<Attached, DataplaneError> {
    if request.object.is_empty() {
        return Err(DataplaneError::NoPrograms);
    }
    let indices = request.interfaces.iter().map(|name| index_of(name)).collect::<Result<Vec<_>, _>>()?;
    make_directory(request.pin_path)?;
    let lock = lock(request.pin_path)?;
    let adopted = check_abi(request)?;
    let bpf = match load(request) {
        Ok(bpf) => bpf,
        Err(error) => {
            if !adopted {
                remove_pins(request.pin_path)?;
            }
            return Err(error);
        }
    };
    let mut attached = Attached { bpf, interfaces: Vec::new(), adopted, lock };
    if let Err(error) = attach_all(request, &indices, &mut attached) {
        // A first start that failed leaves nothing behind; an adopted dataplane stays as it was.
        if !adopted {
            remove_pins(request.pin_path)?;
        }
        return Err(error);
    }
    Ok(attached)
}

fn attach_all(request: &Request<'_>, indices: &[u32], attached: &mut Attached) -> Result<(), DataplaneError> {
    for (name, ifindex) in request.interfaces.iter().zip(indices) {
        let interface = attach_one(request, &mut attached.bpf, name, *ifindex)?;
        attached.interfaces.push(interface);
    }
    drop_other_links(request.pin_path, request.interfaces)?;
    pin_program(request, &attached.bpf)?;
    set_abi(&mut attached.bpf)
}

/// Index of an interface.
fn index_of(name: &str) -> Result<u32, DataplaneError> {
    nix::net::if_::if_nametoindex(name).map_err(|_| {
        let mut present: Vec<String> = fs::read_dir("/sys/class/net")
            .map(|dir| dir.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned())).collect())
            .unwrap_or_default();
        present.sort();
        DataplaneError::NoInterface { interface: name.to_owned(), present: present.join(", ") }
    })
}

fn make_directory(path: &Path) -> Result<(), DataplaneError> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let magic = nix::sys::statfs::statfs(existing).map(|s| s.filesystem_type().0);
    if magic != Ok(BPF_FS_MAGIC) {
        return Err(DataplaneError::NoBpffs { path: path.to_owned() });
    }
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            Err(DataplaneError::Denied { what: "create the pin directory" })
        }
        Err(source) => Err(DataplaneError::Pin { what: "cannot create", path: path.to_owned(), source }),
    }
}

/// Takes the lock that belongs to a pin directory. A BPF filesystem holds no ordinary files, but
/// its directories can be locked. The pid for the message is found by the kernel's list of locks.
fn lock(path: &Path) -> Result<fs::File, DataplaneError> {
    let pin = |source| DataplaneError::Pin { what: "cannot lock", path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(pin)?;
    // SAFETY: a valid descriptor.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(file);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EWOULDBLOCK) {
        return Err(pin(error));
    }
    use std::os::unix::fs::MetadataExt;
    let inode = file.metadata().map(|m| m.ino()).unwrap_or_default();
    let pid = fs::read_to_string("/proc/locks").ok().and_then(|locks| {
        let line = locks.lines().find(|l| l.contains("FLOCK") && l.contains(&format!(":{inode} ")))?;
        line.split_whitespace().nth(4).map(str::to_owned)
    });
    Err(DataplaneError::Locked { path: path.to_owned(), pid: pid.unwrap_or_else(|| "unknown".to_owned()) })
}

/// Whether there are pins to take over; an error if they are of another ABI. Pins of a start that
/// did not finish (no ABI written yet) are removed.
fn check_abi(request: &Request<'_>) -> Result<bool, DataplaneError> {
    let path = request.pin_path.join(names::ABI);
    if !path.exists() {
        remove_pins(request.pin_path)?;
        return Ok(false);
    }
    let map = |source| DataplaneError::Map { map: names::ABI, source };
    let abi: Array<MapData, u32> =
        Array::try_from(Map::Array(MapData::from_pin(&path).map_err(map)?)).map_err(map)?;
    match abi.get(&0, 0).map_err(map)? {
        0 => {
            remove_pins(request.pin_path)?;
            Ok(false)
        }
        ABI_VERSION => Ok(true),
        pinned => Err(DataplaneError::Abi { path: request.pin_path.to_owned(), pinned, ours: ABI_VERSION }),
    }
}

fn set_abi(bpf: &mut Ebpf) -> Result<(), DataplaneError> {
    let map = |source| DataplaneError::Map { map: names::ABI, source };
    let abi = bpf.map_mut(names::ABI).expect("both objects have it");
    let mut abi: Array<&mut MapData, u32> = Array::try_from(abi).map_err(map)?;
    abi.set(0, ABI_VERSION, 0).map_err(map)
}

fn load(request: &Request<'_>) -> Result<Ebpf, DataplaneError> {
    let refuse = |source| DataplaneError::Load { program: request.program, source };
    let mut loader = EbpfLoader::new();
    loader.override_global(names::SETTINGS, request.settings, true).override_global(
        names::LOG_LEVEL,
        &request.log_level,
        true,
    );
    for (map, size) in request.sizes {
        loader.map_max_entries(map, *size);
    }
    for map in request.maps {
        loader.map_pin_path(map, request.pin_path.join(map));
    }
    let mut bpf =
        loader.load(request.object).map_err(|e| denied("create the maps", &e).unwrap_or(refuse(e.into())))?;
    let program = program_mut(&mut bpf, request.program);
    program.load().map_err(|source| refused(request.program, source))?;
    stages::fill(&mut bpf, request.stages)?;
    Ok(bpf)
}

/// Why the kernel did not take a program.
pub fn refused(program: &'static str, source: ProgramError) -> DataplaneError {
    denied("load the program", &source).unwrap_or(DataplaneError::Load { program, source: source.into() })
}

/// The error for a lack of privileges, if that is what it was.
fn denied(what: &'static str, error: &(dyn std::error::Error + 'static)) -> Option<DataplaneError> {
    let mut cause = Some(error);
    while let Some(e) = cause {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return (io.raw_os_error() == Some(libc::EPERM)).then_some(DataplaneError::Denied { what });
        }
        cause = e.source();
    }
    None
}

/// A program that the object is known to have.
pub fn program_mut<'a>(bpf: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    let program = bpf.program_mut(name).expect("the object was built with this program");
    program.try_into().expect("it is an XDP program")
}

/// Modes, and their names in reports and in the names of pinned links.
const MODES: [(XdpMode, &str); 2] = [(XdpMode::Driver, "driver"), (XdpMode::Skb, "generic")];

/// Where an interface's link is pinned. A BPF filesystem has no dots in names.
fn link_path(pin_path: &Path, interface: &str, mode: &str) -> PathBuf {
    pin_path.join(format!("link-{mode}-{}", interface.replace('.', "-")))
}

fn attach_one(
    request: &Request<'_>,
    bpf: &mut Ebpf,
    name: &str,
    ifindex: u32,
) -> Result<Interface, DataplaneError> {
    let program = program_mut(bpf, request.program);
    let done = |mode| Ok(Interface { name: name.to_owned(), ifindex, mode });
    for (_, mode) in MODES {
        if let Some(link) = live_link(&link_path(request.pin_path, name, mode), ifindex)? {
            // The program changes under the link in one step; the old one runs until then.
            let id = program.attach_to_link(link).map_err(|e| attach_error(name, e))?;
            // The pin keeps the link; our handle on it may go.
            drop(program.take_link(id));
            return done(mode);
        }
    }
    for (flag, mode) in MODES {
        match program.attach_to_if_index(ifindex, flag) {
            Ok(id) => {
                pin_link(program, id, &link_path(request.pin_path, name, mode), name)?;
                return done(mode);
            }
            Err(e) if flag == XdpMode::Driver && request.allow_generic && is_unsupported(&e) => {}
            Err(e) => return Err(attach_error(name, e)),
        }
    }
    unreachable!("the last mode either attaches or is an error")
}

/// Whether the driver cannot do it, as against the request being wrong.
fn is_unsupported(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EOPNOTSUPP | libc::EINVAL))
}

/// The pinned link of an interface, if it is still attached to it.
fn live_link(path: &Path, ifindex: u32) -> Result<Option<XdpLink>, DataplaneError> {
    if !path.exists() {
        return Ok(None);
    }
    let pinned = PinnedLink::from_pin(path).map_err(|e| DataplaneError::Pin {
        what: "cannot open link",
        path: path.to_owned(),
        source: io::Error::other(e),
    })?;
    if attached_to(path) == Some(ifindex) {
        // The interface that it was made for; FdLink → XdpLink cannot fail for an XDP link.
        return Ok(XdpLink::try_from(FdLink::from(pinned)).ok());
    }
    // Left over from an interface that has gone.
    pinned.unpin().map_err(|source| DataplaneError::Pin {
        what: "cannot remove",
        path: path.to_owned(),
        source,
    })?;
    Ok(None)
}

/// The part of `struct bpf_link_info` that an XDP link fills in.
#[repr(C)]
#[derive(Default)]
struct XdpLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    ifindex: u32,
    rest: [u32; 15],
}

/// Interface that a pinned link is attached to; None if it has gone.
fn attached_to(path: &Path) -> Option<u32> {
    const BPF_OBJ_GET: libc::c_long = 7;
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    #[repr(C)]
    struct Get {
        path: u64,
        fd: u32,
        flags: u32,
    }
    #[repr(C)]
    struct Info {
        fd: u32,
        len: u32,
        info: u64,
    }
    let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
    let get = Get { path: c_path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: a valid attribute of its size, with a path that lives until the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, size_of::<Get>()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just given us this descriptor.
    let fd = unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let mut info = XdpLinkInfo::default();
    let ask =
        Info { fd: fd.as_raw_fd() as u32, len: size_of::<XdpLinkInfo>() as u32, info: &raw mut info as u64 };
    // SAFETY: a valid attribute, with a buffer of the length that it names.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const ask, size_of::<Info>()) };
    (answer == 0 && info.ifindex != 0).then_some(info.ifindex)
}

fn pin_link(program: &mut Xdp, id: XdpLinkId, path: &Path, interface: &str) -> Result<(), DataplaneError> {
    let link = program.take_link(id).map_err(|e| attach_error(interface, e))?;
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

fn attach_error(interface: &str, error: ProgramError) -> DataplaneError {
    let interface = interface.to_owned();
    let code = errno(&error);
    let source = code.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error);
    match code {
        Some(libc::EPERM) => DataplaneError::Denied { what: "attach the program" },
        Some(libc::EBUSY | libc::EEXIST) => DataplaneError::Busy { interface },
        Some(libc::EOPNOTSUPP) => DataplaneError::NoDriverMode { interface, source },
        _ => DataplaneError::Attach { interface, source },
    }
}

/// Detaches from interfaces that are no longer wanted.
fn drop_other_links(pin_path: &Path, interfaces: &[String]) -> Result<(), DataplaneError> {
    let wanted: BTreeSet<PathBuf> =
        interfaces.iter().flat_map(|i| MODES.map(|(_, mode)| link_path(pin_path, i, mode))).collect();
    for path in pins(pin_path)? {
        let is_link = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("link-"));
        if is_link && !wanted.contains(&path) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Pins the program, for tools; the links hold it anyway.
fn pin_program(request: &Request<'_>, bpf: &Ebpf) -> Result<(), DataplaneError> {
    let path = request.pin_path.join(format!("program-{}", request.program));
    if path.exists() {
        remove(&path)?;
    }
    let program = bpf.program(request.program).expect("loaded before");
    let program: &Xdp = program.try_into().expect("it is an XDP program");
    let fd = program.fd().expect("loaded before").try_clone().map_err(|e| DataplaneError::Pin {
        what: "cannot pin program",
        path: path.clone(),
        source: e,
    })?;
    pin_fd(fd.as_fd_raw(), &path)
}

/// Shorthand, so that the import list stays short.
trait AsFdRaw {
    fn as_fd_raw(&self) -> i32;
}

impl<T: std::os::fd::AsFd> AsFdRaw for T {
    fn as_fd_raw(&self) -> i32 {
        self.as_fd().as_raw_fd()
    }
}

fn pin_fd(fd: i32, path: &Path) -> Result<(), DataplaneError> {
    const BPF_OBJ_PIN: libc::c_long = 6;
    #[repr(C)]
    struct Pin {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let error = |source| DataplaneError::Pin { what: "cannot pin program", path: path.to_owned(), source };
    let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| error(e.into()))?;
    let attr = Pin { path: c_path.as_ptr() as u64, fd: fd as u32, flags: 0 };
    // SAFETY: a valid attribute of its size, with a path that lives until the call returns.
    match unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const attr, size_of::<Pin>()) } {
        0 => Ok(()),
        _ => Err(error(io::Error::last_os_error())),
    }
}

fn pins(pin_path: &Path) -> Result<Vec<PathBuf>, DataplaneError> {
    let error = |source| DataplaneError::Pin { what: "cannot list", path: pin_path.to_owned(), source };
    fs::read_dir(pin_path).map_err(error)?.map(|e| e.map(|e| e.path()).map_err(error)).collect()
}

fn remove(path: &Path) -> Result<(), DataplaneError> {
    fs::remove_file(path).map_err(|source| DataplaneError::Pin {
        what: "cannot remove",
        path: path.to_owned(),
        source,
    })
}

/// Removes all pins: links first, so that forwarding stops at once and not with maps half gone.
pub fn remove_pins(pin_path: &Path) -> Result<(), DataplaneError> {
    let mut all = pins(pin_path)?;
    all.sort_by_key(|p| !p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("link-")));
    all.iter().try_for_each(|p| remove(p))
}

/// Detaches what is pinned in a directory and removes it; for `lbd detach`.
pub fn detach(pin_path: &Path) -> Result<(), DataplaneError> {
    if !pin_path.exists() {
        return Ok(());
    }
    let _lock = lock(pin_path)?;
    remove_pins(pin_path)?;
    fs::remove_dir(pin_path).map_err(|source| DataplaneError::Pin {
        what: "cannot remove",
        path: pin_path.to_owned(),
        source,
    })
}

/// Takes a map that the object is known to have.
pub fn take<M: TryFrom<Map, Error = MapError>>(
    bpf: &mut Ebpf,
    name: &'static str,
) -> Result<M, DataplaneError> {
    let map = bpf.take_map(name).expect("names are those that the object was built with");
    M::try_from(map).map_err(|source| DataplaneError::Map { map: name, source })
}
