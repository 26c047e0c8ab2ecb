//! What hosts go through with an etcd that fails, lies, is slow, or asks who they are.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lb_userspace::desired::store::{
    Address, EtcdStore, LocalFile, Retire, Store, StoreError,
    etcd::{Access, EtcdOptions},
};
use tempfile::TempDir;
use test_store::{commit, state};
use test_support::etcd::{Cluster, Place};

const SOON: Duration = Duration::from_secs(20);

struct Bed {
    cluster: Cluster,
    directory: TempDir,
    /// Held for as long as the bed is: a closed store's tasks end a moment later.
    locals: Mutex<BTreeMap<String, Arc<LocalFile>>>,
}

fn bed(members: usize) -> Result<Bed> {
    let directory = tempfile::tempdir()?;
    let places = (0..members).map(|_| Place::local()).collect::<Result<Vec<_>>>()?;
    let cluster = Cluster::start(&places, directory.path(), "http", &[])?;
    Ok(Bed { cluster, directory, locals: Mutex::default() })
}

impl Bed {
    fn options(&self) -> Result<EtcdOptions> {
        let Address::Etcd { members, prefix, tls } = self.cluster.url("lb").parse()? else {
            bail!("not the address of an etcd")
        };
        let access = Access { members, tls, ..Access::default() };
        Ok(EtcdOptions { access, prefix, keep: 100, id: None })
    }

    fn local(&self, host: &str) -> Result<Arc<LocalFile>, StoreError> {
        let mut locals = self.locals.lock().expect("no test panics with it held");
        if let Some(local) = locals.get(host) {
            return Ok(local.clone());
        }
        let local = Arc::new(LocalFile::open(&self.directory.path().join(host))?);
        locals.insert(host.to_owned(), local.clone());
        Ok(local)
    }

    async fn try_open(&self, host: &str, options: EtcdOptions) -> Result<EtcdStore, StoreError> {
        EtcdStore::open(options, self.local(host)?).await
    }

    async fn host(&self, name: &str) -> Result<EtcdStore> {
        Ok(self.try_open(name, self.options()?).await?)
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Result<Duration> {
    let began = Instant::now();
    while !holds() {
        ensure!(began.elapsed() < SOON, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(began.elapsed())
}

fn connected(store: &EtcdStore) -> bool {
    store.link().borrow().connected
}

fn refusal<T>(result: Result<T, StoreError>) -> Result<String> {
    match result {
        Ok(_) => bail!("not refused"),
        Err(error) => Ok(error.to_string()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_off_hosts_serve_reads_refuse_writes_and_catch_up_without_a_flap() -> Result<()> {
    let mut bed = bed(1)?;
    let (one, two) = (bed.host("one").await?, bed.host("two").await?);
    for i in 0..3 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    eventually("two follows", || two.head().revision.number == 3).await?;
    let mut watch = two.watch();
    watch.borrow_and_update();
    bed.cluster.members[0].kill();
    let took = eventually("both notice", || !connected(&one) && !connected(&two)).await?;
    println!("noticed after {took:?}");
    ensure!(two.head().revision.number == 3 && two.get(2).await?.revision.number == 2);
    ensure!(two.history(None, 10).await?.len() == 3);
    let began = Instant::now();
    let error = refusal(two.commit(commit(3, state(&[]))).await)?;
    ensure!(began.elapsed() < Duration::from_millis(200), "refused after {:?}", began.elapsed());
    ensure!(error.contains("cut off from the store") && error.contains("forwards by revision 3"), "{error}");

    bed.cluster.members[0].start_again(None)?;
    let took = eventually("both are back", || connected(&one) && connected(&two)).await?;
    println!("back after {took:?}");
    // Nothing was published meanwhile.
    ensure!(!watch.has_changed()?, "a flap");
    one.commit(commit(3, state(&[("a", 9, &[1])]))).await?;
    eventually("two follows again", || two.head().revision.number == 4).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_starts_without_etcd_on_its_last_known_state() -> Result<()> {
    let mut bed = bed(1)?;
    let one = bed.host("one").await?;
    one.commit(commit(0, state(&[("a", 1, &[1, 2])]))).await?;
    let last = one.head();
    // As the daemon does: the state is saved a moment later.
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(one);
    bed.cluster.members[0].kill();
    let one = bed.host("one").await?;
    ensure!(one.head() == last && !connected(&one));
    let error = refusal(bed.try_open("fresh", bed.options()?).await)?;
    ensure!(error.contains("no last known state to use"), "{error}");
    bed.cluster.members[0].start_again(None)?;
    eventually("it is connected", || connected(&one)).await?;
    ensure!(one.head() == last);
    one.commit(commit(1, state(&[]))).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_data_is_refused_by_name() -> Result<()> {
    let bed = bed(1)?;
    let one = bed.host("one").await?;
    one.commit(commit(0, state(&[("a", 1, &[])]))).await?;
    let id = one.about().await.id;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let last = one.head();
    // The same address with another store's data, under a running host, and for one that starts.
    bed.cluster.etcdctl(&["put", "lb/store", r#"{"format":1,"id":"feedfeedfeedfeed"}"#])?;
    eventually("it notices", || !connected(&one)).await?;
    let problem = one.link().borrow().problem.clone().context("a problem")?;
    ensure!(problem.contains("feedfeedfeedfeed") && problem.contains(&id), "{problem}");
    let error = refusal(one.commit(commit(1, state(&[]))).await)?;
    ensure!(error.contains("feedfeedfeedfeed") && one.head() == last, "{error}");
    drop(one);
    let error = refusal(bed.try_open("one", bed.options()?).await)?;
    ensure!(error.contains(&id) && error.contains("--store-id feedfeedfeedfeed"), "{error}");
    // Whoever names it gets it.
    let options = EtcdOptions { id: Some("feedfeedfeedfeed".into()), ..bed.options()? };
    ensure!(connected(&bed.try_open("one", options).await?));
    // A later version's data.
    bed.cluster.etcdctl(&["put", "lb/store", r#"{"format":7,"id":"feedfeedfeedfeed"}"#])?;
    let error = refusal(bed.try_open("two", bed.options()?).await)?;
    ensure!(error.contains("format 7, but this lbd supports formats up to 1"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_set_back_is_not_followed_unless_told_to() -> Result<()> {
    let bed = bed(1)?;
    let one = bed.host("one").await?;
    for i in 0..3 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    let head = bed.cluster.etcdctl(&["get", "--print-value-only", "lb/revisions/00000000000000000002"])?;
    let record: serde_json::Value = serde_json::from_str(head.trim())?;
    let nonce = record["nonce"].as_str().context("a nonce")?;
    bed.cluster.etcdctl(&["del", "lb/revisions/00000000000000000003"])?;
    bed.cluster.etcdctl(&["put", "lb/head", &format!("2 {nonce}")])?;
    eventually("it notices", || !connected(&one)).await?;
    ensure!(one.link().borrow().set_back == Some(2));
    let refused = refusal(one.accept(1))?;
    ensure!(refused.contains("set back to revision 2, not 1"), "{refused}");
    one.accept(2)?;
    eventually("it follows, as it was told to", || one.head().revision.number == 2 && connected(&one))
        .await?;
    let refused = refusal(one.accept(2))?;
    ensure!(refused.contains("nothing to accept: this host works by the store's revision 2"), "{refused}");
    // Another history of the same length, which nobody accepted.
    bed.cluster.etcdctl(&["put", "lb/head", "1 0000000000000000"])?;
    eventually("it notices", || !connected(&one)).await?;
    let problem = one.link().borrow().problem.clone().context("a problem")?;
    ensure!(problem.contains("is at revision 1, but has been at 2"), "{problem}");
    ensure!(one.head().revision.number == 2);
    let error = refusal(one.commit(commit(2, state(&[]))).await)?;
    ensure!(error.contains("lbctl store accept 1"), "{error}");
    // Accepted is what was shown, whether it is taken before or after it is replaced; what replaces it is not.
    one.accept(1)?;
    bed.cluster.etcdctl(&["put", "lb/head", "1 1111111111111111"])?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(!connected(&one), "another head than the accepted one was taken");
    ensure!(one.link().borrow().set_back == Some(1), "the new head is not shown");
    bed.cluster.etcdctl(&["put", "lb/head", &format!("2 {nonce}")])?;
    eventually("it is connected", || connected(&one)).await?;
    let refused = refusal(one.accept(1))?;
    ensure!(refused.contains("nothing to accept"), "what is over can be accepted: {refused}");
    one.commit(commit(2, state(&[]))).await?;
    Ok(())
}

impl Bed {
    fn record(&self, number: u64) -> Result<serde_json::Value> {
        let key = format!("lb/revisions/{number:020}");
        let value = self.cluster.etcdctl(&["get", "--print-value-only", &key])?;
        serde_json::from_str(value.trim()).with_context(|| format!("{key}: {value:?}"))
    }

    fn put(&self, key: &str, value: &str) -> Result<()> {
        self.cluster.etcdctl(&["put", &format!("lb/{key}"), value]).map(drop)
    }

    /// The head that names a revision's own record.
    fn head_of(&self, number: u64) -> Result<String> {
        let record = self.record(number)?;
        Ok(format!("{number} {}", record["nonce"].as_str().context("a nonce")?))
    }
}

/// Nothing but the head changes: connected hosts notice, do not follow, and say what they found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_changes_by_itself_is_noticed() -> Result<()> {
    let bed = bed(1)?;
    let (one, two) = (bed.host("one").await?, bed.host("two").await?);
    for i in 0..3 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    eventually("two follows", || two.head().revision.number == 3).await?;
    let (right, last) = (bed.head_of(3)?, one.head());
    let cases = [
        (bed.head_of(2)?, Some(2)),
        ("3 ffffffffffffffff".to_owned(), Some(3)),
        ("1 ffffffffffffffff".to_owned(), Some(1)),
        // It names no record: nothing that could be accepted.
        ("4 ffffffffffffffff".to_owned(), None),
        ("9 ffffffffffffffff".to_owned(), None),
        ("nonsense".to_owned(), None),
    ];
    for (head, set_back) in cases {
        bed.put("head", &head)?;
        let took = eventually(&head, || !connected(&one) && !connected(&two)).await?;
        println!("{head}: noticed after {took:?}");
        for host in [&one, &two] {
            ensure!(host.link().borrow().set_back == set_back, "{head}: {:?}", host.link().borrow());
            ensure!(host.head() == last, "{head} is followed");
        }
        bed.put("head", &right)?;
        eventually("both are connected", || connected(&one) && connected(&two)).await?;
    }
    bed.cluster.etcdctl(&["del", "lb/head"])?;
    eventually("no head", || !connected(&one) && !connected(&two)).await?;
    ensure!(one.link().borrow().set_back == Some(0) && one.head() == last && two.head() == last);
    bed.put("head", &right)?;
    eventually("both are connected", || connected(&one) && connected(&two)).await?;
    two.commit(commit(3, state(&[]))).await?;
    eventually("one follows", || one.head() == two.head()).await.map(drop)
}

/// An accepted head is followed; another one that replaces it then is not, though nothing else changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_replaces_an_accepted_head_must_be_accepted_anew() -> Result<()> {
    let bed = bed(1)?;
    let one = bed.host("one").await?;
    for i in 0..3 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    let at = |n: u64| one.head().revision.number == n && connected(&one);
    for number in [2, 1] {
        bed.put("head", &bed.head_of(number)?)?;
        eventually("it notices", || one.link().borrow().set_back == Some(number)).await?;
        one.accept(number)?;
        eventually("it follows, as it was told to", || at(number)).await?;
    }
    bed.put("head", "1 1111111111111111")?;
    eventually("it notices", || one.link().borrow().set_back == Some(1)).await?;
    // What it accepts names no record of that nonce.
    one.accept(1)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(!connected(&one), "a head without its record was taken");
    bed.put("head", &bed.head_of(1)?)?;
    eventually("it is connected", || at(1)).await?;
    // Set forward again: that is history which this host has not seen.
    bed.put("head", &bed.head_of(3)?)?;
    eventually("it follows", || at(3)).await.map(drop)
}

/// Records without a head are no revisions yet: an import that is going on, or was cut short.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_no_head_names_are_not_followed() -> Result<()> {
    let bed = bed(1)?;
    let (one, two) = (bed.host("one").await?, bed.host("two").await?);
    let linked_since = |host: &EtcdStore| host.link().borrow().since_ms;
    let since = (linked_since(&one), linked_since(&two));
    for i in 0..2 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    eventually("two follows", || two.head() == one.head()).await?;
    let mut record = bed.record(2)?;
    record["after"] = record["nonce"].clone();
    record["nonce"] = "eeeeeeeeeeeeeeee".into();
    bed.put("revisions/00000000000000000003", &record.to_string())?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    for host in [&one, &two] {
        ensure!(host.head().revision.number == 2 && connected(host), "{:?}", host.link().borrow());
    }
    let committed = two.commit(commit(2, state(&[("b", 3, &[1])]))).await?;
    eventually("one follows", || one.head() == committed).await?;
    // Whoever writes its record to an older place changes history, and what is remembered of it is read anew.
    let mut record = bed.record(2)?;
    record["author"] = "somebody else".into();
    record["nonce"] = "dddddddddddddddd".into();
    bed.put("revisions/00000000000000000002", &record.to_string())?;
    bed.put("head", &bed.head_of(3)?)?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    ensure!(one.history(None, 10).await?.iter().any(|r| r.author == "somebody else"), "an old memory");
    ensure!((linked_since(&one), linked_since(&two)) == since, "a flap");
    Ok(())
}

/// Each commit writes the head with its record, and hosts that commit at once pass each other's: none takes that for a head
/// that was set back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_commit_at_once_stay_connected() -> Result<()> {
    let bed = bed(1)?;
    let hosts = [bed.host("one").await?, bed.host("two").await?, bed.host("three").await?];
    let since = hosts.each_ref().map(|host| host.link().borrow().since_ms);
    let each = |host: usize| {
        let store = &hosts[host];
        async move {
            let mut done = 0;
            while done < 100 {
                let number = store.head().revision.number;
                match store
                    .commit(commit(number, state(&[("a", number as u16 + 1, &[host as u32 + 1])])))
                    .await
                {
                    Ok(_) => done += 1,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => bail!("{error}"),
                }
            }
            Ok(())
        }
    };
    let (first, second) = tokio::join!(each(0), each(1));
    first.and(second)?;
    eventually("all have all", || hosts.iter().all(|host| host.head().revision.number == 200)).await?;
    ensure!(hosts.iter().all(|host| host.head() == hosts[0].head()));
    ensure!(hosts.each_ref().map(|host| host.link().borrow().since_ms) == since, "a flap");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_while_a_host_is_away_costs_it_nothing() -> Result<()> {
    let bed = bed(1)?;
    let one = bed.host("one").await?;
    let two = bed.host("two").await?;
    for i in 0..5 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    let status: serde_json::Value =
        serde_json::from_str(&bed.cluster.etcdctl(&["endpoint", "status", "-w", "json"])?)?;
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    bed.cluster.etcdctl(&["compact", &revision])?;
    // Frozen, the member drops nobody; two's watch begins anew behind what was compacted.
    bed.cluster.members[0].freeze(true)?;
    eventually("two is cut off", || !connected(&two)).await?;
    bed.cluster.members[0].freeze(false)?;
    eventually("both are back", || connected(&one) && connected(&two)).await?;
    for i in 5..8 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    eventually("two has all", || two.head() == one.head()).await?;
    ensure!(bed.host("three").await?.head() == one.head());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_member_is_left_for_another() -> Result<()> {
    let bed = bed(3)?;
    let one = bed.host("one").await?;
    let two = bed.host("two").await?;
    let mut slowest = Duration::ZERO;
    let mut number = 0;
    for member in &bed.cluster.members {
        member.freeze(true)?;
        for _ in 0..3 {
            let began = Instant::now();
            // A leader that is frozen must first be missed by the others.
            while let Err(error) = one.commit(commit(number, state(&[("a", number as u16 + 1, &[1])]))).await
            {
                match error {
                    StoreError::CutOff { .. } => tokio::time::sleep(Duration::from_millis(50)).await,
                    StoreError::Unsure { .. } | StoreError::Conflict { .. } => {
                        eventually("it is known what became of it", || connected(&one)).await?;
                        if one.head().revision.number > number {
                            break;
                        }
                    }
                    error => bail!("{error}"),
                }
                ensure!(began.elapsed() < SOON, "no commit with one member frozen");
            }
            number = one.head().revision.number;
            slowest = slowest.max(began.elapsed());
        }
        eventually("two follows", || two.head().revision.number == number).await?;
        member.freeze(false)?;
    }
    println!("slowest commit with a frozen member: {slowest:?}");
    ensure!(one.head() == two.head());
    Ok(())
}

/// Without a majority nothing is confirmed, and each call ends in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_confirmed() -> Result<()> {
    let mut bed = bed(3)?;
    let one = bed.host("one").await?;
    one.commit(commit(0, state(&[("a", 1, &[])]))).await?;
    bed.cluster.members[0].kill();
    bed.cluster.members[1].kill();
    let began = Instant::now();
    let error = refusal(one.commit(commit(1, state(&[]))).await)?;
    println!("after {:?}: {error}", began.elapsed());
    ensure!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    eventually("it is cut off", || !connected(&one)).await?;
    ensure!(one.head().revision.number == 1);
    let about = one.about().await;
    ensure!(about.members.iter().all(|m| !m.healthy), "{about:?}");
    bed.cluster.members[0].start_again(None)?;
    eventually("it is back", || connected(&one)).await?;
    // Whatever became of the change that was not confirmed: from here on all agree.
    let number = one.head().revision.number;
    one.commit(commit(number, state(&[("b", 2, &[])]))).await?;
    ensure!(bed.host("two").await?.head() == one.head());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_host_told_is_forgotten() -> Result<()> {
    let bed = bed(1)?;
    let (one, two) = (bed.host("one").await?, bed.host("two").await?);
    one.publish("hosts/one", Some(b"alive".to_vec()));
    let seen = || two.published().borrow().contains_key("hosts/one");
    eventually("two sees one", seen).await?;
    tokio::time::sleep(Duration::from_secs(12)).await;
    ensure!(seen(), "the lease was not kept");
    drop(one);
    eventually("two misses one", || !seen()).await.map(drop)
}

/// etcd lost everything: nobody follows that, and one host that is told to fills it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_lost_everything_is_filled_again() -> Result<()> {
    let bed = bed(1)?;
    let (one, two) = (bed.host("one").await?, bed.host("two").await?);
    for i in 0..5 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1])]))).await?;
    }
    eventually("two follows", || two.head().revision.number == 5).await?;
    let last = one.head();
    bed.cluster.etcdctl(&["del", "lb/", "--prefix"])?;
    eventually("both refuse to follow", || !connected(&one) && !connected(&two)).await?;
    let problem = two.link().borrow().problem.clone().context("a problem")?;
    ensure!(problem.contains("at revision 0, but has been at 5"), "{problem}");
    ensure!(one.head() == last && two.head() == last);
    one.accept(0)?;
    eventually("both are connected again", || connected(&one) && connected(&two)).await?;
    ensure!(one.head() == last && two.head() == last);
    ensure!(bed.host("three").await?.get(3).await?.revision.number == 3);
    two.commit(commit(5, state(&[("b", 2, &[])]))).await?;
    eventually("one follows", || one.head().revision.number == 6).await.map(drop)
}

/// From one cluster to another: hosts that knew the old one go on with the new one as if nothing were.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migrated_store_is_the_same_store() -> Result<()> {
    let (from, to) = (bed(1)?, bed(1)?);
    let (one, two) = (from.host("one").await?, from.host("two").await?);
    for i in 0..5 {
        one.commit(commit(i, state(&[("a", i as u16 + 1, &[1, 2])]))).await?;
    }
    eventually("two follows", || two.head().revision.number == 5).await?;
    let (id, head) = (one.about().await.id, one.head());
    let other = to.try_open("filler", to.options()?).await?;
    one.retire(Retire::Moving(to.cluster.url("lb"))).await?;
    let error = refusal(two.commit(commit(5, state(&[]))).await)?;
    ensure!(error.contains("is being copied to etcd://"), "{error}");
    let second = refusal(two.retire(Retire::Moving("file:///else".into())).await)?;
    ensure!(second.contains("is being copied to etcd://"), "{second}");
    other.import(Some(id.clone()), lb_userspace::desired::store::backup::revisions(&one).await?).await?;
    one.retire(Retire::Moved(to.cluster.url("lb"))).await?;
    let error = refusal(two.commit(commit(5, state(&[]))).await)?;
    ensure!(error.contains("migrated to etcd://") && error.contains("lbctl store unretire --yes"), "{error}");
    eventually("both show it", || [&one, &two].iter().all(|host| host.link().borrow().moved.is_some()))
        .await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop((one, two));
    // A host with a last known state, and another address.
    let local = from.local("two")?;
    let two = EtcdStore::open(to.options()?, local).await?;
    ensure!(connected(&two) && two.about().await.id == id && two.head() == head);
    two.commit(commit(5, state(&[]))).await?;
    eventually("the other follows", || other.head().revision.number == 6).await.map(drop)
}

fn openssl(directory: &Path, arguments: &str) -> Result<()> {
    let output =
        Command::new("openssl").current_dir(directory).args(arguments.split_whitespace()).output()?;
    ensure!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A CA, and certificates for the member and for the host.
fn certificates(directory: &Path) -> Result<()> {
    openssl(
        directory,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem",
    )?;
    std::fs::write(
        directory.join("ext"),
        "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n",
    )?;
    for name in ["member", "host"] {
        openssl(
            directory,
            &format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
            ),
        )?;
        openssl(
            directory,
            &format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out {name}.pem"
            ),
        )?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_spoken_both_ways() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name);
    certificates(directory.path())?;
    let text = |name: &str| path(name).display().to_string();
    let (ca, cert, key) = (text("ca.pem"), text("member.pem"), text("member.key"));
    let extra = ["--cert-file", &cert, "--key-file", &key, "--client-cert-auth", "--trusted-ca-file", &ca];
    let cluster = Cluster::start(&[Place::local()?], directory.path(), "https", &extra)?;
    let bed = Bed { cluster, directory, locals: Mutex::default() };
    let options = bed.options()?;
    let path = |name: &str| bed.directory.path().join(name);
    let identity = Some((path("host.pem"), path("host.key")));
    let access = Access { tls: true, ca: Some(path("ca.pem")), identity, ..options.access.clone() };
    let one = bed.try_open("one", EtcdOptions { access: access.clone(), ..options.clone() }).await?;
    one.commit(commit(0, state(&[("a", 1, &[])]))).await?;
    // Without our certificate, and without knowledge of theirs.
    for access in [Access { identity: None, ..access.clone() }, Access { ca: None, ..access.clone() }] {
        let error = refusal(bed.try_open("two", EtcdOptions { access, ..options.clone() }).await)?;
        ensure!(error.contains("cannot reach the store"), "{error}");
        println!("{error}");
    }
    let missing = Access { ca: Some(path("no.pem")), ..access };
    let error = refusal(bed.try_open("two", EtcdOptions { access: missing, ..options }).await)?;
    ensure!(error.contains("no.pem"), "{error}");
    Ok(())
}

/// Users root (password secret) and lb (password pass), which has the prefix lb/.
fn enable_users(cluster: &Cluster) -> Result<()> {
    for arguments in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "lb:pass"],
        &["role", "add", "lb"],
        &["role", "grant-permission", "lb", "readwrite", "lb/", "--prefix"],
        &["user", "grant-role", "lb", "lb"],
        &["auth", "enable"],
    ] {
        cluster.etcdctl(arguments)?;
    }
    Ok(())
}

/// A JWT token names the revision of etcd's users and roles, and any change of these makes it invalid.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_users_cuts_no_host_off() -> Result<()> {
    let directory = tempfile::tempdir()?;
    openssl(directory.path(), "genrsa -out jwt.key 2048")?;
    openssl(directory.path(), "rsa -in jwt.key -pubout -out jwt.pub")?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let token =
        format!("jwt,pub-key={},priv-key={},sign-method=RS256,ttl=10m", path("jwt.pub"), path("jwt.key"));
    let cluster = Cluster::start(&[Place::local()?], directory.path(), "http", &["--auth-token", &token])?;
    let bed = Bed { cluster, directory, locals: Mutex::default() };
    enable_users(&bed.cluster)?;
    let options = bed.options()?;
    let file = bed.directory.path().join("password");
    std::fs::write(&file, "pass\n")?;
    let access = Access { user: Some(("lb".into(), file)), ..options.access.clone() };
    let options = EtcdOptions { access, ..options };
    let one = bed.try_open("one", options.clone()).await?;
    let two = bed.try_open("two", options).await?;
    for change in 0..3_u16 {
        let revision = u64::from(change) + 1;
        one.commit(commit(revision - 1, state(&[("a", change + 1, &[])]))).await?;
        eventually("the other follows", || two.head().revision.number == revision).await?;
        let name = format!("somebody-{change}:pw");
        bed.cluster.etcdctl(&["--user", "root:secret", "user", "add", &name])?;
    }
    ensure!(connected(&one) && connected(&two), "no host is cut off");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_a_password_is_let_in() -> Result<()> {
    let bed = bed(1)?;
    enable_users(&bed.cluster)?;
    let options = bed.options()?;
    let error = refusal(bed.try_open("none", options.clone()).await)?;
    println!("{error}");
    ensure!(error.contains("user name is empty") || error.contains("permission"), "{error}");
    let file = bed.directory.path().join("password");
    let with = |text: &str| -> Result<EtcdOptions> {
        std::fs::write(&file, text)?;
        let access = Access { user: Some(("lb".into(), file.clone())), ..options.access.clone() };
        Ok(EtcdOptions { access, ..options.clone() })
    };
    let error = refusal(bed.try_open("wrong", with("wrong\n")?).await)?;
    ensure!(error.contains("authentication failed"), "{error}");
    let one = bed.try_open("one", with("pass\n")?).await?;
    one.commit(commit(0, state(&[("a", 1, &[])]))).await?;
    one.publish("hosts/one", Some(vec![1]));
    let told = one.published();
    eventually("it is told", || told.borrow().len() == 1).await?;
    Ok(())
}

/// Two hosts named alike: the second one publishes nothing, and says why, for as long as the first one is there. The
/// first one, started again, is itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_name_is_refused_to_another_host() -> Result<()> {
    let bed = bed(1)?;
    let (one, two, watcher) = (bed.host("one").await?, bed.host("two").await?, bed.host("three").await?);
    let told = |key: &str| watcher.published().borrow().get(key).cloned();
    let taken = |store: &EtcdStore| store.link().borrow().name_taken.clone();
    let begin = |store: &EtcdStore, instance: &str| {
        store.join("ea", instance);
        store.publish("hosts/ea", Some(instance.into()));
        store.keep_member("ea", instance.into());
    };
    begin(&one, "first");
    eventually("the first is told", || told("hosts/ea") == Some(b"first".to_vec())).await?;
    begin(&two, "second");
    eventually("the second is refused", || taken(&two).as_deref() == Some("ea")).await?;
    let shown = || (told("hosts/ea"), told("members/ea"));
    let first = (Some(b"first".to_vec()), Some(b"first".to_vec()));
    for _ in 0..30 {
        ensure!(shown() == first && taken(&one).is_none(), "{:?}", shown());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    // Killed and started again at once: its lease is still there, but it need not wait for it.
    drop(one);
    let began = Instant::now();
    let one = bed.host("one").await?;
    begin(&one, "first");
    one.publish("hosts/ea", Some(b"again".to_vec()));
    eventually("it is itself", || told("hosts/ea") == Some(b"again".to_vec())).await?;
    ensure!(began.elapsed() < Duration::from_secs(5), "locked out for {:?}", began.elapsed());
    ensure!(taken(&one).is_none() && taken(&two).is_some());

    // Gone for good: the name is free after its lease.
    drop(one);
    let took = eventually("the second has the name", || told("hosts/ea") == Some(b"second".to_vec())).await?;
    println!("the name was free after {took:?}");
    ensure!(taken(&two).is_none());
    Ok(())
}
