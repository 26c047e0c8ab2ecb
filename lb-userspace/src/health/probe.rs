//! One probe: a TCP connection, or an HTTP/1.1 GET.

use crate::model::{Backend, HealthKind, Ports, Service};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout_at},
};

/// What is probed and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeTarget {
    /// Worker's address and the port of the check.
    pub address: SocketAddr,
    /// The service's VIP: the `Host` of an HTTP check that names none.
    pub vip: IpAddr,
    /// What is asked.
    pub kind: HealthKind,
    /// Limit of the whole probe.
    pub timeout: Duration,
}

impl ProbeTarget {
    /// What a service asks of one of its backends.
    pub fn of(service: &Service, backend: &Backend) -> Self {
        let own = if let Ports::One(port) = service.port { port } else { 0 };
        let port = service.health.port.unwrap_or(own);
        Self {
            address: SocketAddr::new(backend.address, port),
            vip: service.vip,
            kind: service.health.kind.clone(),
            timeout: Duration::from_millis(service.health.timeout_ms.into()),
        }
    }
}

/// Bytes of a response's body that are read before the connection is closed.
const BODY_LIMIT: usize = 64 * 1024;

/// Probes once. `Ok` and `Err` both say in words what was seen.
///
/// # Errors
/// Whatever makes the backend count as failed.
pub async fn probe(target: ProbeTarget) -> Result<String, String> {
    let deadline = Instant::now() + target.timeout;
    let within = target.timeout.as_millis();
    if target.kind == HealthKind::None {
        return Ok("not checked".to_owned());
    }
    let stream = match timeout_at(deadline, connect(target.address)).await {
        Err(_) => return Err(format!("no connection within {within} ms")),
        Ok(Err(e)) => return Err(connect_error(&e)),
        Ok(Ok(stream)) => stream,
    };
    match &target.kind {
        HealthKind::None => Ok("not checked".to_owned()),
        HealthKind::Tcp => {
            // A reset instead of a goodbye: thousands of probes a second must not leave sockets in TIME_WAIT.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            Ok("connected".to_owned())
        }
        HealthKind::Http { path, host, status } => {
            let host = host.clone().unwrap_or_else(|| match target.vip {
                IpAddr::V4(v4) => v4.to_string(),
                IpAddr::V6(v6) => format!("[{v6}]"),
            });
            match timeout_at(deadline, get(stream, path, &host, *status, deadline)).await {
                Err(_) => Err(format!("no answer within {within} ms")),
                Ok(result) => result,
            }
        }
    }
}

async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
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

async fn get(
    stream: TcpStream,
    path: &str,
    host: &str,
    status: (u16, u16),
    deadline: Instant,
) -> Result<String, String> {
    let broken = |e: hyper::Error| {
        if e.is_parse() { "the answer is not HTTP".to_owned() } else { format!("connection broke: {e}") }
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let request = Request::get(path)
        .header("host", host)
        .header("user-agent", concat!("lbd/", env!("CARGO_PKG_VERSION")))
        .header("connection", "close")
        .body(Empty::<bytes::Bytes>::new())
        .map_err(|e| format!("cannot ask: {e}"))?;
    // The connection only moves while it is polled: beside the request, in this task.
    let ask = async {
        let mut response = sender.send_request(request).await.map_err(broken)?;
        let code = response.status().as_u16();
        let mut read = 0;
        while read < BODY_LIMIT
            && let Ok(Some(Ok(frame))) = timeout_at(deadline, response.body_mut().frame()).await
        {
            read += frame.data_ref().map_or(0, bytes::Bytes::len);
        }
        if (status.0..=status.1).contains(&code) {
            Ok(format!("status {code}"))
        } else if status.0 == status.1 {
            Err(format!("status {code}, expected {}", status.0))
        } else {
            Err(format!("status {code}, expected {} to {}", status.0, status.1))
        }
    };
    let mut connection = std::pin::pin!(connection);
    let mut ask = std::pin::pin!(ask);
    tokio::select! {
        biased;
        result = &mut ask => result,
        _ = &mut connection => ask.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    fn target(address: SocketAddr, kind: HealthKind) -> ProbeTarget {
        ProbeTarget { address, vip: [10, 0, 0, 1].into(), kind, timeout: Duration::from_millis(300) }
    }

    fn http(status: (u16, u16)) -> HealthKind {
        HealthKind::Http { path: "/ok?x=1".into(), host: None, status }
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
