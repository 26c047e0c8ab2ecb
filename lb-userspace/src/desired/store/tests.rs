//! Commits, conflicts, history, and invalid files.

use super::*;
use crate::desired::model::Desired;
use serde_json::json;

fn state(ports: &[(&str, u16)]) -> Arc<Desired> {
    let services: serde_json::Map<_, _> = ports
        .iter()
        .map(|(name, port)| ((*name).to_owned(), json!({"vip": "10.0.0.1", "port": port, "protocol": "tcp"})))
        .collect();
    Arc::new(serde_json::from_value(json!({ "services": services })).unwrap())
}

fn commit(expected: u64, desired: Arc<Desired>) -> Commit {
    let time = UNIX_EPOCH + Duration::from_millis(1_000 + expected);
    Commit {
        expected,
        desired,
        author: "ann".into(),
        message: format!("from {expected}"),
        summary: None,
        time,
    }
}

#[tokio::test]
async fn revisions_persist_and_conflicts_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(dir.path(), 100).unwrap();
    assert_eq!(store.head().revision.number, 0);
    let mut watch = store.watch();
    let one = state(&[("a", 1), ("b", 2)]);
    assert_eq!(store.commit(commit(0, one.clone())).await.unwrap().revision.number, 1);
    watch.changed().await.unwrap();
    assert_eq!(watch.borrow_and_update().desired, one);
    let two = state(&[("b", 3)]);
    let stored = store.commit(commit(1, two.clone())).await.unwrap();
    let late = store.commit(commit(1, one.clone())).await.unwrap_err();
    assert!(matches!(late, StoreError::Conflict { expected: 1, found: 2 }), "{late}");
    drop((store, watch));

    let store = RedbStore::open(dir.path(), 100).unwrap();
    assert_eq!(store.head(), stored);
    assert_eq!(store.get(1).await.unwrap().desired, one);
    assert_eq!(store.get(0).await.unwrap().desired, Arc::default());
    let history = store.history(None, 10).await.unwrap();
    let listed: Vec<_> =
        history.iter().map(|r| (r.number, r.author.as_str(), r.message.as_str(), r.time_ms)).collect();
    assert_eq!(listed, [(2, "ann", "from 1", 1_001), (1, "ann", "from 0", 1_000)]);
    assert_eq!(store.history(Some(2), 10).await.unwrap().len(), 1);
    let error = store.get(9).await.unwrap_err().to_string();
    assert_eq!(error, "no revision 9; available: 1 to 2");
}

#[tokio::test]
async fn the_authors_reason_is_kept_beside_what_changed() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(dir.path(), 100).unwrap();
    let change = Commit { summary: Some("+ service a".to_owned()), ..commit(0, state(&[("a", 1)])) };
    let stored = store.commit(change).await.unwrap();
    drop(store);
    let store = RedbStore::open(dir.path(), 100).unwrap();
    assert_eq!(store.head(), stored);
    let listed = store.history(None, 1).await.unwrap().remove(0);
    assert_eq!((listed.change(), listed.reason()), ("+ service a", Some("from 0")));
    let backup = crate::desired::store::backup::Backup::of(&store, 7).await.unwrap();
    assert_eq!(backup.stored("f").unwrap(), [stored]);
}

/// A file of versions that stored services and lists only can be opened and written.
#[tokio::test]
async fn a_file_of_an_earlier_version_opens() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lb.redb");
    let database = ::redb::Database::create(&file).unwrap();
    let write = database.begin_write().unwrap();
    {
        use ::redb::TableDefinition as Table;
        let mut meta = write.open_table(Table::<&str, u64>::new("meta")).unwrap();
        meta.insert("format", 1).unwrap();
        meta.insert("head", 1).unwrap();
        let record = br#"{"author":"ann","time_ms":1000,"message":"from 0","services":{"a":1}}"#;
        let mut revisions = write.open_table(Table::<u64, &[u8]>::new("revisions")).unwrap();
        revisions.insert(1, &record[..]).unwrap();
        let service = br#"{"vip":"10.0.0.1","port":1,"protocol":"tcp"}"#;
        let mut services = write.open_table(Table::<(&str, u64), &[u8]>::new("services")).unwrap();
        services.insert(("a", 1), &service[..]).unwrap();
    }
    write.commit().unwrap();
    drop(database);
    let store = RedbStore::open(dir.path(), 100).unwrap();
    assert_eq!(store.head().desired, state(&[("a", 1)]));
    assert_eq!((store.head().revision.change(), store.head().revision.reason()), ("from 0", None));
    assert!(store.head().desired.regions.is_empty());
    let all = Arc::new(crate::desired::model::generate::state(7, true));
    store.commit(commit(1, all.clone())).await.unwrap();
    drop(store);
    let store = RedbStore::open(dir.path(), 100).unwrap();
    assert_eq!((store.head().desired, store.get(1).await.unwrap().desired), (all, state(&[("a", 1)])));
}

#[tokio::test]
async fn concurrent_writers_do_not_lose_commits() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(dir.path(), 100).unwrap();
    let writers = (0..8u16).map(|i| {
        let store = store.clone();
        tokio::spawn(async move {
            loop {
                let head = store.head();
                let mut desired = (*head.desired).clone();
                desired.services.extend(state(&[(&format!("s{i}"), i + 1)]).services.clone());
                match store.commit(commit(head.revision.number, Arc::new(desired))).await {
                    Ok(_) => return,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(e) => panic!("{e}"),
                }
            }
        })
    });
    futures_util::future::join_all(writers).await.into_iter().for_each(|r| r.unwrap());
    assert_eq!((store.head().revision.number, store.head().desired.services.len()), (8, 8));
}

#[tokio::test]
async fn old_revisions_are_removed_with_their_services() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(dir.path(), 3).unwrap();
    for i in 0..10u16 {
        store.commit(commit(u64::from(i), state(&[("kept", 1), ("changing", 100 + i)]))).await.unwrap();
    }
    let numbers: Vec<_> = store.history(None, 100).await.unwrap().iter().map(|r| r.number).collect();
    assert_eq!(numbers, [10, 9, 8]);
    assert_eq!(store.get(8).await.unwrap().desired, state(&[("kept", 1), ("changing", 107)]));
    for gone in [0, 1, 7] {
        assert!(matches!(store.get(gone).await, Err(StoreError::NoRevision { oldest: 8, newest: 10, .. })));
    }
    drop(store);
    let store = RedbStore::open(dir.path(), 3).unwrap();
    assert_eq!(*store.head().desired, *state(&[("kept", 1), ("changing", 109)]));
}

#[tokio::test]
async fn local_values_persist() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(dir.path(), 3).unwrap();
    assert_eq!(store.load("health").await.unwrap(), None);
    store.save("health", vec![1, 2, 3]).await.unwrap();
    drop(store);
    let store = RedbStore::open(dir.path(), 3).unwrap();
    assert_eq!(store.load("health").await.unwrap(), Some(vec![1, 2, 3]));
    drop(store);
    std::fs::write(dir.path().join("local.redb"), "nonsense").unwrap();
    let error = open_error(dir.path());
    assert!(error.contains("local.redb is damaged") && error.contains("takes the live maps"), "{error}");
}

fn open_error(dir: &std::path::Path) -> String {
    RedbStore::open(dir, 3).err().expect("must be refused").to_string()
}

#[tokio::test]
async fn a_second_daemon_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = RedbStore::open(dir.path(), 3).unwrap();
    let error = open_error(dir.path());
    assert!(error.contains(".redb is in use by another process"), "{error}");
}

#[tokio::test]
async fn other_files_and_newer_formats_are_left_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lb.redb");
    std::fs::write(&file, b"this is not a database, whatever it is called").unwrap();
    let error = open_error(dir.path());
    assert!(error.contains("lb.redb is damaged") && error.contains("move it away"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"this is not a database, whatever it is called");

    std::fs::remove_file(&file).unwrap();
    let database = ::redb::Database::create(&file).unwrap();
    let write = database.begin_write().unwrap();
    write
        .open_table(::redb::TableDefinition::<&str, u64>::new("meta"))
        .unwrap()
        .insert("format", 99)
        .unwrap();
    write.commit().unwrap();
    drop(database);
    let before = std::fs::metadata(&file).unwrap().len();
    let error = open_error(dir.path());
    assert!(error.contains("format 99, but this lbd supports formats up to 1"), "{error}");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), before);
}

#[tokio::test]
async fn a_damaged_store_is_refused_or_read_correctly() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lb.redb");
    let store = RedbStore::open(dir.path(), 100).unwrap();
    let last = state(&[("a", 21), ("b", 2)]);
    for i in 0..20u16 {
        store.commit(commit(u64::from(i), state(&[("a", i + 2), ("b", 2)]))).await.unwrap();
    }
    drop(store);
    let sound = std::fs::read(&file).unwrap();
    let mut refused = 0;
    for cut in [sound.len() / 2, 4096, 100] {
        std::fs::write(&file, &sound[..cut]).unwrap();
        let error = open_error(dir.path());
        assert!(error.contains("lb.redb"), "{error}");
        refused += 1;
    }
    for at in (0..sound.len().min(200_000)).step_by(9_973) {
        let mut bad = sound.clone();
        bad[at..(at + 64).min(sound.len())].fill(0xa5);
        std::fs::write(&file, &bad).unwrap();
        match RedbStore::open(dir.path(), 100) {
            Ok(store) => assert_eq!(store.head().desired, last, "misread with damage at {at}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 3, "some damage must have hit something");
}

/// Whoever goes back to etcd later must not get the state that this host had before it followed a file.
#[tokio::test]
async fn the_last_known_state_is_forgotten_when_a_file_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let local = LocalFile::open(dir.path()).unwrap();
    local.save("last-known-state", b"{}".to_vec()).await.unwrap();
    let opener = Opener { local: local.clone(), keep: 100, access: Default::default(), id: None };
    let file = Address::File(dir.path().to_owned());
    opener.open_other(&file).await.unwrap();
    assert_eq!(local.load("last-known-state").await.unwrap(), Some(b"{}".to_vec()), "only filled");
    opener.open(&file).await.unwrap();
    assert_eq!(local.load("last-known-state").await.unwrap(), Some(Vec::new()));
}
