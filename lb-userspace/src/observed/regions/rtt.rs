//! Round-trip times to regions: measures TCP handshakes with a few of their backends. The worker's kernel answers them,
//! so a busy worker does not look farther away.
//!
//! Input: addresses to measure, by region. Output: microseconds by region, which change only when they differ clearly, so
//! that noise causes no new decisions.

use crate::desired::model::Name;
use futures_util::future::BoxFuture;
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{net::TcpStream, sync::watch, time::timeout};

/// Interval between two measurements of a region.
const INTERVAL: Duration = Duration::from_secs(5);
/// Interval while a region has no measurement yet.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit of a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(1);

/// Addresses to measure, by region.
pub type Targets = BTreeMap<Name, Vec<SocketAddr>>;
/// Round-trip times by region, in microseconds.
pub type Times = Arc<BTreeMap<Name, u32>>;

/// Measures one round trip to an address; None without an answer. [`handshake`] outside simulations.
pub type Meter = Arc<dyn Fn(SocketAddr) -> BoxFuture<'static, Option<Duration>> + Send + Sync>;

/// Measures TCP handshakes over the network.
pub fn handshake() -> Meter {
    Arc::new(|address| Box::pin(measure_rtt(address)))
}

/// Measures until the receivers of `times` or the sender of `targets` are gone.
pub async fn run(mut targets: watch::Receiver<Arc<Targets>>, times: watch::Sender<Times>, meter: Meter) {
    let mut smooth: BTreeMap<Name, f64> = BTreeMap::new();
    loop {
        let now = targets.borrow_and_update().clone();
        smooth.retain(|name, _| now.contains_key(name));
        for (name, addresses) in now.iter() {
            if let Some(sample) = shortest_rtt(addresses, &meter).await {
                let known = smooth.entry(name.clone()).or_insert(sample);
                *known += (sample - *known) / 4.0;
            }
        }
        times.send_if_modified(|published| {
            let next = without_noise(published, &smooth);
            let is_changed = **published != next;
            if is_changed {
                *published = Arc::new(next);
            }
            is_changed
        });
        let wait = if smooth.len() < now.len() { FIRST_INTERVAL } else { INTERVAL };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            changed = targets.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
        if times.is_closed() {
            return;
        }
    }
}

/// The shortest round-trip time to any of the addresses, in microseconds.
async fn shortest_rtt(addresses: &[SocketAddr], meter: &Meter) -> Option<f64> {
    let mut best: Option<f64> = None;
    for &address in addresses {
        if let Some(time) = meter(address).await {
            let micros = time.as_secs_f64() * 1e6;
            best = Some(best.map_or(micros, |b| b.min(micros)));
        }
    }
    best
}

/// Measures a handshake, or its refusal: both take one round trip.
async fn measure_rtt(address: SocketAddr) -> Option<Duration> {
    let began = Instant::now();
    match timeout(HANDSHAKE_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => {
            let took = began.elapsed();
            // Close with a reset, so that no socket stays in TIME_WAIT.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            Some(took)
        }
        Ok(Err(e)) if e.kind() == ErrorKind::ConnectionRefused => Some(began.elapsed()),
        Ok(Err(_)) | Err(_) => None,
    }
}

/// Keeps a published time until it is wrong by more than a quarter and more than half a millisecond.
fn without_noise(published: &BTreeMap<Name, u32>, smooth: &BTreeMap<Name, f64>) -> BTreeMap<Name, u32> {
    let one = |(name, &micros): (&Name, &f64)| {
        let now = micros.clamp(1.0, f64::from(u32::MAX)) as u32;
        let kept = published.get(name).copied().filter(|&was| was.abs_diff(now) <= (was / 4).max(500));
        (name.clone(), kept.unwrap_or(now))
    };
    smooth.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_not_published() {
        let name: Name = "eu".parse().unwrap();
        let published = BTreeMap::from([(name.clone(), 10_000)]);
        let after = |micros: f64| without_noise(&published, &BTreeMap::from([(name.clone(), micros)]))[&name];
        assert_eq!([after(8_000.0), after(12_400.0), after(13_000.0)], [10_000, 10_000, 13_000]);
        assert_eq!(
            without_noise(&published, &BTreeMap::new()),
            BTreeMap::new(),
            "regions without measurements are absent"
        );
        let near = BTreeMap::from([(name.clone(), 100)]);
        assert_eq!(without_noise(&near, &BTreeMap::from([(name.clone(), 550.0)]))[&name], 100);
    }

    #[tokio::test]
    async fn a_refusal_is_a_round_trip_too() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(measure_rtt(address).await.is_some());
        drop(listener);
        assert!(measure_rtt(address).await.is_some());
    }
}
