//! XDP programs of an ingress host: the entry points.
//!
//! `ingress` sees every packet of an interface; the others are stages, reached by tail calls through `STAGES`.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the xdp attribute adds an undocumented function")]

mod maps;
mod subprograms;
mod tables;

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use aya_log_ebpf::debug;
use lb_common::{
    ABI_VERSION, Reason,
    names::stage,
    settings::{IngressSettings, features},
};
use lb_ebpf::{
    Tables, Verdict,
    icmp::{dispatch, reject as refusal},
    ingress::{self as balance, fragment as fragments},
    kernel::{action, global},
    nat as translate,
    packet::verdict::Outcome,
    quic as connection_id,
};
use maps::{DISPATCHER, EGRESS, SETTINGS, STAGES};
use tables::Maps;

lb_ebpf::settings_of!(SETTINGS);

/// A program: a stage of the packet code over the frame and the maps, then the XDP action of its verdict.
macro_rules! program {
    ($(#[doc = $doc:literal] $name:ident => $process:path;)*) => {$(
        #[doc = $doc]
        #[xdp(frags)]
        #[inline(always)]
        pub fn $name(ctx: XdpContext) -> u32 {
            let (verdict, outcome) = $process(&mut Xdp::new(&ctx), &Maps, global(&SETTINGS));
            finish(&ctx, verdict, outcome)
        }
    )*};
}

program! {
    /// Balances the packets of one interface.
    ingress => balance::process;
    /// Packets of QUIC services; see [`stage::QUIC`].
    quic => connection_id::process;
    /// ICMP to a VIP, and ICMP errors; see [`stage::ICMP`].
    icmp => dispatch::process;
    /// Fragments; see [`stage::FRAGMENT`].
    fragment => fragments::process;
    /// Mode nat: packets of translated flows, both ways; see [`stage::NAT`].
    nat => translate::process;
    /// Mode nat: first packets of new flows; see [`stage::NAT_BIND`].
    nat_bind => translate::process_new;
    /// Mode nat: ICMP errors about translated flows; see [`stage::NAT_ERROR`].
    nat_error => translate::process_error;
    /// Mode nat: fragments, both ways; see [`stage::NAT_FRAGMENT`].
    nat_fragment => translate::process_fragment;
    /// Answers to packets of services without a backend; see [`stage::REJECT`].
    reject => refusal::process;
}

/// Attached where another's program runs before or after ours: jumps to that program if its place is filled, else to
/// `ingress`. See [`stage::BEFORE`].
#[xdp(frags)]
#[inline(always)]
pub fn root(ctx: XdpContext) -> u32 {
    // SAFETY: nothing in this frame needs to be dropped.
    unsafe {
        DISPATCHER.tail_call(&ctx, stage::BEFORE);
        DISPATCHER.tail_call(&ctx, stage::INGRESS);
    }
    Maps.count(Reason::StageMissing);
    xdp_action::XDP_PASS
}

/// The XDP action of a verdict, or a jump to the next program.
#[inline(always)]
fn finish(ctx: &XdpContext, verdict: Verdict, outcome: Outcome) -> u32 {
    match outcome {
        Outcome::Forwarded { service, backend } => debug!(ctx, "service {} backend {}", service, backend),
        Outcome::Returned { service } => debug!(ctx, "service {} to its client", service),
        Outcome::Not(reason) => debug!(ctx, "reason {}", reason as u32),
    }
    if let Verdict::Stage(index) = verdict {
        // SAFETY: nothing in this frame needs to be dropped.
        unsafe { STAGES.tail_call(ctx, index) };
    }
    match action(verdict, &EGRESS) {
        Ok(xdp_action::XDP_PASS) if global(&SETTINGS).features & features::CHAIN != 0 => {
            // SAFETY: nothing in this frame needs to be dropped.
            unsafe { DISPATCHER.tail_call(ctx, stage::AFTER) };
            xdp_action::XDP_PASS
        }
        Ok(action) => action,
        Err(reason) => {
            Maps.count(reason);
            if matches!(Verdict::of(reason), Verdict::Pass) {
                xdp_action::XDP_PASS
            } else {
                xdp_action::XDP_DROP
            }
        }
    }
}

// Kept in the object so that a loader can compare it before anything runs.
const _: () = assert!(ABI_VERSION == IngressSettings::DEFAULT.abi_version);

lb_ebpf::object!();
