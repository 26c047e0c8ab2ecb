//! The QUIC stage for a connection id alone: `explain` asks about ids, not packets.

use super::VecFrame;
use crate::{
    Frame, Tables,
    quic::{ID_MAX, LONG, QuicTables, route},
};
use lb_common::Reason;

/// Backend that a connection id of a service names, or why it names none: for a caller that has the id and no packet.
pub fn route_id<T: Tables + QuicTables>(tables: &T, service: u32, id: &[u8]) -> Result<u32, Reason> {
    // A byte before the datagram, and a long header, which says how long the id is.
    let mut bytes = [0; 7 + 255 + ID_MAX];
    let Some(place) = bytes.get_mut(7..7 + id.len()).filter(|_| id.len() < 256) else {
        return Err(Reason::QuicTruncated);
    };
    place.copy_from_slice(id);
    (bytes[1], bytes[6]) = (LONG, id.len() as u8);
    let frame = VecFrame::new(&bytes);
    route(&frame.packet(), tables, service, 1, bytes.len() - 1)
}
