//! Connections to workers: one way to open them, which simulations replace.

use futures_util::future::BoxFuture;
use std::{io, net::SocketAddr, sync::Arc};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpSocket,
};

/// A connection to a worker.
pub trait WorkerStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> WorkerStream for T {}

/// Opens a connection to a worker's address. [`tcp`] outside simulations.
pub type Dial =
    Arc<dyn Fn(SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn WorkerStream>>> + Send + Sync>;

/// Connects over the network, without delay for small writes.
pub fn tcp() -> Dial {
    Arc::new(|address| {
        Box::pin(async move {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            let stream = socket.connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn WorkerStream>)
        })
    })
}
