//! ICMP and ICMPv6: echo requests to a VIP, errors about flows, and "packet too big".

pub mod dispatch;
pub mod echo;
pub mod error;
pub mod too_big;
