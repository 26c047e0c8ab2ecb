//! UDP: a worker that answers each datagram with its name, and flows that keep
//! their source port so that a move to another worker shows.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Socket, Type};

use crate::{netns::Namespace, wait};

const STEP: Duration = Duration::from_millis(50);

/// A worker's echo service. Dropping it closes its ports.
#[derive(Debug)]
pub struct EchoWorker {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl EchoWorker {
    /// Starts the service `name` on `port` of each of `addresses`. They are bound
    /// one by one, so that answers leave from the address that was asked, and may
    /// be VIPs that the host gets later.
    pub fn start(namespace: &Namespace, name: &str, addresses: &[IpAddr], port: u16) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut worker = Self { stop: stop.clone(), threads: Vec::new() };
        for &address in addresses {
            let socket = namespace
                .enter(move || bind(SocketAddr::new(address, port)))?
                .with_context(|| format!("cannot bind UDP {address} port {port}"))?;
            let (name, stop) = (name.to_owned(), stop.clone());
            worker.threads.push(std::thread::spawn(move || answer(&socket, &name, &stop)));
        }
        Ok(worker)
    }
}

impl Drop for EchoWorker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.bind(&address.into())?;
    let socket: UdpSocket = socket.into();
    socket.set_read_timeout(Some(STEP))?;
    Ok(socket)
}

fn answer(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = [0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        // Errors are time-outs or ICMP answers to an earlier reply.
        let Ok((count, from)) = socket.recv_from(&mut buffer) else { continue };
        let mut reply = format!("{name} ").into_bytes();
        reply.extend_from_slice(&buffer[..count]);
        let _ = socket.send_to(&reply, from);
    }
}

/// Flows from fixed source ports.
#[derive(Debug)]
pub struct Flows {
    sockets: Vec<UdpSocket>,
    sent: u64,
}

impl Flows {
    /// `count` flows to `target`.
    pub fn open(namespace: &Namespace, target: SocketAddr, count: usize) -> Result<Self> {
        let sockets = namespace.enter(move || {
            (0..count)
                .map(|_| {
                    let any: SocketAddr =
                        if target.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
                    let socket = UdpSocket::bind(any)?;
                    socket.connect(target)?;
                    socket.set_read_timeout(Some(wait::patience(Duration::from_secs(2))))?;
                    Ok(socket)
                })
                .collect::<io::Result<Vec<_>>>()
        })?;
        Ok(Self { sockets: sockets.context("cannot open UDP sockets")?, sent: 0 })
    }

    /// Each flow's source.
    pub fn sources(&self) -> Result<Vec<SocketAddr>> {
        self.sockets
            .iter()
            .map(|socket| socket.local_addr().context("a bound socket has an address"))
            .collect()
    }

    /// Sends one datagram on each flow and says who answered it: None for a
    /// datagram (or its answer) that was lost.
    pub fn exchange(&mut self) -> Result<Vec<Option<String>>> {
        self.exchange_sized(0)
    }

    /// Sends a datagram of at least `size` bytes on each flow without waiting for answers. What was sent.
    pub fn send_sized(&mut self, size: usize) -> Result<String> {
        self.sent += 1;
        let message = format!("{:0size$}", self.sent);
        for socket in &self.sockets {
            // A pending ICMP error of an earlier round shows up here once.
            if socket.send(message.as_bytes()).is_err() {
                socket.send(message.as_bytes()).context("cannot send a datagram")?;
            }
        }
        Ok(message)
    }

    /// [`Self::exchange`] with datagrams of at least `size` bytes.
    pub fn exchange_sized(&mut self, size: usize) -> Result<Vec<Option<String>>> {
        let message = self.send_sized(size)?;
        let mut answers = Vec::with_capacity(self.sockets.len());
        for socket in &self.sockets {
            answers.push(receive(socket, &message)?);
        }
        Ok(answers)
    }
}

fn receive(socket: &UdpSocket, expected: &str) -> Result<Option<String>> {
    let mut buffer = [0; 65_536];
    loop {
        let count = match socket.recv(&mut buffer) {
            Ok(count) => count,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionRefused) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(anyhow!(error).context("cannot receive a datagram")),
        };
        let text = String::from_utf8_lossy(&buffer[..count]);
        // Late answers to earlier rounds are passed over.
        if let Some((worker, echoed)) = text.split_once(' ')
            && echoed == expected
        {
            return Ok(Some(worker.to_owned()));
        }
    }
}
