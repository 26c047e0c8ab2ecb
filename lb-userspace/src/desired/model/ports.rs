//! Protocols and ports of a service.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Transport protocol of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => lb_common::service::TCP,
            Self::Udp => lb_common::service::UDP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Protocol {
    type Err = PortsError;
    fn from_str(s: &str) -> Result<Self, PortsError> {
        match s {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(PortsError { given: s.to_owned(), problem: "is not a valid protocol: give tcp or udp" }),
        }
    }
}

/// Destination ports of a service. The more exact setting wins: one port, then a range, then any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "PortsText", into = "PortsText")]
pub enum Ports {
    /// Exactly this port.
    One(u16),
    /// These ports, bounds included.
    Range(u16, u16),
    /// Every port.
    Any,
}

/// Why a protocol or a port was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} {problem}")]
pub struct PortsError {
    /// Text that was given.
    pub given: String,
    /// What is wrong with it, and what would be right.
    pub problem: &'static str,
}

/// Written form of ports: a number, or text.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PortsText {
    Number(i64),
    Text(String),
}

impl TryFrom<PortsText> for Ports {
    type Error = PortsError;
    fn try_from(text: PortsText) -> Result<Self, PortsError> {
        match text {
            PortsText::Number(n) => n.to_string().parse(),
            PortsText::Text(t) => t.parse(),
        }
    }
}

impl From<Ports> for PortsText {
    fn from(ports: Ports) -> Self {
        match ports {
            Ports::One(port) => Self::Number(port.into()),
            other => Self::Text(other.to_string()),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(port) => f.pad(&port.to_string()),
            Self::Range(first, last) => f.pad(&format!("{first}-{last}")),
            Self::Any => f.pad("any"),
        }
    }
}

impl FromStr for Ports {
    type Err = PortsError;
    fn from_str(s: &str) -> Result<Self, PortsError> {
        let refuse = |problem| PortsError { given: s.to_owned(), problem };
        let port = |t: &str| match t.parse::<u16>() {
            Ok(0) | Err(_) => Err(refuse("is not a valid port: give 1 to 65535, FIRST-LAST, or any")),
            Ok(n) => Ok(n),
        };
        if s == "any" || s == "*" {
            return Ok(Self::Any);
        }
        match s.split_once('-') {
            None => Ok(Self::One(port(s)?)),
            Some((first, last)) => match (port(first)?, port(last)?) {
                (first, last) if first < last => Ok(Self::Range(first, last)),
                _ => Err(refuse("is not a valid port range: the first port must be below the last")),
            },
        }
    }
}

impl Ports {
    /// Whether both cover some port with equal exactness, so that neither would win.
    pub fn conflicts(&self, other: &Self) -> bool {
        match (*self, *other) {
            (Self::One(a), Self::One(b)) => a == b,
            (Self::Range(a, b), Self::Range(c, d)) => a <= d && c <= b,
            (Self::Any, Self::Any) => true,
            _ => false,
        }
    }

    /// Whether a port is covered.
    pub fn contains(&self, port: u16) -> bool {
        match *self {
            Self::One(one) => one == port,
            Self::Range(first, last) => (first..=last).contains(&port),
            Self::Any => true,
        }
    }
}
