//! TCP connections that check what they carry: a worker that says its name and then sends back whatever it gets, and
//! a client that compares.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::{netns::Namespace, wait};

const PATIENCE: Duration = Duration::from_secs(10);

/// Starts the service `name` on `port` of every address of its host. It serves until the program ends.
pub fn serve(namespace: &Namespace, name: &str, port: u16) -> Result<()> {
    let listener =
        namespace.enter(move || listen(port))?.with_context(|| format!("cannot listen on {port}"))?;
    let name = name.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let name = name.clone();
            // A connection that breaks is the client's to report.
            thread::spawn(move || drop(answer(stream, &name)));
        }
    });
    Ok(())
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    writeln!(stream, "{name}")?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count])?,
        }
    }
}

/// An open connection.
#[derive(Debug)]
pub struct Mirrored {
    stream: BufReader<TcpStream>,
    target: SocketAddr,
    /// Who took it.
    pub worker: String,
    sent: u32,
}

impl Mirrored {
    /// Connects and hears who answers.
    pub fn open(namespace: &Namespace, target: SocketAddr) -> Result<Self> {
        let patience = wait::patience(PATIENCE);
        let connect = move || TcpStream::connect_timeout(&target, patience);
        let stream = namespace.enter(connect)?.with_context(|| format!("cannot connect to {target}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let mut stream = BufReader::new(stream);
        let mut worker = String::new();
        stream.read_line(&mut worker).with_context(|| format!("no name from {target}"))?;
        ensure!(worker.ends_with('\n'), "{target} closed the connection before it said its name");
        Ok(Self { stream, target, worker: worker.trim_end().to_owned(), sent: 0 })
    }

    /// Sends `count` bytes, and fails unless the very same come back.
    pub fn exchange(&mut self, count: usize) -> Result<()> {
        self.sent += 1;
        let data = content(self.sent, count);
        let mut writer = self.stream.get_ref().try_clone()?;
        let (sent, back) = thread::scope(|scope| {
            let sending = scope.spawn(|| writer.write_all(&data));
            let mut back = vec![0; count];
            let read = self.stream.read_exact(&mut back).map(|()| back);
            (sending.join().expect("writing does not panic"), read)
        });
        let (target, worker) = (self.target, &self.worker);
        sent.with_context(|| format!("{worker} behind {target} does not take {count} bytes"))?;
        let back =
            back.with_context(|| format!("{worker} behind {target} does not send {count} bytes back"))?;
        ensure!(back == data, "{worker} behind {target} sent back something else");
        Ok(())
    }
}

/// Bytes in which no two places are alike for long.
fn content(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut data = Vec::with_capacity(count + 4);
    while data.len() < count {
        // xorshift32
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(count);
    data
}
