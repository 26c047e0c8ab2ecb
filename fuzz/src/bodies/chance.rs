//! A packet's way from worker to worker, whoever made its chain.
//!
//! Promises: no packet visits more than three workers, none twice; it ends delivered or dropped; who sends it on changes
//! nothing of what is inside.

use super::{decap, l2_len, v4, v6};
use lb_common::{Address, Reason, settings::DecapSettings};
use lb_ebpf::{
    Verdict,
    native::{HashTables, VecFrame},
    worker::decap::process,
};

/// Addresses of the workers.
pub fn workers() -> [[Address; 2]; 4] {
    [1, 2, 3, 4].map(|i| [v4(10, 1, 0, i), v6(1, i)])
}

/// A worker's tables.
fn worker(addresses: [Address; 2]) -> HashTables {
    let mut tables = decap::world();
    tables.decap_addresses = addresses.into_iter().collect();
    tables
}

/// Where a frame goes.
fn destination(frame: &[u8]) -> Option<Address> {
    let ip = frame.get(l2_len(frame)..)?;
    match ip.first()? >> 4 {
        4 => {
            let a = ip.get(16..20)?;
            Some(v4(a[0], a[1], a[2], a[3]))
        }
        _ => ip.get(24..40)?.try_into().ok(),
    }
}

/// Follows one frame.
pub fn check(data: &[u8]) {
    let (mut frame, mut visited) = (data.to_vec(), Vec::new());
    loop {
        let Some(at) = destination(&frame) else { return };
        let Some(number) = workers().iter().position(|addresses| addresses.contains(&at)) else { return };
        assert!(!visited.contains(&number), "{number} again after {visited:?}");
        visited.push(number);
        assert!(visited.len() <= 3, "{visited:?}");
        // One flow in four has a socket at each.
        let sockets: fn(&lb_ebpf::second_chance::worker::SocketQuery) -> bool = match number {
            0 => |query| query.source_port & 3 == 0,
            1 => |query| query.source_port & 3 == 1,
            2 => |query| query.source_port & 3 == 2,
            _ => |query| query.source_port & 3 == 3,
        };
        let mut run = VecFrame::new(&frame).with_sockets(sockets);
        let (verdict, reason) = process(&mut run, &worker(workers()[number]), &DecapSettings::DEFAULT);
        if (verdict, reason) != (Verdict::Transmit, Reason::ChanceSentOn) {
            assert_ne!(verdict, Verdict::Transmit, "{reason:?}");
            return;
        }
        let after = run.bytes();
        assert_eq!(frame.len(), after.len());
        frame = after;
    }
}
