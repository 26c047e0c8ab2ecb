//! XDP program of a worker: maps, and the entry point around `lb_ebpf::decap`.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the xdp attribute adds an undocumented function")]

use aya_ebpf::{
    Global,
    bindings::xdp_action,
    helpers::generated::bpf_redirect,
    macros::{map, xdp},
    maps::{Array, HashMap, PerCpuArray},
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use lb_common::{Address, Reason, limits, settings::DecapSettings};
use lb_ebpf::{
    Verdict,
    decap::{DecapTables, process},
    kernel::XdpFrame,
};

#[unsafe(no_mangle)]
static SETTINGS: Global<DecapSettings> = Global::new(DecapSettings::DEFAULT);

#[map]
static DECAP_ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(limits::DECAP_ADDRESSES, 0);
#[map]
static DECAP_VIPS: HashMap<Address, u32> = HashMap::with_max_entries(limits::DECAP_ADDRESSES, 0);
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::COUNT, 0);
#[map]
static ABI: Array<u32> = Array::with_max_entries(1, 0);

/// The maps of this object.
struct Maps;

impl DecapTables for Maps {
    #[inline(always)]
    fn is_ours(&self, address: &Address) -> bool {
        DECAP_ADDRESSES.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn is_served(&self, vip: &Address) -> bool {
        DECAP_VIPS.get_ptr(vip).is_some()
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own counter, and programs do not preempt each other.
            unsafe { *counter += 1 };
        }
    }
}

/// Decapsulates what arrives on one interface.
#[xdp(frags)]
pub fn decap(ctx: XdpContext) -> u32 {
    let settings = SETTINGS.load();
    let (verdict, reason) = process(&mut XdpFrame::new(&ctx), &Maps, &settings);
    debug!(&ctx, "reason {}", reason as u32);
    match verdict {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Transmit => xdp_action::XDP_TX,
        // SAFETY: no pointers.
        Verdict::Redirect(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        _ => xdp_action::XDP_DROP,
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing here panics; the verifier would refuse the program if this could be reached.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
