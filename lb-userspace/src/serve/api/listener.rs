//! The Unix socket: binds it with its permissions, and tells who connects.

use super::peer::Writers;
use crate::serve::connections::{Accepted, Door, Limits};
use nix::{errno::Errno, sys::stat::Mode, unistd};
use std::{
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
    time::Duration,
};
use tokio::net::{UnixListener, UnixStream};

/// `lbctl` opens one connection per command. Root, and the user of lbd, can always get in.
pub const LIMITS: Limits = Limits { all: 256, reserved: 64, per_client: 64, idle: Duration::from_secs(60) };

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

/// The API's socket, whose clients are users.
pub struct ApiSocket {
    /// The socket.
    pub listener: UnixListener,
    /// Who may write.
    pub writers: Writers,
}

impl Door for ApiSocket {
    type Stream = UnixStream;
    type Client = u32;

    async fn accept(&self) -> io::Result<Accepted<UnixStream, u32>> {
        let (stream, _) = self.listener.accept().await?;
        let uid = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
        Ok(Accepted { stream, client: uid, is_privileged: uid == 0 || uid == self.writers.user })
    }
}
