//! Identifies the process at the other end of the socket.

use nix::unistd::{Gid, Uid, User};

/// Who may make changes: root, and the members of a group.
#[derive(Clone, Debug, Default)]
pub struct Writers {
    /// The socket's group.
    pub group: Option<u32>,
    /// The daemon's own user: root outside tests.
    pub user: u32,
}

/// A local process that is connected to the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Name of the peer's user, or `uid N`.
    pub user: String,
    /// Whether the peer may make changes.
    pub may_write: bool,
}

impl Peer {
    /// Reads the peer's credentials from the kernel.
    pub fn of(stream: &tokio::net::UnixStream, writers: &Writers) -> Self {
        match stream.peer_cred() {
            Ok(cred) => Self::new(cred.uid(), cred.gid(), writers),
            Err(error) => {
                tracing::warn!(%error, "peer credentials cannot be read; treated as read-only");
                Self { user: "unknown".to_owned(), may_write: false }
            }
        }
    }

    fn new(uid: u32, gid: u32, writers: &Writers) -> Self {
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let may_write = uid == 0
            || uid == writers.user
            || writers.group.is_some_and(|group| gid == group || is_member(user.as_ref(), group));
        Self { user: user.map_or_else(|| format!("uid {uid}"), |u| u.name), may_write }
    }
}

/// Whether a user is in a group, by the system's user database.
fn is_member(user: Option<&User>, group: u32) -> bool {
    let Some(user) = user else { return false };
    let Ok(name) = std::ffi::CString::new(user.name.as_str()) else { return false };
    nix::unistd::getgrouplist(&name, user.gid).is_ok_and(|all| all.contains(&Gid::from_raw(group)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_the_group_may_write() {
        let writers = Writers { group: Some(4_242), user: 0 };
        assert_eq!(Peer::new(0, 0, &writers), Peer { user: "root".into(), may_write: true });
        assert_eq!(Peer::new(61_234, 4_242, &writers), Peer { user: "uid 61234".into(), may_write: true });
        assert!(!Peer::new(61_234, 100, &writers).may_write);
        assert!(!Peer::new(61_234, 100, &Writers::default()).may_write);
    }
}
