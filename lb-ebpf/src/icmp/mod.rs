//! ICMP and ICMPv6: echo requests to a VIP, errors about flows, and the answers that this host gives in a VIP's name.

pub mod answer;
pub mod dispatch;
pub mod echo;
pub mod error;
pub mod reject;
pub mod too_big;
