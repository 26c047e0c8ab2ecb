//! The stage that answers packets of services without a backend (`when_all_down = reset`): TCP with a reset (RFC 9293
//! 3.10.7.1), UDP with ICMP port unreachable (RFC 792, RFC 4443 3.1), so that clients fail at once.
//!
//! A reset is never longer than what it answers, and costs no state, so it has no rate limit; ICMP has the one of all
//! generated ICMP. Resets are not answered, nor are fragments and packets that no host may answer: these are dropped as
//! without this stage.
//!
//! Reached by tail call with the frame as it came in, from any program that has looked for a backend; called natively by
//! tests and fuzzers.

use crate::{
    Frame, Tables, Verdict,
    icmp::answer::{self, DONT_FRAGMENT, Message, by_ethernet},
    packet::{
        csum,
        network::Network,
        parse::{Headers, tcp},
        verdict::Outcome,
        wire::Tcp,
    },
};
use lb_common::{
    Reason,
    service::{TCP, UDP},
    settings::IngressSettings,
};

const TCP_HEADER: usize = 20;
/// IP header and UDP header: what a socket needs to find itself.
const QUOTE_V4: usize = 28;
const QUOTE_V6: usize = 48;
const PORT_UNREACHABLE: Message = Message { v4: [3, 3], v6: [1, 4], mtu: 0 };

/// Answers the frame's sender, or drops the frame.
#[inline(always)]
pub fn process<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    let mut place = Network::default();
    let reason = match tables.parse_network(frame, settings, &mut place) {
        Ok(network) => match answer(frame, tables, settings, network) {
            Some(()) => Reason::NoBackendAnswered,
            None => Reason::NoBackend,
        },
        Err(reason) => reason,
    };
    // Not by `refuse`, which would hand the packet to this stage again.
    tables.count(reason);
    (Verdict::of(reason), Outcome::Not(reason))
}

#[inline(always)]
fn answer<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &Network,
) -> Option<()> {
    let headers = &network.headers;
    if network.fragment.is_some() || !headers.is_answerable() {
        return None;
    }
    if headers.protocol == TCP {
        let reset = Reset::to(frame, network)?;
        return if headers.is_ipv6 {
            by_ethernet!(headers, reset_v6::<F>(frame, headers, reset))
        } else {
            by_ethernet!(headers, reset_v4::<F>(frame, headers, reset))
        };
    }
    // Options would leave no room in the quote for the ports.
    let header_len = if headers.is_ipv6 { 40 } else { 20 };
    if headers.protocol != UDP || network.l4() != headers.l2_len() + header_len {
        return None;
    }
    if settings.icmp_per_s == 0 || !tables.take_icmp(settings.icmp_per_s, settings.icmp_burst) {
        return None;
    }
    answer::error::<F, QUOTE_V4, QUOTE_V6>(frame, headers, PORT_UNREACHABLE)
}

/// What a reset takes from the segment that it answers.
#[derive(Clone, Copy)]
struct Reset {
    /// Source and destination, as loaded.
    ports: [u16; 2],
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
}

impl Reset {
    /// The answer to the frame's segment, unless that is a reset.
    #[inline(always)]
    fn to<F: Frame>(frame: &F, network: &Network) -> Option<Self> {
        let segment: Tcp = frame.packet().read(network.l4())?;
        let data = network.l4_len.wrapping_sub(((segment.offset >> 4) as usize) * 4) as u32;
        if segment.flags & tcp::RST != 0 || segment.offset >> 4 < 5 || data > u16::MAX as u32 {
            return None;
        }
        let ports = [segment.port, segment.source_port];
        if segment.flags & tcp::ACK != 0 {
            let sequence = segment.acknowledgement;
            return Some(Self { ports, sequence, acknowledgement: 0, flags: tcp::RST });
        }
        let of_flag = |flag| (segment.flags & flag != 0) as u32;
        let len = data + of_flag(tcp::SYN) + of_flag(tcp::FIN);
        let acknowledgement = u32::from_be(segment.sequence).wrapping_add(len).to_be();
        Some(Self { ports, sequence: 0, acknowledgement, flags: tcp::RST | tcp::ACK })
    }

    /// The header, with a pseudo-header of this sum.
    #[inline(always)]
    fn header(self, pseudo_header: u64) -> Tcp {
        let mut header = Tcp {
            source_port: self.ports[0],
            port: self.ports[1],
            sequence: self.sequence,
            acknowledgement: self.acknowledgement,
            offset: ((TCP_HEADER / 4) as u8) << 4,
            flags: self.flags,
            window: 0,
            check: 0,
            urgent: 0,
        };
        header.check = csum::finish(pseudo_header + csum::of_tcp(&header));
        header
    }
}

#[inline(always)]
fn reset_v4<F: Frame, const L2: usize, const TAGS: usize>(
    frame: &mut F,
    headers: &Headers,
    reset: Reset,
) -> Option<()> {
    answer::turn::<F, L2, TAGS>(frame, 20 + TCP_HEADER, 0)?;
    let ip = answer::ipv4(headers, TCP, TCP_HEADER, DONT_FRAGMENT);
    let tcp = reset.header(answer::pseudo_header(headers, TCP, TCP_HEADER));
    let mut packet = frame.packet();
    (packet.write(L2, ip) && packet.write(L2 + 20, tcp)).then_some(())
}

#[inline(always)]
fn reset_v6<F: Frame, const L2: usize, const TAGS: usize>(
    frame: &mut F,
    headers: &Headers,
    reset: Reset,
) -> Option<()> {
    answer::turn::<F, L2, TAGS>(frame, 40 + TCP_HEADER, 0)?;
    let ip = answer::ipv6(headers, TCP, TCP_HEADER);
    let tcp = reset.header(answer::pseudo_header(headers, TCP, TCP_HEADER));
    let mut packet = frame.packet();
    (packet.write(L2, ip) && packet.write(L2 + 40, tcp)).then_some(())
}
