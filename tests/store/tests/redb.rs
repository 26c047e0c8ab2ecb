//! The store in a file of one host.

use std::sync::Arc;

use anyhow::Result;
use lb_userspace::desired::store::{RedbStore, Store};
use tempfile::TempDir;
use test_store::{Fixture, conformance};

struct Files(TempDir);

impl Fixture for Files {
    async fn open(&self, keep: u64) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(RedbStore::open(&self.0.path().join("one"), keep)?))
    }

    async fn open_other(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(RedbStore::open(&self.0.path().join("other"), 100)?))
    }

    fn is_shared(&self) -> bool {
        false
    }
}

async fn files() -> Result<Files> {
    Ok(Files(tempfile::tempdir()?))
}

conformance!(files());
