//! The same tables and verdicts in the kernel as in a native run.

use crate::{Ingress, xdp};
use lb_common::Service;
use lb_ebpf::{Verdict, native::HashTables};

impl Ingress {
    /// Makes the kernel's tables hold what the native ones hold, and nothing else.
    pub fn hold(&mut self, tables: &HashTables) {
        self.reset();
        self.forget_bindings();
        for (place, slot) in tables.slots.iter().enumerate() {
            self.set_slot(place as u32, *slot);
        }
        for (index, view) in &tables.services {
            self.set_service(*index, Service { active: 0, used: 1, views: [*view, *view], reserved: [0] });
        }
        for (index, backend) in &tables.backends {
            self.backend(*index, *backend);
        }
        for (key, index) in &tables.service_index {
            self.set_key(*key, *index);
        }
        for (key, vip) in &tables.vips {
            self.vip(key.vip, *vip);
        }
        for (key, config) in &tables.quic_configs {
            self.quic_config(*key, *config);
        }
        for (key, backend) in &tables.quic_servers {
            self.quic_server(*key, *backend);
        }
    }
}

/// The XDP verdict of a native run.
pub fn action(verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Pass => xdp::PASS,
        Verdict::Drop => xdp::DROP,
        Verdict::Transmit => xdp::TX,
        Verdict::Redirect(_) => xdp::REDIRECT,
        Verdict::Stage(_) => unreachable!("stages are followed"),
    }
}

/// A packet for a message.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
