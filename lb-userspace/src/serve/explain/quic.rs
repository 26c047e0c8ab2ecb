//! Explains where a QUIC packet goes because of its connection id.

use super::{Answer, BackendView, Explanation, Names, forwarding, headers, live::MapReader, sent};
use crate::desired::model::{from_hex, to_hex};
use lb_common::{Reason, ServiceView, quic::TOGETHER_MAX};
use lb_ebpf::{Tables, native::route_id, select::hash::flow_hash};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Longest connection id of QUIC version 1 (RFC 9000 17.2); a QUIC-LB config reads no longer one either.
const MAX: usize = 1 + TOGETHER_MAX as usize;

/// A QUIC connection id, written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ConnectionId {
    bytes: [u8; MAX],
    len: u8,
}

impl ConnectionId {
    /// The bytes of the connection id.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_hex(self.bytes()))
    }
}

impl fmt::Debug for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<ConnectionId> for String {
    fn from(id: ConnectionId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ConnectionId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for ConnectionId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let read = from_hex(text).filter(|bytes| (1..=MAX).contains(&bytes.len()));
        let read = read.ok_or_else(|| {
            format!(
                "{text:?} is not a valid connection id: give 1 to {MAX} bytes in hexadecimal, two digits each"
            )
        })?;
        let mut bytes = [0; MAX];
        bytes[..read.len()].copy_from_slice(&read);
        Ok(Self { bytes, len: read.len() as u8 })
    }
}

impl Explanation {
    /// Adds the backend that the connection id names, which takes precedence; without an id, a note that it would.
    pub(super) fn add_connection_id(
        &mut self,
        live: &MapReader<'_>,
        names: &impl Names,
        index: u32,
        view: &ServiceView,
        id: Option<&ConnectionId>,
    ) {
        let Some(id) = id else {
            self.steps.push(
                "a packet whose connection id names a backend goes to that backend (--connection-id HEX shows which); other packets:"
                    .to_owned(),
            );
            return;
        };
        let routed = route_id(live, index, id.bytes());
        let config = id.bytes()[0] >> 5;
        let read = match (routed, live.work.borrow().server_id()) {
            (Ok(_) | Err(Reason::QuicUnknownId), server) => {
                format!("config {config}, server id {}", to_hex(server))
            }
            (Err(_), _) => format!("config {config}"),
        };
        let backend = match routed {
            Ok(backend) => backend,
            Err(reason) => {
                self.steps.push(format!(
                    "connection id {id}: {read}: {}: handled like other packets:",
                    reason.describe()
                ));
                return;
            }
        };
        let headers = headers(&self.query, 0);
        let mut to = live.backend_view(names, backend);
        let label = to.as_ref().map_or("nowhere".to_owned(), BackendView::label);
        self.steps.push(format!("connection id {id}: {read} → {label}, whatever the client's address"));
        let mut why = format!("the connection id names this backend: {read}");
        let mut forwarding = live.backend(backend).map(|e| forwarding(e, flow_hash(view.seed, &headers)));
        if let Err(reason) = sent(live, index, view, headers.is_ipv6, backend) {
            self.steps.push(format!("dropped: {}", reason.describe()));
            why = format!("{}; {why}", reason.describe());
            (to, forwarding) = (None, None);
        }
        if let Some(f) = &forwarding {
            self.steps.push(f.describe());
        }
        self.answers.push(Answer {
            packet: "connection id".to_owned(),
            backend: to,
            why,
            records: false,
            forwarding,
            chain: Vec::new(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_ids_are_hexadecimal() {
        let id: ConnectionId = "0C00ff".parse().unwrap();
        assert_eq!(id.bytes(), [0x0c, 0, 0xff]);
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"0c00ff\"");
        assert_eq!(serde_json::from_str::<ConnectionId>("\"0c00ff\"").unwrap(), id);
        assert_eq!("ab".repeat(MAX).parse::<ConnectionId>().unwrap().bytes(), [0xab; MAX]);
        for bad in ["", "0", "0c0", "0x0c", "zz", "0c 0", "é0"] {
            assert!(bad.parse::<ConnectionId>().unwrap_err().contains("in hexadecimal"), "{bad}");
        }
        assert!("ab".repeat(MAX + 1).parse::<ConnectionId>().is_err());
    }
}
