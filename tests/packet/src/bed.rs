//! A network namespace of the tests' own: interface numbers, routes and neighbours are known, and
//! nothing depends on the host's network.

use nix::sched::{CloneFlags, setns, unshare};
use std::{fs::File, process::Command, sync::OnceLock, thread};

/// The loopback interface: packets of a test run come in by it.
pub const INGRESS: u32 = 1;
/// Another interface, in the device map.
pub const EGRESS: u32 = 10;
/// A third one, not in the device map.
pub const UNLISTED: u32 = 11;
/// MAC of [`EGRESS`].
pub const EGRESS_MAC: [u8; 6] = [2, 0, 0, 0, 0, 10];
/// MAC of the neighbours that the kernel knows: 10.1.0.1, 10.1.0.2 and fd00:1::1.
pub const NEIGHBOUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 99];
/// MTU of [`EGRESS`].
pub const EGRESS_MTU: u16 = 1_500;

const SETUP: &str = "
ip link set lo up
ip link add out index 10 address 02:00:00:00:00:0a mtu 1500 type veth peer name unlisted index 11
ip link set unlisted up
ip addr add 10.1.0.254/24 dev out
ip -6 addr add fd00:1::fe/64 dev out nodad
ip link set out up
ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:63 dev out nud permanent
ip neigh add 10.1.0.2 lladdr 02:00:00:00:00:63 dev out nud permanent
ip neigh add fd00:1::1 lladdr 02:00:00:00:00:63 dev out nud permanent
ip route add 10.3.0.0/24 via 10.1.0.2
ip route add 10.4.0.0/24 via 10.1.0.1 mtu lock 1400
ip route add unreachable 10.5.0.0/24
sysctl -qw net.ipv4.conf.all.forwarding=1 net.ipv6.conf.all.forwarding=1
";

static BED: OnceLock<File> = OnceLock::new();

/// Moves this thread into the namespace, which is made on first use and goes with the process.
pub fn enter() {
    let bed = BED.get_or_init(|| thread::spawn(make).join().expect("make the namespace"));
    setns(bed, CloneFlags::CLONE_NEWNET).expect("enter the namespace (root is needed)");
}

fn make() -> File {
    unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace (root is needed)");
    for line in SETUP.lines().filter(|line| !line.is_empty()) {
        let mut words = line.split_whitespace();
        let program = words.next().expect("no line is empty");
        let output = Command::new(program).args(words).output().expect("run it");
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    File::open("/proc/thread-self/ns/net").expect("a thread has one")
}
