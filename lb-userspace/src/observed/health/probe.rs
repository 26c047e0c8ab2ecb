//! One probe: connects to a backend and runs the check over the connection.

use super::{
    grpc, http,
    tls::TlsConfigs,
    tunnel::{Through, Tunnel},
};
use crate::{
    desired::model::{Backend, HealthKind, Ports, Service, TlsCheck},
    observed::{health::Prober, http::authority},
};
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpSocket, TcpStream},
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
            through: Through::of(service),
        }
    }
}

/// Creates a prober that probes over the network, without tunnels. Caches TLS configurations.
pub fn prober() -> Prober {
    prober_through(None)
}

/// Creates a prober that probes over the network, through `tunnel` where a service wants it.
pub fn prober_through(tunnel: Option<Arc<Tunnel>>) -> Prober {
    let configs = Arc::new(TlsConfigs::default());
    Arc::new(move |mut target| {
        let (configs, tunnel) = (configs.clone(), tunnel.clone());
        Box::pin(async move {
            let Some(through) = target.through else { return probe(&configs, target, None).await };
            let mark = match &tunnel {
                Some(tunnel) => tunnel.prepare(target.address.ip(), through).await,
                None => Err("this lbd cannot probe through tunnels".to_owned()),
            };
            match mark {
                Ok(mark) => {
                    let found = probe(&configs, target, Some(mark)).await;
                    found
                        .map(|what| format!("{what}, through the tunnel"))
                        .map_err(|what| format!("{what}, through the tunnel"))
                }
                Err(why) => {
                    // Without tunnels, probe directly: otherwise every backend would count as dead.
                    target.through = None;
                    let found = probe(&configs, target, None).await;
                    found.map(|what| format!("{what}, probed without the tunnel: {why}"))
                }
            }
        })
    })
}

/// Probes once; packets carry `mark`. `Ok` and `Err` both describe the result in words.
///
/// # Errors
/// Why the backend counts as failed.
pub async fn probe(configs: &TlsConfigs, target: ProbeTarget, mark: Option<u32>) -> Result<String, String> {
    let deadline = Instant::now() + target.timeout;
    let within = target.timeout.as_millis();
    if target.kind == HealthKind::None {
        return Ok("not checked".to_owned());
    }
    // A probe that only connects does not need TCP_NODELAY.
    let only_connects = target.kind == HealthKind::Tcp;
    let stream = match timeout_at(deadline, connect(target.address, mark, only_connects)).await {
        Err(_) => return Err(format!("no connection within {within} ms")),
        Ok(Err(e)) => return Err(connect_error(&e)),
        Ok(Ok(stream)) => stream,
    };
    match timeout_at(deadline, run_check(configs, stream, &target, deadline)).await {
        Err(_) => Err(format!("no answer within {within} ms")),
        Ok(result) => result,
    }
}

async fn run_check(
    configs: &TlsConfigs,
    stream: TcpStream,
    target: &ProbeTarget,
    deadline: Instant,
) -> Result<String, String> {
    // Close with a reset where lbd closes first: thousands of probes a second must not leave sockets in TIME_WAIT.
    if !matches!(target.kind, HealthKind::Http(_)) {
        let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
    let name = |tls: &TlsCheck, host: Option<&String>| {
        tls.sni.clone().or_else(|| host.cloned()).unwrap_or_else(|| target.vip.to_string())
    };
    match &target.kind {
        HealthKind::None => Ok("not checked".to_owned()),
        HealthKind::Tcp => Ok("connected".to_owned()),
        HealthKind::Tls(tls) => {
            let stream = configs.connect(tls, &[], &name(tls, None), stream).await?;
            let version = stream.get_ref().1.protocol_version().and_then(|v| v.as_str().map(str::to_owned));
            Ok(format!("{} handshake done", version.unwrap_or_else(|| "TLS".to_owned())))
        }
        HealthKind::Http(check) => {
            let host = check.host.clone().unwrap_or_else(|| authority(target.vip));
            match &check.tls {
                None => http::check(stream, check, &host, deadline).await,
                Some(tls) => {
                    let name = name(tls, check.host.as_ref());
                    let stream = configs.connect(tls, &[b"http/1.1"], &name, stream).await?;
                    http::check(stream, check, &host, deadline).await
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

async fn connect(address: SocketAddr, mark: Option<u32>, only_connects: bool) -> std::io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(mark) = mark {
        socket2::SockRef::from(&socket).set_mark(mark)?;
        // Bind a unique source port: answers all come from the VIP and are distinguished by it.
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        socket.bind(SocketAddr::new(any, 0))?;
    }
    let stream = socket.connect(address).await?;
    if !only_connects {
        stream.set_nodelay(true)?;
    }
    Ok(stream)
}

fn connect_error(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        ErrorKind::HostUnreachable => "host unreachable".to_owned(),
        ErrorKind::NetworkUnreachable => "network unreachable".to_owned(),
        _ => format!("cannot connect: {error}"),
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
        super::probe(&TlsConfigs::default(), target, None).await
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
    async fn silence_times_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let start = std::time::Instant::now();
        assert_eq!(probe(target(address, http((200, 299)))).await, Err("no answer within 300 ms".into()));
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}
