//! The test bed itself, without the balancer: what the other tests rely on.

use std::{
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Result;
use test_support::{
    bed::{Bed, INGRESS_V4, Layout},
    hold::{Holder, LineWorker},
    http::{Connection, Load, Running},
    iperf, netns, nginx, program,
    udp::{EchoWorker, Flows},
    wait,
};

#[test]
fn workers_answer_by_name_over_every_protocol() -> Result<()> {
    let bed = Bed::new(Layout { workers: 2, ..Layout::default() })?;
    let worker = &bed.workers[1];
    let addresses = [worker.v4.into(), worker.v6.into()];
    let _nginx = nginx::start(&worker.namespace, "w2", bed.directory())?;
    let _line = LineWorker::start(&worker.namespace, "w2", 9000)?;
    let _echo = EchoWorker::start(&worker.namespace, "w2", &addresses, 9001)?;
    let _iperf = iperf::start_worker(&worker.namespace, "w2", 5201, bed.directory())?;
    let at = |port| addresses.map(|address| SocketAddr::new(address, port)).to_vec();

    let load = Running::start(&bed.client, Load::new(at(80)))?;
    wait::until("200 requests have ended", Duration::from_secs(20), || load.count() >= 200)?;
    let account = load.finish()?;
    assert_eq!(account.failed(), 0, "{:?}", account.failures().next());
    assert_eq!(account.by_worker().keys().collect::<Vec<_>>(), ["w2"]);

    let holder = Holder::open(&bed.client, &at(9000), 100)?;
    assert!(holder.exchange()?.iter().all(|held| held.stays() && held.worker == "w2"));

    for target in at(9001) {
        let answers = Flows::open(&bed.client, target, 20)?.exchange()?;
        assert!(answers.iter().all(|answer| answer.as_deref() == Some("w2")), "{answers:?}");
    }

    let report = iperf::start(&bed.client, worker.v4.into(), 5201, 1, 50)?.finish()?;
    assert!(report.bytes > 1_000_000, "{report:?}");

    let target = at(80)[0];
    let answer = bed
        .client
        .spawn_async(move || async move {
            let body = vec![7; 300_000];
            Connection::open(target).await?.post("/upload", &body, Duration::from_secs(10)).await
        })?
        .join()
        .expect("the upload does not panic")?;
    assert_eq!((answer.status, answer.body.as_slice()), (200, b"w2\n".as_slice()));
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    let bed = Bed::new(Layout { workers: 1, ..Layout::default() })?;
    let (id, directory) = (bed.id().to_owned(), bed.directory().to_owned());
    let mut sleeper = bed.workers[0].namespace.command("sleep").arg("1000").spawn()?;
    assert_eq!(netns::list(&format!("lbt-{id}-")).len(), 3);
    drop(bed);
    assert!(netns::list(&format!("lbt-{id}-")).is_empty());
    assert!(!directory.exists());
    assert!(!sleeper.wait()?.success(), "a process left in a namespace is killed with it");
    Ok(())
}

#[test]
fn the_tagger_tags_what_the_peer_receives() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    let _line = LineWorker::start(&bed.ingress, "ingress", 9000)?;
    let address = SocketAddr::from((INGRESS_V4, 9000));
    let answers = || {
        let connect = move || TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_ok();
        bed.client.enter(connect)
    };
    assert!(answers()?);
    let tagger = program::attach_tagger(&bed.client, "eth0", 7)?;
    // The ingress host has no VLAN 7, so its kernel drops the frames.
    assert!(!answers()?);
    drop(tagger);
    // The kernel takes the program off when nothing runs it any more.
    wait::until("frames are as they were", Duration::from_secs(5), || answers().is_ok_and(|all| all))?;
    Ok(())
}
