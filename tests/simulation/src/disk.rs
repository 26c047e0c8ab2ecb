//! A disk that can be full: files of the host's file system, whose writes fail on demand.

use lb_userspace::desired::store::Disk;
use redb::{Builder, Database, DatabaseError, StorageBackend, backends::FileBackend};
use std::{
    fs::OpenOptions,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Writes that are left before the disk is full; [`FREE`] if it is not filling up.
#[derive(Clone, Debug)]
pub struct DiskState(Arc<AtomicU64>);

/// A disk that is not filling up.
const FREE: u64 = u64::MAX;

impl Default for DiskState {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(FREE)))
    }
}

impl DiskState {
    /// Lets this many more writes succeed.
    pub fn fill_after(&self, writes: u64) {
        self.0.store(writes, Ordering::Relaxed);
    }

    /// Makes room again.
    pub fn free(&self) {
        self.0.store(FREE, Ordering::Relaxed);
    }

    pub fn is_filling(&self) -> bool {
        self.0.load(Ordering::Relaxed) != FREE
    }

    fn write(&self) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            FREE => Ok(()),
            0 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            left => {
                self.0.store(left - 1, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// The disk of one host.
#[derive(Debug)]
pub struct SimulatedDisk(pub DiskState);

impl SimulatedDisk {
    fn open_file(&self, file: &Path, is_new: bool) -> Result<Database, DatabaseError> {
        let file = OpenOptions::new().read(true).write(true).create(is_new).truncate(false).open(file)?;
        let backend = Backend { file: FileBackend::new(file)?, state: self.0.clone() };
        // A small cache: a host's store is small.
        Builder::new().set_cache_size(1 << 20).create_with_backend(backend)
    }
}

impl Disk for SimulatedDisk {
    fn open(&self, file: &Path) -> Result<Database, DatabaseError> {
        self.open_file(file, false)
    }

    fn create(&self, file: &Path) -> Result<Database, DatabaseError> {
        self.open_file(file, true)
    }
}

#[derive(Debug)]
struct Backend {
    file: FileBackend,
    state: DiskState,
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.state.write()?;
        self.file.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        // The files lie in memory, and outlive the simulated process.
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.state.write()?;
        self.file.write(offset, data)
    }
    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
    fn try_lock_range(
        &self,
        start: std::ops::Bound<u64>,
        end: std::ops::Bound<u64>,
    ) -> Result<bool, redb::BackendError> {
        self.file.try_lock_range(start, end)
    }
}
