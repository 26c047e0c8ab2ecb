//! Result of one probe: passed, failed, late, or not made because of this host.
//!
//! What this host lacks says nothing about the worker: such a probe counts neither towards `rise` nor towards `fall`.

use futures_util::future::BoxFuture;
use std::{error::Error, fmt, io};

/// What is known of a probe when its time is over.
pub enum ProbeStep {
    /// Its result.
    Done(Outcome),
    /// The worker has accepted the connection, and the answer is late: the rest of the probe waits for it.
    Late(BoxFuture<'static, Outcome>),
}

/// Result of one probe, with the reason in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The worker passed the check.
    Passed(String),
    /// The worker failed the check.
    Failed(String),
    /// The check could not be made.
    NotProbed(Obstacle),
}

impl ProbeStep {
    /// Adds words to the reason.
    #[must_use]
    pub fn with(self, more: &str) -> Self {
        match self {
            Self::Done(outcome) => Self::Done(outcome.with(more)),
            Self::Late(rest) => {
                let more = more.to_owned();
                Self::Late(Box::pin(async move { rest.await.with(&more) }))
            }
        }
    }
}

impl From<Outcome> for ProbeStep {
    fn from(outcome: Outcome) -> Self {
        Self::Done(outcome)
    }
}

impl Outcome {
    /// Adds words to the reason.
    #[must_use]
    pub fn with(self, more: &str) -> Self {
        match self {
            Self::Passed(what) => Self::Passed(what + more),
            Self::Failed(what) => Self::Failed(what + more),
            Self::NotProbed(obstacle) => Self::NotProbed(Obstacle { what: obstacle.what + more, ..obstacle }),
        }
    }
}

/// Why this host cannot make a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Kind of the obstacle.
    pub kind: ObstacleKind,
    /// What happened, in words.
    pub what: String,
}

/// Kinds of obstacles: the label `reason` of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObstacleKind {
    /// No file descriptor is free (`EMFILE`, `ENFILE`).
    FileDescriptors,
    /// The kernel has no memory or buffer for a socket (`ENOBUFS`, `ENOMEM`).
    Memory,
    /// No source address or port is free (`EADDRNOTAVAIL`).
    SourcePorts,
    /// A firewall or policy of this host refuses the connection (`EPERM`, `EACCES`).
    Permission,
    /// This host has no route (`ENETUNREACH` or `EHOSTUNREACH` before a packet was sent).
    NoRoute,
    /// A certificate file, or a name in the check's settings, cannot be used.
    Settings,
    /// All probes that may be in flight at once are.
    ProbeLimit,
}

impl ObstacleKind {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::FileDescriptors,
        Self::Memory,
        Self::SourcePorts,
        Self::Permission,
        Self::NoRoute,
        Self::Settings,
        Self::ProbeLimit,
    ];

    /// Label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::FileDescriptors => "file_descriptors",
            Self::Memory => "memory",
            Self::SourcePorts => "source_ports",
            Self::Permission => "permission",
            Self::NoRoute => "no_route",
            Self::Settings => "settings",
            Self::ProbeLimit => "probe_limit",
        }
    }

    /// What an operator can do about it.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::FileDescriptors => "raise LimitNOFILE of lbd, or close what holds its file descriptors",
            Self::Memory => "free memory on this host",
            Self::SourcePorts => {
                "widen net.ipv4.ip_local_port_range, or check this host's own addresses (an IPv6 address may still be \
                 tentative)"
            }
            Self::Permission => "let lbd's probes through the firewall and the policy rules of this host",
            Self::NoRoute => "add the route",
            Self::Settings => "fix the check's settings or the files that they name",
            Self::ProbeLimit => "raise the setting probes, or shorten --health-timeout",
        }
    }

    /// The obstacle that an error number of `socket`, `bind` or `connect` stands for. The two unreachable errors are
    /// not among them: who reported them decides, see [`crate::observed::health::probe`].
    pub fn of_errno(errno: i32) -> Option<Self> {
        Some(match errno {
            libc::EMFILE | libc::ENFILE => Self::FileDescriptors,
            libc::ENOBUFS | libc::ENOMEM => Self::Memory,
            libc::EADDRNOTAVAIL | libc::EADDRINUSE => Self::SourcePorts,
            libc::EPERM | libc::EACCES => Self::Permission,
            _ => return None,
        })
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// Why a check did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeError {
    /// The worker failed it.
    Failed(String),
    /// This host could not make it.
    NotProbed(Obstacle),
}

impl ProbeError {
    /// An obstacle in the check's settings or files.
    pub fn settings(what: impl Into<String>) -> Self {
        Self::NotProbed(Obstacle { kind: ObstacleKind::Settings, what: what.into() })
    }

    /// Sorts an error that may come from an I/O error of this host.
    pub fn sort(error: &(dyn Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(found) = cause {
            let io = found.downcast_ref::<io::Error>();
            let errno = io.and_then(io::Error::raw_os_error);
            if let Some(kind) = errno.and_then(ObstacleKind::of_errno) {
                return Self::NotProbed(Obstacle { kind, what: found.to_string() });
            }
            // The source of an I/O error that wraps another error is that one's source.
            let wrapped = io.and_then(io::Error::get_ref).map(|inner| inner as &(dyn Error + 'static));
            cause = wrapped.or_else(|| found.source());
        }
        Self::Failed(error.to_string())
    }
}

impl From<Result<String, ProbeError>> for Outcome {
    fn from(result: Result<String, ProbeError>) -> Self {
        match result {
            Ok(what) => Self::Passed(what),
            Err(ProbeError::Failed(what)) => Self::Failed(what),
            Err(ProbeError::NotProbed(obstacle)) => Self::NotProbed(obstacle),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_this_host_are_told_from_those_of_the_worker() {
        for (errno, kind) in [
            (libc::EMFILE, Some(ObstacleKind::FileDescriptors)),
            (libc::ENFILE, Some(ObstacleKind::FileDescriptors)),
            (libc::ENOBUFS, Some(ObstacleKind::Memory)),
            (libc::ENOMEM, Some(ObstacleKind::Memory)),
            (libc::EADDRNOTAVAIL, Some(ObstacleKind::SourcePorts)),
            (libc::EPERM, Some(ObstacleKind::Permission)),
            (libc::EACCES, Some(ObstacleKind::Permission)),
            (libc::ECONNREFUSED, None),
            (libc::ECONNRESET, None),
            (libc::ETIMEDOUT, None),
            // After packets were sent: a router or the neighbour table said so.
            (libc::EHOSTUNREACH, None),
            (libc::ENETUNREACH, None),
        ] {
            assert_eq!(ObstacleKind::of_errno(errno), kind, "{errno}");
            let sorted = ProbeError::sort(&io::Error::from_raw_os_error(errno));
            assert_eq!(matches!(sorted, ProbeError::NotProbed(_)), kind.is_some(), "{sorted:?}");
        }
        let wrapped = io::Error::other(io::Error::from_raw_os_error(libc::EMFILE));
        assert!(matches!(ProbeError::sort(&wrapped), ProbeError::NotProbed(_)));
    }
}
