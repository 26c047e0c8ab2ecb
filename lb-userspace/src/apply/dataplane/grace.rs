//! Waits until every program run that began before the call has ended.
//!
//! Programs run inside an RCU read-side section. The kernel waits for an RCU grace period when an entry of a
//! map of maps is replaced (`maybe_wait_bpf_programs`), on every kernel and configuration. `membarrier(2)` waits as
//! long but refuses with `nohz_full`, so it is only the fallback. Measured on 6.18: 8 ms either way.

use super::sys::MapOfMaps;
use std::{sync::OnceLock, time::Duration};

/// A map of maps that no program reads; none if the kernel does not allow one.
static MAP: OnceLock<Option<MapOfMaps>> = OnceLock::new();

/// Returns when every program run that began before the call has ended.
pub fn grace_period() {
    let map = MAP.get_or_init(|| match MapOfMaps::new() {
        Ok(map) => Some(map),
        Err(error) => {
            tracing::warn!(%error, "cannot create a map of maps to wait for programs; using membarrier instead");
            None
        }
    });
    if map.as_ref().is_some_and(|map| map.replace().is_ok()) {
        return;
    }
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: no memory is passed. The command waits for an RCU grace period.
    if unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } != 0 {
        // Neither works: wait far longer than any run of a program.
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs permission to create maps; prints SKIP without it.
    #[test]
    fn a_map_of_maps_can_be_made_and_its_entry_replaced() {
        match MapOfMaps::new() {
            Ok(map) => {
                let began = std::time::Instant::now();
                map.replace().expect("the entry is ours");
                println!("one grace period: {:?}", began.elapsed());
            }
            Err(error) => println!("SKIP: {error}"),
        }
    }
}
