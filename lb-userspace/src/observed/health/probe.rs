//! One probe: connects to a backend and runs the check over the connection.

use super::{
    HealthRegistry, Obstacle, ObstacleKind, Outcome, ProbeError, ProbeStep, grpc, http,
    tls::TlsConfigs,
    tunnel::{Through, Tunnel},
};
use crate::{
    desired::model::{Backend, HealthKind, Ports, Service, TlsCheck},
    observed::{health::Prober, http::authority},
};
use futures_util::future::BoxFuture;
use socket2::{Domain, SockRef, Socket, Type};
use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

/// Target and kind of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeTarget {
    /// The worker's address and the port of the check.
    pub address: SocketAddr,
    /// The service's VIP: the `Host` of an HTTP check that names none.
    pub vip: IpAddr,
    /// Kind of check.
    pub kind: HealthKind,
    /// Time limit of the whole probe.
    pub timeout: Duration,
    /// Tunnel of the probe; None if the probe goes directly.
    pub through: Option<Through>,
}

impl ProbeTarget {
    /// The probe of a backend, by the settings of its service.
    pub fn of(service: &Service, backend: &Backend) -> Self {
        let own = if let Ports::One(port) = service.port { port } else { 0 };
        let port = service.health.port.or(backend.port).unwrap_or(own);
        Self {
            address: SocketAddr::new(backend.address, port),
            vip: service.vip,
            kind: service.health.kind.clone(),
            timeout: Duration::from_millis(service.health.timeout_ms.into()),
            through: Through::of(service, backend.address),
        }
    }
}

/// Creates a prober that probes over the network, without tunnels. Caches TLS configurations.
pub fn prober() -> Prober {
    prober_through(None)
}

/// Creates a prober that probes over the network, through `tunnel` where a service wants it; `registry` learns if it cannot.
pub fn prober_through(tunnel: Option<(Arc<Tunnel>, Arc<HealthRegistry>)>) -> Prober {
    let configs = Arc::new(TlsConfigs::default());
    Arc::new(move |mut target| {
        let (configs, tunnel) = (configs.clone(), tunnel.clone());
        Box::pin(async move {
            let Some(through) = target.through else { return probe(configs, target, None).await };
            let mark = match &tunnel {
                Some((tunnel, _)) => tunnel.prepare(target.address.ip(), through).await,
                None => Err("this lbd cannot probe through tunnels".to_owned()),
            };
            match mark {
                Ok(mark) => probe(configs, target, Some(mark)).await.with(", through the tunnel"),
                Err(why) => {
                    // Without tunnels, probe directly: otherwise every backend would count as dead.
                    target.through = None;
                    if let Some((tunnel, registry)) = &tunnel {
                        registry.set_tunnel_problem(tunnel.problem());
                    }
                    let found = probe(configs, target, None).await;
                    found.with(&format!(", probed without the tunnel: {why}"))
                }
            }
        })
    })
}

/// Probes once; packets carry `mark`. Without a connection in time the probe has failed; with one, and without an answer,
/// it is late.
pub async fn probe(configs: Arc<TlsConfigs>, target: ProbeTarget, mark: Option<u32>) -> ProbeStep {
    let deadline = Instant::now() + target.timeout;
    let within = target.timeout.as_millis();
    if target.kind.is_none() {
        return Outcome::Passed("not checked".to_owned()).into();
    }
    // A probe that only connects does not need TCP_NODELAY.
    let only_connects = target.kind == HealthKind::Tcp;
    let stream = match timeout_at(deadline, connect(target.address, mark, only_connects)).await {
        Err(_) => return Outcome::Failed(format!("no connection within {within} ms")).into(),
        Ok(Err(error)) => return ProbeStep::Done(Err(error).into()),
        Ok(Ok(stream)) => stream,
    };
    let mut check: BoxFuture<'static, Outcome> =
        Box::pin(async move { run_check(&configs, stream, &target, deadline).await.into() });
    match timeout_at(deadline, &mut check).await {
        Err(_) => ProbeStep::Late(check),
        Ok(outcome) => outcome.into(),
    }
}

async fn run_check(
    configs: &TlsConfigs,
    stream: TcpStream,
    target: &ProbeTarget,
    deadline: Instant,
) -> Result<String, ProbeError> {
    // Close with a reset where lbd closes first: thousands of probes a second must not leave sockets in TIME_WAIT.
    if !matches!(target.kind, HealthKind::Http(_)) {
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
    let name = |tls: &TlsCheck, host: Option<&String>| {
        tls.sni.clone().or_else(|| host.cloned()).unwrap_or_else(|| target.vip.to_string())
    };
    match &target.kind {
        HealthKind::Unset | HealthKind::None => Ok("not checked".to_owned()),
        HealthKind::Tcp => Ok("connected".to_owned()),
        HealthKind::Tls(tls) => {
            let stream = configs.connect(tls, &[], &name(tls, None), stream).await?;
            let version = stream.get_ref().1.protocol_version().and_then(|v| v.as_str().map(str::to_owned));
            Ok(format!("{} handshake done", version.unwrap_or_else(|| "TLS".to_owned())))
        }
        HealthKind::Http(check) => {
            let host = check.host.clone().unwrap_or_else(|| authority(target.vip));
            match &check.tls {
                None => http::check(stream, check, &host, (deadline, target.timeout)).await,
                Some(tls) => {
                    let name = name(tls, check.host.as_ref());
                    let stream = configs.connect(tls, &[b"http/1.1"], &name, stream).await?;
                    http::check(stream, check, &host, (deadline, target.timeout)).await
                }
            }
        }
        HealthKind::Grpc(check) => {
            let host = check.host.clone().unwrap_or_else(|| authority(target.vip));
            match &check.tls {
                None => grpc::check(stream, &check.service, &host, "http").await,
                Some(tls) => {
                    let name = name(tls, check.host.as_ref());
                    let stream = configs.connect(tls, &[b"h2"], &name, stream).await?;
                    grpc::check(stream, &check.service, &host, "https").await
                }
            }
        }
    }
}

/// Connects. An error that `connect` itself returns is from before the first packet: then two errors mean that this
/// host has no route. The same errors later are an answer: ICMP, or the next hop's silence.
async fn connect(
    address: SocketAddr,
    mark: Option<u32>,
    only_connects: bool,
) -> Result<TcpStream, ProbeError> {
    let ours = |error: io::Error| connect_error(&error);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)
        .map_err(ours)?;
    if let Some(mark) = mark {
        socket.set_mark(mark).map_err(ours)?;
        // Bind a unique source port: answers all come from the VIP and are distinguished by it.
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        socket.bind(&SocketAddr::new(any, 0).into()).map_err(ours)?;
    }
    if let Err(error) = socket.connect(&address.into())
        && error.raw_os_error() != Some(libc::EINPROGRESS)
    {
        return Err(immediate_error(&error));
    }
    let stream = TcpStream::from_std(socket.into()).map_err(ours)?;
    stream.writable().await.map_err(ours)?;
    if let Some(error) = stream.take_error().map_err(ours)? {
        return Err(connect_error(&error));
    }
    if !only_connects {
        stream.set_nodelay(true).map_err(ours)?;
    }
    Ok(stream)
}

/// Sorts an error that `connect` returned before it sent a packet. A route of type blackhole gives `EINVAL`.
fn immediate_error(error: &io::Error) -> ProbeError {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL) => {
            let what = format!("no route to the backend: {error}");
            ProbeError::NotProbed(Obstacle { kind: ObstacleKind::NoRoute, what })
        }
        _ => connect_error(error),
    }
}

fn connect_error(error: &io::Error) -> ProbeError {
    match error.kind() {
        ErrorKind::ConnectionRefused => ProbeError::Failed("connection refused".to_owned()),
        ErrorKind::HostUnreachable => ProbeError::Failed("host unreachable".to_owned()),
        ErrorKind::NetworkUnreachable => ProbeError::Failed("network unreachable".to_owned()),
        _ => match ProbeError::sort(error) {
            ProbeError::Failed(what) => ProbeError::Failed(format!("cannot connect: {what}")),
            ours => ours,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::model::HttpCheck;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    async fn probe(target: ProbeTarget) -> Result<String, String> {
        match super::probe(Arc::default(), target, None).await {
            ProbeStep::Done(Outcome::Passed(what)) => Ok(what),
            ProbeStep::Done(Outcome::Failed(what)) => Err(what),
            ProbeStep::Done(Outcome::NotProbed(obstacle)) => panic!("not probed: {obstacle:?}"),
            ProbeStep::Late(_) => Err("late".to_owned()),
        }
    }

    fn target(address: SocketAddr, kind: HealthKind) -> ProbeTarget {
        ProbeTarget {
            address,
            vip: [10, 0, 0, 1].into(),
            kind,
            timeout: Duration::from_millis(300),
            through: None,
        }
    }

    fn http(status: (u16, u16)) -> HealthKind {
        HealthKind::Http(HttpCheck { path: "/ok?x=1".into(), status, ..HttpCheck::default() })
    }

    /// Answers one connection with these bytes after reading a request, and gives back what it read.
    async fn answering(answer: &'static [u8]) -> (SocketAddr, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let n = stream.read(&mut request).await.unwrap_or(0);
            let _ = stream.write_all(answer).await;
            String::from_utf8_lossy(&request[..n]).into_owned()
        });
        (address, task)
    }

    #[tokio::test]
    async fn http_statuses_are_judged() {
        let cases: [(&[u8], (u16, u16), Result<&str, &str>); 7] = [
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", (200, 299), Ok("status 200")),
            (b"HTTP/1.1 204 No Content\r\n\r\n", (200, 299), Ok("status 204")),
            (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", (200, 299), Ok("status 200")),
            (
                b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n",
                (200, 299),
                Err("status 503, expected 200 to 299"),
            ),
            (b"HTTP/1.1 301 Moved\r\ncontent-length: 0\r\n\r\n", (200, 200), Err("status 301, expected 200")),
            (b"SSH-2.0-OpenSSH_9.2\r\n", (200, 299), Err("the answer is not HTTP")),
            (b"", (200, 299), Err("connection broke: ")),
        ];
        for (answer, status, expected) in cases {
            let (address, task) = answering(answer).await;
            let result = probe(target(address, http(status))).await;
            match (&result, expected) {
                (Ok(got), Ok(want)) => assert_eq!(got, want),
                (Err(got), Err(want)) => assert!(got.starts_with(want), "{got} is not {want}"),
                _ => panic!("{result:?} is not {expected:?}"),
            }
            let request = task.await.unwrap();
            assert!(request.starts_with("GET /ok?x=1 HTTP/1.1\r\n"), "{request}");
            assert!(request.contains("host: 10.0.0.1\r\n"), "{request}");
        }
    }

    #[tokio::test]
    async fn tcp_connects_or_says_why_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(probe(target(address, HealthKind::Tcp)).await, Ok("connected".into()));
        drop(listener);
        assert_eq!(probe(target(address, HealthKind::Tcp)).await, Err("connection refused".into()));
    }

    #[tokio::test]
    async fn silence_after_the_connection_is_late() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let start = std::time::Instant::now();
        assert_eq!(probe(target(address, http((200, 299)))).await, Err("late".into()));
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[tokio::test]
    async fn what_this_host_lacks_is_no_failure() {
        let probed = |address: &str| {
            let target = target(address.parse().unwrap(), HealthKind::Tcp);
            async move { done(super::probe(Arc::default(), target, None).await) }
        };
        // A multicast address cannot be connected to; `connect` says so before it sends a packet.
        let outcome = probed("224.0.0.1:80").await;
        assert!(matches!(&outcome, Outcome::NotProbed(o) if o.kind == ObstacleKind::NoRoute), "{outcome:?}");
        // A broadcast address without SO_BROADCAST: EACCES.
        let outcome = probed("255.255.255.255:80").await;
        assert!(matches!(outcome, Outcome::NotProbed(_)), "{outcome:?}");
        let kind = HealthKind::Tls(TlsCheck { ca: Some("/nowhere.pem".into()), ..TlsCheck::default() });
        let target = target(silent().await, kind);
        let outcome = done(super::probe(Arc::default(), target, None).await);
        assert!(matches!(&outcome, Outcome::NotProbed(o) if o.kind == ObstacleKind::Settings), "{outcome:?}");
    }

    fn done(step: ProbeStep) -> Outcome {
        match step {
            ProbeStep::Done(outcome) => outcome,
            ProbeStep::Late(_) => panic!("the probe is late"),
        }
    }

    #[tokio::test]
    async fn a_late_answer_is_judged_as_one_in_time() {
        for (answer, expected) in [
            (&b"HTTP/1.1 200 OK\r\n\r\nready"[..], Outcome::Passed("status 200".into())),
            (
                b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n",
                Outcome::Failed("status 503, expected 200 to 299".into()),
            ),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::time::sleep(Duration::from_millis(700)).await;
                let _ = stream.write_all(answer).await;
            });
            let check = HttpCheck { body: Some("ready".into()), ..HttpCheck::default() };
            let target = target(address, HealthKind::Http(check));
            let ProbeStep::Late(rest) = super::probe(Arc::default(), target, None).await else {
                panic!("not late");
            };
            assert_eq!(rest.await, expected);
        }
    }

    /// A listener that never answers.
    async fn silent() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        std::mem::forget(listener);
        address
    }
}
