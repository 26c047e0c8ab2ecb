//! Packet in, packet out: each test is one named case through the loaded program. What it must answer is
//! written out (verdict, bytes, counters, flow tables), built from the RFCs and not by the code under
//! test. A file per feature.

mod case;
mod decap;
mod egress;
mod flows;
mod fragments;
mod gue;
mod headers;
mod icmp;
mod ipip;
mod l2;
mod martians;
mod nat;
mod placement;
mod quic;
mod services;
mod settings;
mod size;
