//! What is refused without `force`.

use super::{
    ApiError, Control,
    access::Author,
    memory::{MemoryEngine, OWN_ADDRESS},
    types::{Change, WriteQuery},
};
use crate::{
    desired::{
        model::{Desired, Service},
        store::RedbStore,
    },
    observed::health::HealthRegistry,
};
use serde_json::json;
use std::sync::Arc;

async fn set(
    control: &Arc<Control>,
    name: &str,
    vip: &str,
    mode: &str,
    force: bool,
) -> Result<Change, ApiError> {
    let service = json!({"vip": vip, "port": 80, "protocol": "tcp", "mode": mode});
    let service: Service = serde_json::from_value(service).expect("the fields are right");
    let query = WriteQuery { force, ..WriteQuery::default() };
    let author = Author::daemon();
    let change = |desired: &mut Desired| {
        desired.services.insert(name.parse().expect("a name"), service.clone().into());
        Ok(())
    };
    control.write(&author, &query, change).await
}

#[tokio::test]
async fn a_new_vip_that_is_an_address_of_this_host_needs_force() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Arc::new(RedbStore::open(directory.path(), 100).expect("a store"));
    let control =
        Control::new(store, Arc::new(MemoryEngine::new(1_000)), Arc::new(HealthRegistry::default()));
    tokio::spawn(control.clone().run_apply_loop());
    let own = OWN_ADDRESS.to_string();
    let error = set(&control, "own", &own, "ipip", false).await.expect_err("it would cut the host off");
    assert_eq!(error.code, "needs_force");
    assert!(error.message.contains("address of this host (on eth0)"), "{error}");
    assert_eq!(control.head().revision.number, 0, "nothing changed");
    set(&control, "other", "10.0.0.1", "ipip", false).await.expect("no host has it");
    set(&control, "own", &own, "ipip", true).await.expect("it is meant");
    set(&control, "own", &own, "gue", false).await.expect("the VIP is not new");
}

#[tokio::test]
async fn mode_local_is_for_addresses_of_this_host() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Arc::new(RedbStore::open(directory.path(), 100).expect("a store"));
    let control =
        Control::new(store, Arc::new(MemoryEngine::new(1_000)), Arc::new(HealthRegistry::default()));
    tokio::spawn(control.clone().run_apply_loop());
    set(&control, "here", &OWN_ADDRESS.to_string(), "local", false).await.expect("that is what local means");
}
