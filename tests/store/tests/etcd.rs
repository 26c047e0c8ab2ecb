//! The store in etcd.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use anyhow::Result;
use lb_userspace::desired::store::{
    Address, EtcdStore, LocalFile, Store,
    etcd::{Access, EtcdOptions},
};
use tempfile::TempDir;
use test_store::{Fixture, conformance};
use test_support::etcd::Cluster;

/// One member, and hosts with a directory each.
struct Etcd {
    cluster: Cluster,
    directory: TempDir,
    opened: AtomicU32,
}

impl Etcd {
    async fn host(&self, prefix: &str, keep: u64) -> Result<Arc<dyn Store>> {
        let Address::Etcd { members, prefix, tls } = self.cluster.url(prefix).parse()? else {
            anyhow::bail!("not the address of an etcd")
        };
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        let local = Arc::new(LocalFile::open(&self.directory.path().join(format!("host-{number}")))?);
        let access = Access { members, tls, ..Access::default() };
        Ok(Arc::new(EtcdStore::open(EtcdOptions { access, prefix, keep, id: None }, local).await?))
    }
}

impl Fixture for Etcd {
    async fn open(&self, keep: u64) -> Result<Arc<dyn Store>> {
        self.host("lb", keep).await
    }

    async fn open_other(&self) -> Result<Arc<dyn Store>> {
        self.host("other/prefix", 100).await
    }

    fn is_shared(&self) -> bool {
        true
    }
}

async fn etcd() -> Result<Etcd> {
    let directory = tempfile::tempdir()?;
    let cluster = Cluster::single(directory.path())?;
    Ok(Etcd { cluster, directory, opened: AtomicU32::new(0) })
}

conformance!(etcd());
