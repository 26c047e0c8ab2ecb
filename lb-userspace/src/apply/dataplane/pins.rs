//! Layout of the pin directory:
//!
//! ```text
//! link-MODE-INTERFACE   the links: shared by all ABI versions, so that the program under each changes in one step
//! STAGES                the array of users' programs (`DISPATCHER`), shared by all ABI versions
//! ABI                   version of the live objects, for tools
//! abi-N/                maps and programs of ABI version N
//! abi-N-K/              earlier ones of the same version, whose flows have not all been taken over
//! ```
//!
//! Up to version 2 all pins were in the pin directory itself; such a home is called flat here.

use super::{DataplaneError, sys};
use aya::maps::{Array, Map, MapData};
use lb_common::{ABI_VERSION, names};
use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

/// Directory of the pinned maps and programs of one ABI version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// Path of the directory.
    pub path: PathBuf,
    /// ABI version.
    pub abi: u32,
    /// Number of a home that was [set aside](Self::set_aside), from 1 on; 0 for others.
    pub aside: u32,
    /// Whether it is the pin directory itself.
    is_flat: bool,
}

const PREFIX: &str = "abi-";
/// Prefix of the names of pinned links.
pub const LINK: &str = "link-";

impl Home {
    /// Home of this version.
    pub fn ours(pin_path: &Path) -> Self {
        Self {
            path: pin_path.join(format!("{PREFIX}{ABI_VERSION}")),
            abi: ABI_VERSION,
            aside: 0,
            is_flat: false,
        }
    }

    /// Finds the homes of other versions, and those that were [set aside](Self::set_aside).
    pub fn others(pin_path: &Path) -> Result<Vec<Self>, DataplaneError> {
        let mut found = Vec::new();
        let ours = Self::ours(pin_path).path;
        for path in entries(pin_path)?.into_iter().filter(|path| *path != ours) {
            let name = file_name(&path);
            let Some(version) = name.strip_prefix(PREFIX) else { continue };
            let (abi, number) = version.split_once('-').unwrap_or((version, "0"));
            if let (Ok(abi), Ok(aside)) = (abi.parse(), number.parse()) {
                found.push(Self { path, abi, aside, is_flat: false });
            }
        }
        // Both objects have this map.
        if pin_path.join(names::REASONS).exists() {
            let mut flat = Self { path: pin_path.to_owned(), abi: 0, aside: 0, is_flat: true };
            flat.abi = flat.marker()?.unwrap_or(0);
            found.push(flat);
        }
        Ok(found)
    }

    /// Renames the directory, so that another home of the same version can be made beside it.
    pub fn set_aside(self) -> Result<Self, DataplaneError> {
        // A BPF filesystem takes no dots in names.
        let beside = |number: u32| self.path.with_file_name(format!("{}-{number}", file_name(&self.path)));
        let aside = (1..).find(|&number| !beside(number).exists()).expect("some number is free");
        let path = beside(aside);
        let failed = |source| DataplaneError::Pin { what: "cannot rename", path: self.path.clone(), source };
        fs::rename(&self.path, &path).map_err(failed)?;
        Ok(Self { path, aside, ..self })
    }

    /// Whether the directory exists.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Creates the directory.
    pub fn create(&self) -> Result<(), DataplaneError> {
        make(&self.path)
    }

    /// Reads the version recorded by a complete start: 0 if no start was complete, none if the map does not exist.
    pub fn marker(&self) -> Result<Option<u32>, DataplaneError> {
        let path = self.path.join(names::ABI);
        if !path.exists() {
            return Ok(None);
        }
        let map = |source| DataplaneError::Map { map: names::ABI, source };
        let abi = Map::Array(MapData::from_pin(&path).map_err(map)?);
        let abi: Array<MapData, u32> = Array::try_from(abi).map_err(map)?;
        abi.get(&0, 0).map(Some).map_err(map)
    }

    /// Opens the programs pinned here; returns them with their ids.
    fn opened(&self) -> Vec<(u32, OwnedFd)> {
        let all = entries(&self.path).unwrap_or_default();
        let programs = all.iter().filter(|p| file_name(p).starts_with("program-"));
        // A program that cannot be opened does not run under our links.
        let opened = programs.filter_map(|p| {
            let program = sys::open(p).ok()?;
            Some((sys::program_id(&program).ok()?, program))
        });
        opened.collect()
    }

    /// Ids of the programs pinned here.
    pub fn programs(&self) -> BTreeSet<u32> {
        self.opened().into_iter().map(|(id, _)| id).collect()
    }

    /// Returns the program pinned here that has one of these ids.
    pub fn program_of(&self, ids: &BTreeSet<u32>) -> Option<OwnedFd> {
        self.opened().into_iter().find(|(id, _)| ids.contains(id)).map(|(_, program)| program)
    }

    /// Removes the pins of this version, except those shared with other versions.
    pub fn remove(&self) -> Result<(), DataplaneError> {
        if !self.is_flat {
            for path in if self.exists() { entries(&self.path)? } else { Vec::new() } {
                remove(&path)?;
            }
            return remove_directory(&self.path);
        }
        let own = entries(&self.path)?.into_iter().filter(|p| !p.is_dir() && !is_shared(p));
        own.into_iter().try_for_each(|p| remove(&p))
    }
}

/// Name of a pin.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether a pin is that of a link.
pub fn is_link(path: &Path) -> bool {
    file_name(path).starts_with(LINK)
}

/// Whether an entry of the pin directory belongs to all ABI versions.
pub fn is_shared(path: &Path) -> bool {
    let name = file_name(path);
    is_link(path) || name == names::ABI || names::SHARED.iter().any(|(_, pinned)| *pinned == name)
}

/// Creates the pin directory; true if it did not exist.
pub fn make_directory(path: &Path) -> Result<bool, DataplaneError> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let magic = nix::sys::statfs::statfs(existing).map(|s| s.filesystem_type().0);
    if magic != Ok(BPF_FS_MAGIC) {
        return Err(DataplaneError::NoBpffs { path: path.to_owned() });
    }
    make(path).map(|()| existing != path)
}

fn make(path: &Path) -> Result<(), DataplaneError> {
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            Err(DataplaneError::Denied { what: "create the pin directory" })
        }
        Err(source) => Err(DataplaneError::Pin { what: "cannot create", path: path.to_owned(), source }),
    }
}

/// Locks a pin directory. A BPF filesystem holds no ordinary files, but its directories can be locked. The pid for the
/// error message comes from the kernel's list of locks.
pub fn lock(path: &Path) -> Result<fs::File, DataplaneError> {
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

/// Lists a directory.
pub fn entries(directory: &Path) -> Result<Vec<PathBuf>, DataplaneError> {
    let error = |source| DataplaneError::Pin { what: "cannot list", path: directory.to_owned(), source };
    fs::read_dir(directory).map_err(error)?.map(|e| e.map(|e| e.path()).map_err(error)).collect()
}

/// Removes a pin.
pub fn remove(path: &Path) -> Result<(), DataplaneError> {
    fs::remove_file(path).map_err(|source| DataplaneError::Pin {
        what: "cannot remove",
        path: path.to_owned(),
        source,
    })
}

fn remove_directory(path: &Path) -> Result<(), DataplaneError> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(DataplaneError::Pin { what: "cannot remove", path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

/// Replaces a pin by another object, in one step.
pub fn replace(object: &impl std::os::fd::AsFd, path: &Path) -> Result<(), DataplaneError> {
    let pin = |source| DataplaneError::Pin { what: "cannot pin", path: path.to_owned(), source };
    let next = next(path);
    if next.exists() {
        remove(&next)?;
    }
    sys::pin(object, &next).map_err(pin)?;
    fs::rename(&next, path).map_err(pin)
}

/// Path of the successor of a pin until it replaces the pin.
pub fn next(path: &Path) -> PathBuf {
    path.with_file_name(format!("{}-next", file_name(path)))
}

/// Whether a pin is a successor that waits to replace a pin, as in [`next`].
pub fn is_next(path: &Path) -> bool {
    file_name(path).ends_with("-next")
}

/// Removes all pins; links first, so that forwarding stops at once and not with half of the maps removed.
pub fn remove_all(pin_path: &Path) -> Result<(), DataplaneError> {
    let mut all = entries(pin_path)?;
    all.sort_by_key(|p| !is_link(p));
    for path in all {
        if path.is_dir() {
            entries(&path)?.iter().try_for_each(|p| remove(p))?;
            remove_directory(&path)?;
        } else {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes all pins of a directory, which detaches the programs, and the directory; for `lbd detach`.
pub fn detach(pin_path: &Path) -> Result<(), DataplaneError> {
    if !pin_path.exists() {
        return Ok(());
    }
    let _lock = lock(pin_path)?;
    remove_all(pin_path)?;
    remove_directory(pin_path)
}
