//! The store in a file on a disk that is full for a while: a small tmpfs in a mount namespace of the test's own.

use std::{
    env,
    fs::{self, File},
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lb_userspace::desired::store::{LocalFile, RedbStore, Store, StoreError, backup};
use test_store::{commit, full, state};

/// Set in the process that has a mount namespace of its own.
const INSIDE: &str = "LB_TEST_OWN_MOUNTS";
/// Size of the disk: enough for two new stores.
const DISK: &str = "size=8m";
/// How long something that happens by itself may take.
const SOON: Duration = Duration::from_secs(10);

/// Runs a test with a small disk of its own: repeats the test named `name` in another process.
fn with_disk(name: &str, test: impl AsyncFnOnce(Disk) -> Result<()>) -> Result<()> {
    if env::var_os(INSIDE).is_none() {
        let mut command = Command::new("unshare");
        command.arg("--mount");
        if fs::metadata("/proc/self")?.uid() != 0 {
            command.arg("--map-root-user");
        }
        command.arg(env::current_exe()?).args([name, "--exact"]).env(INSIDE, "1");
        let output = command.output().context("cannot start unshare")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let text = text + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && text.contains("1 passed"), "in its own mount namespace: {text}");
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let mount =
        Command::new("mount").args(["-t", "tmpfs", "-o", DISK, "tmpfs"]).arg(directory.path()).status();
    ensure!(mount?.success(), "cannot mount a tmpfs");
    let disk = Disk { path: directory.path().to_owned() };
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(test(disk))
}

struct Disk {
    path: PathBuf,
}

impl Disk {
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.path.join("ballast"))?;
        while file.write(&[1; 4_096]).is_ok_and(|n| n > 0) {}
        Ok(())
    }

    fn free(&self) -> Result<()> {
        Ok(fs::remove_file(self.path.join("ballast"))?)
    }
}

fn files(directory: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(directory)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

fn is_full(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
}

#[test]
fn changes_are_accepted_again_when_the_disk_has_room() -> Result<()> {
    with_disk("changes_are_accepted_again_when_the_disk_has_room", async |disk| {
        let directory = disk.path.join("state");
        let store = RedbStore::open(&directory, 1_000)?;
        store.commit(commit(0, state(&[("a", 1, &[1])]))).await?;
        disk.fill()?;
        // What the file has allocated already may suffice for a few changes.
        let weights = [1; 200];
        let error = loop {
            let number = store.head().revision.number;
            ensure!(number < 500, "500 changes fitted on a full disk");
            let next = state(&[("a", number as u16 + 1, &weights)]);
            match store.commit(commit(number, next)).await {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        ensure!(is_full(&error), "{error}");
        let head = store.head();
        let number = head.revision.number;
        let link = store.link().borrow().clone();
        ensure!(!link.connected, "the failure is not shown");
        ensure!(link.problem.as_ref().is_some_and(|p| p.contains("No space left")), "{link:?}");
        let member = store.about().await.members.pop().context("a member")?;
        ensure!(!member.healthy && member.problem.is_some(), "{member:?}");
        ensure!(store.get(number).await? == head, "nothing can be read");

        disk.free()?;
        let until = Instant::now() + SOON;
        while !store.link().borrow().connected {
            ensure!(Instant::now() < until, "still not connected: {:?}", store.link().borrow());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        ensure!(store.link().borrow().problem.is_none());
        ensure!(store.head() == head, "the change that failed was stored");
        store.commit(commit(number, full(3))).await?;
        drop(store);
        let store = RedbStore::open(&directory, 1_000)?;
        ensure!(store.head().desired == full(3) && store.get(number).await? == head);
        Ok(())
    })
}

#[test]
fn local_data_are_saved_again_when_the_disk_has_room() -> Result<()> {
    with_disk("local_data_are_saved_again_when_the_disk_has_room", async |disk| {
        use lb_userspace::desired::store::Local;
        let local = LocalFile::open(&disk.path)?;
        local.save("health", vec![1; 10]).await?;
        disk.fill()?;
        let Err(error) = local.save("health", vec![2; 6_000_000]).await else { bail!("it fitted") };
        ensure!(is_full(&error), "{error}");
        disk.free()?;
        ensure!(local.load("health").await? == Some(vec![1; 10]));
        local.save("health", vec![3; 10]).await?;
        ensure!(local.load("health").await? == Some(vec![3; 10]));
        Ok(())
    })
}

#[test]
fn a_first_start_on_a_full_disk_leaves_no_file() -> Result<()> {
    with_disk("a_first_start_on_a_full_disk_leaves_no_file", async |disk| {
        let directory = disk.path.join("state");
        fs::create_dir(&directory)?;
        disk.fill()?;
        let Err(error) = RedbStore::open(&directory, 100) else { bail!("it fitted") };
        ensure!(is_full(&error), "{error}");
        ensure!(files(&directory)?.is_empty(), "{:?}", files(&directory)?);
        disk.free()?;
        // Left by a process that was killed at that moment.
        fs::write(directory.join("lb.redb.new"), "incomplete")?;
        fs::write(directory.join("local.redb.new"), "incomplete")?;
        let store = RedbStore::open(&directory, 100)?;
        store.commit(commit(0, full(1))).await?;
        let mut left = files(&directory)?;
        left.sort();
        ensure!(left == ["lb.redb", "local.redb"], "{left:?}");
        Ok(())
    })
}

/// Writes nothing that is there already.
#[test]
fn a_later_start_on_a_full_disk_succeeds() -> Result<()> {
    with_disk("a_later_start_on_a_full_disk_succeeds", async |disk| {
        let directory = disk.path.join("state");
        let store = RedbStore::open(&directory, 100)?;
        let head = store.commit(commit(0, full(1))).await?;
        drop(store);
        disk.fill()?;
        ensure!(RedbStore::open(&directory, 100)?.head() == head);
        Ok(())
    })
}

#[test]
fn a_migration_to_a_full_disk_can_be_repeated() -> Result<()> {
    with_disk("a_migration_to_a_full_disk_can_be_repeated", async |disk| {
        let elsewhere = tempfile::tempdir_in("/var/tmp")?;
        let from = RedbStore::open(elsewhere.path(), 100)?;
        for i in 0..20 {
            from.commit(commit(i, full(i))).await?;
        }
        let all = backup::revisions(&from).await?;
        let open = |to: &str| RedbStore::beside(from.local(), &disk.path.join(to), 100).map(Arc::new);

        // No room for the file itself, and none for the revisions.
        fs::create_dir(disk.path.join("one"))?;
        let two = open("two")?;
        disk.fill()?;
        let Err(error) = open("one") else { bail!("it fitted") };
        ensure!(is_full(&error), "{error}");
        let large: Vec<_> = (1..=20)
            .map(|number| {
                let mut stored = all[0].clone();
                stored.revision.number = number;
                stored.desired = state(&[("a", number as u16, &[1; 4_000])]);
                stored
            })
            .collect();
        let Err(error) = two.import(None, large).await else { bail!("it fitted") };
        ensure!(is_full(&error), "{error}");
        drop(two);
        disk.free()?;
        for to in ["one", "two"] {
            let to = open(to)?;
            to.import(None, all.clone()).await?;
            ensure!(backup::revisions(&*to).await? == all);
        }
        Ok(())
    })
}
