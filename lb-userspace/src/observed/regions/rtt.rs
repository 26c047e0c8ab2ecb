//! Round-trip times to regions: how long a TCP handshake with a few of their backends takes. The kernel does it on the
//! other side, so a busy worker looks no farther away.
//!
//! Input: whom to ask, by region. Output: microseconds by region, which change only when they differ clearly, so that
//! nothing is decided anew for noise.

use crate::desired::model::Name;
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{net::TcpStream, sync::watch, time::timeout};

/// How often each region is asked.
const EVERY: Duration = Duration::from_secs(5);
/// The first times are wanted soon.
const FIRST: Duration = Duration::from_secs(1);
/// Farther away than this is not measured.
const LIMIT: Duration = Duration::from_secs(1);

/// Whom to ask, by region.
pub type Targets = BTreeMap<Name, Vec<SocketAddr>>;
/// What is known, in microseconds.
pub type Times = Arc<BTreeMap<Name, u32>>;

/// Measures until nobody wants to know any more.
pub async fn run(mut targets: watch::Receiver<Arc<Targets>>, times: watch::Sender<Times>) {
    let mut smooth: BTreeMap<Name, f64> = BTreeMap::new();
    loop {
        let now = targets.borrow_and_update().clone();
        smooth.retain(|name, _| now.contains_key(name));
        for (name, addresses) in now.iter() {
            if let Some(sample) = nearest(addresses).await {
                let known = smooth.entry(name.clone()).or_insert(sample);
                *known += (sample - *known) / 4.0;
            }
        }
        times.send_if_modified(|told| {
            let next = settled(told, &smooth);
            let is_other = **told != next;
            if is_other {
                *told = Arc::new(next);
            }
            is_other
        });
        let wait = if smooth.len() < now.len() { FIRST } else { EVERY };
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

/// The shortest of their times.
async fn nearest(addresses: &[SocketAddr]) -> Option<f64> {
    let mut best: Option<f64> = None;
    for &address in addresses {
        if let Some(time) = round_trip(address).await {
            let micros = time.as_secs_f64() * 1e6;
            best = Some(best.map_or(micros, |b| b.min(micros)));
        }
    }
    best
}

/// A handshake, or its refusal: both take one round trip.
async fn round_trip(address: SocketAddr) -> Option<Duration> {
    let began = Instant::now();
    match timeout(LIMIT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => {
            let took = began.elapsed();
            // Nothing is left in TIME_WAIT.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            Some(took)
        }
        Ok(Err(e)) if e.kind() == ErrorKind::ConnectionRefused => Some(began.elapsed()),
        Ok(Err(_)) | Err(_) => None,
    }
}

/// What was told stays told until it is a quarter and half a millisecond wrong.
fn settled(told: &BTreeMap<Name, u32>, smooth: &BTreeMap<Name, f64>) -> BTreeMap<Name, u32> {
    let one = |(name, &micros): (&Name, &f64)| {
        let now = micros.clamp(1.0, f64::from(u32::MAX)) as u32;
        let kept = told.get(name).copied().filter(|&was| was.abs_diff(now) <= (was / 4).max(500));
        (name.clone(), kept.unwrap_or(now))
    };
    smooth.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_not_told() {
        let name: Name = "eu".parse().unwrap();
        let told = BTreeMap::from([(name.clone(), 10_000)]);
        let after = |micros: f64| settled(&told, &BTreeMap::from([(name.clone(), micros)]))[&name];
        assert_eq!([after(8_000.0), after(12_400.0), after(13_000.0)], [10_000, 10_000, 13_000]);
        assert_eq!(settled(&told, &BTreeMap::new()), BTreeMap::new(), "who is not asked is not known");
        let near = BTreeMap::from([(name.clone(), 100)]);
        assert_eq!(settled(&near, &BTreeMap::from([(name.clone(), 550.0)]))[&name], 100);
    }

    #[tokio::test]
    async fn a_refusal_is_a_round_trip_too() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(round_trip(address).await.is_some());
        drop(listener);
        assert!(round_trip(address).await.is_some());
    }
}
