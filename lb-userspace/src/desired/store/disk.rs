//! Access to the files of redb databases: a trait, so that tests can put a disk below a store that fails at any write.

use redb::{Database, DatabaseError};
use std::{fmt::Debug, path::Path};

/// Opens databases.
pub trait Disk: Debug + Send + Sync {
    /// Opens an existing database.
    ///
    /// # Errors
    /// The file cannot be read or written, is in use, or is not a database.
    fn open(&self, file: &Path) -> Result<Database, DatabaseError>;

    /// Opens a database, or creates it.
    ///
    /// # Errors
    /// As [`Disk::open`].
    fn create(&self, file: &Path) -> Result<Database, DatabaseError>;
}

/// The host's file system.
#[derive(Debug)]
pub struct Files;

impl Disk for Files {
    fn open(&self, file: &Path) -> Result<Database, DatabaseError> {
        Database::open(file)
    }

    fn create(&self, file: &Path) -> Result<Database, DatabaseError> {
        Database::create(file)
    }
}
