//! The load: as much as goes (wrk, iperf3), and at a fixed rate to see how long requests take.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use test_support::{iperf, netns::Namespace};

/// No request may take longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that wrk keeps busy.
const CONNECTIONS: &str = "64";
/// Threads that share a fixed rate.
const THREADS: u32 = 8;

/// Requests per second that wrk gets through; `close` opens a connection for each.
pub fn saturate(client: &Namespace, target: SocketAddr, duration: Duration, close: bool) -> Result<f64> {
    let seconds = format!("{}s", duration.as_secs().max(1));
    let mut arguments = vec!["-t", "2", "-c", CONNECTIONS, "-d", &seconds];
    if close {
        arguments.extend(["-H", "Connection: close"]);
    }
    let url = format!("http://{target}/");
    arguments.push(&url);
    let said = client.run("wrk", &arguments)?;
    parse_wrk(&said).with_context(|| format!("wrk said: {said}"))
}

fn parse_wrk(said: &str) -> Result<f64> {
    let field = |name: &str| said.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    if let Some(bad) = field("Non-2xx or 3xx responses:") {
        bail!("{bad} answers were no success");
    }
    let rate: f64 = field("Requests/sec:").context("no rate")?.parse().context("its rate")?;
    let requests: f64 = said
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))
        .and_then(|(count, _)| count.parse().ok())
        .context("no count")?;
    if let Some(errors) = field("Socket errors:") {
        let count: f64 =
            errors.split(',').filter_map(|part| part.trim().rsplit_once(' ')?.1.parse::<f64>().ok()).sum();
        ensure!(count <= requests / 1_000.0, "{errors} in {requests} requests");
    }
    Ok(rate)
}

/// Bits per second of one upload.
pub fn bulk(client: &Namespace, target: SocketAddr, duration: Duration) -> Result<f64> {
    let seconds = u32::try_from(duration.as_secs().max(1)).context("a sane duration")?;
    Ok(iperf::start(client, target.ip(), target.port(), seconds, 0)?.finish()?.bits_per_second)
}

/// What a fixed rate gave.
#[derive(Clone, Debug, Default)]
pub struct Timed {
    /// Microseconds that requests took, in order of size.
    pub took_us: Vec<f64>,
    /// Requests that failed.
    pub failed: usize,
    /// Processor time of the threads that made them.
    pub processor: Duration,
}

impl Timed {
    /// The time at `share` (0 to 1) of their order.
    pub fn quantile(&self, share: f64) -> f64 {
        let last = self.took_us.len().saturating_sub(1);
        self.took_us.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
    }
}

/// `rate` requests a second for `duration`, each at its time: one that had to wait for its
/// predecessor counts from when it was due, so that a slow balancer cannot slow its own load down.
pub fn at_rate(
    client: &Namespace,
    target: SocketAddr,
    duration: Duration,
    rate: u32,
    close: bool,
) -> Result<Timed> {
    let per_thread = Duration::from_secs(1) * THREADS / rate;
    let begin = Instant::now() + Duration::from_millis(5);
    let threads = (0..THREADS)
        .map(|number| {
            let first = begin + per_thread * number / THREADS;
            client.spawn(move || paced(target, first, per_thread, begin + duration, close))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut all = Timed::default();
    for handle in threads {
        let timed = handle.join().map_err(|_| anyhow!("a load thread panicked"))?;
        all.took_us.extend(timed.took_us);
        all.failed += timed.failed;
        all.processor += timed.processor;
    }
    all.took_us.sort_by(f64::total_cmp);
    Ok(all)
}

fn paced(target: SocketAddr, first: Instant, step: Duration, end: Instant, close: bool) -> Timed {
    // Wake-ups to the microsecond; without it they come 50 µs late.
    // SAFETY: sets a value of this thread only.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000) };
    let mut timed = Timed::default();
    let mut kept = None;
    let mut due = first;
    while due < end {
        let slack = due.saturating_duration_since(Instant::now());
        let begin = if slack.is_zero() {
            due
        } else {
            thread::sleep(slack);
            Instant::now()
        };
        let answer = if close { request(target).map(drop) } else { keep(&mut kept, target) };
        match answer {
            Ok(()) => timed.took_us.push(begin.elapsed().as_secs_f64() * 1e6),
            Err(_) => {
                timed.failed += 1;
                kept = None;
            }
        }
        due += step;
    }
    timed.processor = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default();
    timed
}

fn connect(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request on a connection of its own; returns the whole answer.
pub fn request(target: SocketAddr) -> Result<String> {
    let mut stream = connect(target)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "answer {answer:?}");
    Ok(answer)
}

/// One request on a kept connection.
fn keep(kept: &mut Option<TcpStream>, target: SocketAddr) -> Result<()> {
    let stream = match kept {
        Some(stream) => stream,
        None => kept.insert(connect(target)?),
    };
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
    let mut answer = [0; 1_024];
    let mut len = 0;
    // The answer is small and of known shape: a head, and a name with its line feed.
    while !answer[..len].windows(4).any(|end| end == b"\r\n\r\n") || answer[len - 1] != b'\n' || {
        answer[..len].ends_with(b"\r\n\r\n")
    } {
        let read = stream.read(&mut answer[len..])?;
        ensure!(read > 0, "closed");
        len += read;
    }
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "no success");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "Running 1s test @ http://10.99.0.1:80/\n  2 threads and 64 connections\n  \
        9000 requests in 1.00s, 1.50MB read\n";

    #[test]
    fn wrk_output_is_read() {
        let rate = parse_wrk(&format!("{SAID}Requests/sec:   8950.50\n"));
        assert_eq!(rate.unwrap(), 8950.5);
    }

    #[test]
    fn wrk_errors_are_errors() {
        let few =
            format!("{SAID}  Socket errors: connect 0, read 9, write 0, timeout 0\nRequests/sec: 1.0\n");
        assert!(parse_wrk(&few).is_ok());
        let many = few.replace("timeout 0", "timeout 1");
        assert!(parse_wrk(&many).is_err());
        assert!(parse_wrk(&format!("{SAID}  Non-2xx or 3xx responses: 3\nRequests/sec: 1.0\n")).is_err());
        assert!(parse_wrk(SAID).is_err());
    }

    #[test]
    fn quantiles_are_taken_in_order() {
        let timed =
            Timed { took_us: (0..=100).map(f64::from).collect(), failed: 0, processor: Duration::ZERO };
        assert_eq!((timed.quantile(0.5), timed.quantile(0.99), timed.quantile(1.0)), (50.0, 99.0, 100.0));
        assert!(Timed::default().quantile(0.5).is_nan());
    }
}
