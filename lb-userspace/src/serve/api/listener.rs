//! The Unix socket: binds it with its permissions, and limits the number of connections.

use super::{Peer, peer::Writers};
use axum::serve::Listener;
use nix::{errno::Errno, sys::stat::Mode, unistd};
use std::{
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// Concurrent connections. `lbctl` opens one per command; further connections wait.
const CONNECTIONS: usize = 256;

/// Why the socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another lbd answers on the socket.
    #[error("{path} is served by another lbd: stop that one, or start this one with another --socket")]
    InUse {
        /// Socket.
        path: String,
    },
    /// The path is something else than a socket.
    #[error("{path} exists and is not a socket: remove it, or choose another --socket")]
    NoSocket {
        /// Path.
        path: String,
    },
    /// The group does not exist.
    #[error("socket_group {group:?} does not exist: create it with `groupadd {group}`, or choose another")]
    NoGroup {
        /// Group.
        group: String,
    },
    /// A system call failed.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// Operation that failed.
        doing: &'static str,
        /// Path of the socket.
        path: String,
        /// Error of the operating system.
        #[source]
        source: io::Error,
    },
}

/// Binds the API's socket. A stale socket of a stopped daemon is replaced; a live one is not.
/// Also returns who may write: root and the group.
///
/// # Errors
/// See [`SocketError`].
pub fn bind(path: &Path, mode: u32, group: Option<&str>) -> Result<(UnixListener, Writers), SocketError> {
    let name = || path.display().to_string();
    let failed = |doing| move |source| SocketError::Io { doing, path: name(), source };
    let gid = match group {
        None => None,
        Some(group) => match unistd::Group::from_name(group) {
            Ok(Some(found)) => Some(found.gid),
            _ => return Err(SocketError::NoGroup { group: group.to_owned() }),
        },
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed("create the directory of"))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NoSocket { path: name() }),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(SocketError::InUse { path: name() });
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed("replace"))?,
        Err(_) => {}
    }
    // No other user can connect before the permissions below are set.
    let before = nix::sys::stat::umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    let listener = listener.map_err(failed("listen on"))?;
    if let Some(gid) = gid {
        let errno = |e: Errno| SocketError::Io { doing: "give the group", path: name(), source: e.into() };
        unistd::chown(path, None, Some(gid)).map_err(errno)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(failed("set permissions of"))?;
    let writers = Writers { group: gid.map(unistd::Gid::as_raw), user: unistd::geteuid().as_raw() };
    Ok((listener, writers))
}

/// A listener that admits at most [`CONNECTIONS`] concurrent connections.
pub struct Limited {
    listener: UnixListener,
    permits: Arc<Semaphore>,
    writers: Writers,
}

impl Limited {
    /// Wraps a bound socket.
    pub fn new(listener: UnixListener, writers: Writers) -> Self {
        Self { listener, permits: Arc::new(Semaphore::new(CONNECTIONS)), writers }
    }
}

/// A connection with its peer and its permit, one of [`CONNECTIONS`].
pub struct Connection {
    stream: UnixStream,
    peer: Peer,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// The other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Listener for Limited {
    type Io = Connection;
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        let permit = self.permits.clone().acquire_owned().await.ok();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let peer = Peer::of(&stream, &self.writers);
                    return (Connection { stream, peer, _permit: permit }, ());
                }
                Err(error) => {
                    // Most likely out of file descriptors: wait until other connections close.
                    tracing::error!(%error, "cannot accept on the API socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
