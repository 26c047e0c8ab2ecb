//! Opens stores by their address: the daemon's own, and those that data are migrated to.

use super::{
    Address, EtcdStore, Local, LocalFile, RedbStore, Store, StoreError,
    etcd::{self, Access},
};
use crate::blocking::blocking;
use futures_util::future::BoxFuture;
use std::sync::Arc;

/// Options for opening a store.
#[derive(Clone)]
pub struct Opener {
    /// File for data of this host alone.
    pub local: LocalFile,
    /// Number of revisions that are kept.
    pub keep: u64,
    /// Certificates and user for a shared store.
    pub access: Access,
    /// Id that a shared store must have.
    pub id: Option<String>,
}

/// Local storage that discards everything: a store that is only filled is not this host's own yet.
struct Nowhere;

impl Local for Nowhere {
    fn load(&self, _: &'static str) -> BoxFuture<'_, Result<Option<Vec<u8>>, StoreError>> {
        Box::pin(async { Ok(None) })
    }

    fn save(&self, _: &'static str, _: Vec<u8>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Opener {
    /// Opens the daemon's own store.
    ///
    /// # Errors
    /// Errors of the engines.
    pub async fn open(&self, address: &Address) -> Result<Arc<dyn Store>, StoreError> {
        let local = Arc::new(self.local.clone());
        self.open_with(address, local, self.id.clone()).await
    }

    /// Opens another store, to fill it.
    ///
    /// # Errors
    /// Errors of the engines.
    pub async fn open_other(&self, address: &Address) -> Result<Arc<dyn Store>, StoreError> {
        self.open_with(address, Arc::new(Nowhere), None).await
    }

    async fn open_with(
        &self,
        address: &Address,
        cache: Arc<dyn Local>,
        id: Option<String>,
    ) -> Result<Arc<dyn Store>, StoreError> {
        match address {
            Address::File(directory) => {
                if let Err(error) = etcd::forget_saved_state(&*cache).await {
                    tracing::warn!(%error, "cannot forget the state of the etcd store that this host followed before");
                }
                let (local, keep, path) = (self.local.clone(), self.keep, directory.clone());
                let open = move || RedbStore::beside(local, &path, keep);
                match blocking(open).await {
                    Ok(store) => Ok(Arc::new(store?)),
                    Err(e) => {
                        Err(StoreError::Failed { file: directory.display().to_string(), what: e.to_string() })
                    }
                }
            }
            Address::Etcd { members, prefix, tls } => {
                let access = Access { members: members.clone(), tls: *tls, ..self.access.clone() };
                let options = etcd::EtcdOptions { access, prefix: prefix.clone(), keep: self.keep, id };
                Ok(Arc::new(EtcdStore::open(options, cache).await?))
            }
        }
    }
}
