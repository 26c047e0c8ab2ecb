//! Keeps pinned objects: holds links, programs and maps open, and pins them again if somebody removes the pins.
//!
//! A program is attached, and a map exists, as long as a pin or a descriptor refers to it. So while lbd runs, removed pins
//! interrupt nothing; they must be back before lbd ends, or forwarding would end with it. `lbd detach` removes pins only
//! while no lbd runs.

use super::{DataplaneError, pins, pins::Home, sys};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

/// Objects under a pin directory.
pub struct KeptPins {
    pin_path: PathBuf,
    held: BTreeMap<PathBuf, Held>,
    /// Lock of the pin directory, if it had to be created again; the lock of the first one is held by the dataplane.
    lock: Option<fs::File>,
}

/// An object, and the inode of its pin.
struct Held {
    inode: u64,
    object: OwnedFd,
}

impl KeptPins {
    /// Keeps nothing until [`Self::refresh`].
    pub fn new(pin_path: &Path) -> Self {
        Self { pin_path: pin_path.to_owned(), held: BTreeMap::new(), lock: None }
    }

    /// Takes hold of what is pinned now: objects of this ABI version, those shared with other versions, and links to
    /// these interfaces. Of other links the pin alone must decide whether they are attached. Holds nothing while another
    /// version's objects exist: they are taken over, and removed then.
    pub fn refresh(&mut self, interfaces: &BTreeSet<u32>) -> Result<(), DataplaneError> {
        if !self.pin_path.exists() {
            return Ok(());
        }
        if !Home::others(&self.pin_path)?.is_empty() {
            self.held.clear();
            return Ok(());
        }
        let home = Home::ours(&self.pin_path);
        let mut now = BTreeMap::new();
        let mut paths = pins::entries(&self.pin_path)?;
        paths.retain(|path| pins::is_shared(path));
        paths.extend(if home.exists() { pins::entries(&home.path)? } else { Vec::new() });
        for path in paths.into_iter().filter(|path| !pins::is_next(path)) {
            // What is renamed or removed meanwhile is found, or missed, the next time.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            let inode = metadata.ino();
            let known = self.held.remove(&path).filter(|held| held.inode == inode);
            let Some(held) = known.or_else(|| Some(Held { inode, object: sys::open(&path).ok()? })) else {
                continue;
            };
            if !pins::is_link(&path) || interface_of(&held.object).is_some_and(|i| interfaces.contains(&i)) {
                now.insert(path, held);
            }
        }
        self.held = now;
        Ok(())
    }

    /// Pins missing objects again; returns how many there were.
    pub fn restore(&mut self) -> Result<usize, DataplaneError> {
        let missing: Vec<&PathBuf> = self.held.keys().filter(|path| !path.exists()).collect();
        if missing.is_empty() {
            return Ok(0);
        }
        if pins::make_directory(&self.pin_path)? {
            self.lock = Some(pins::lock(&self.pin_path)?);
        }
        Home::ours(&self.pin_path).create()?;
        // A link whose pin was renamed with its interface.
        let present: BTreeSet<u32> = pins::entries(&self.pin_path)?
            .iter()
            .filter(|path| pins::is_link(path))
            .filter_map(|path| interface_of(&sys::open(path).ok()?))
            .collect();
        let mut restored = 0;
        for path in missing {
            let Some(held) = self.held.get(path) else { continue };
            if pins::is_link(path) && interface_of(&held.object).is_none_or(|i| present.contains(&i)) {
                continue;
            }
            sys::pin(&held.object, path).map_err(|source| DataplaneError::Pin {
                what: "cannot restore",
                path: path.clone(),
                source,
            })?;
            restored += 1;
        }
        Ok(restored)
    }
}

/// Index of the interface that a link is attached to.
fn interface_of(link: &OwnedFd) -> Option<u32> {
    sys::link_info(link).ok().map(|info| info.ifindex).filter(|&ifindex| ifindex != 0)
}
