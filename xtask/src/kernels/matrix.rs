//! What is run on what: lines of kernels, drivers, and settings of the network.

use std::time::Duration;

/// Lines of kernels, oldest first. The newest that the package lists have comes after them.
pub const LINES: [&str; 4] = ["5.10", "6.1", "6.12", "6.18"];
/// How the newest is asked for.
pub const NEWEST: &str = "newest";
/// What runs without `--full`: the oldest and the newest that most people have.
pub const USUAL: [&str; 2] = ["6.1", NEWEST];

/// A kind of link between hosts.
#[derive(Debug, PartialEq, Eq)]
pub struct Driver {
    /// How it is asked for, and what the results call it.
    pub name: &'static str,
    /// The QEMU device; None: veth pairs.
    pub device: Option<&'static str>,
    /// Queue pairs of the device's taps.
    pub queues: u32,
    /// The kernel's module.
    pub module: &'static str,
    /// The driver has no XDP of its own in any kernel.
    pub is_generic: bool,
}

const fn nic(name: &'static str, device: &'static str, module: &'static str) -> Driver {
    Driver { name, device: Some(device), queues: 1, module, is_generic: false }
}

/// Every driver.
pub const DRIVERS: [Driver; 6] = [
    Driver { name: "veth", device: None, queues: 1, module: "veth", is_generic: false },
    nic("virtio-net", "virtio-net-pci", "virtio_net"),
    Driver {
        name: "virtio-net-mq",
        device: Some("virtio-net-pci,mq=on,vectors=10"),
        queues: 4,
        module: "virtio_net",
        is_generic: false,
    },
    nic("igb", "igb", "igb"),
    nic("vmxnet3", "vmxnet3", "vmxnet3"),
    Driver { name: "e1000e", device: Some("e1000e"), queues: 1, module: "e1000e", is_generic: true },
];

/// A setting of the network: variables for the test program, and commands for the guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// What the results call it.
    pub name: &'static str,
    variables: &'static [(&'static str, &'static str)],
    commands: &'static str,
    /// Whether it means something on veth pairs too.
    for_veth: bool,
}

/// Every setting; the first is what comes by itself.
pub const SETTINGS: [Setting; 5] = [
    Setting { name: "as it comes", variables: &[], commands: "", for_veth: true },
    Setting {
        name: "mtu 9000",
        variables: &[("LB_TEST_CLIENT_MTU", "9000"), ("LB_TEST_WORKER_MTU", "9100")],
        commands: "",
        for_veth: true,
    },
    Setting {
        name: "offloads off",
        variables: &[],
        commands: "for n in /sys/class/net/*; do grep -q ^52:54:00 $n/address && \
                   for o in rx tx gro gso tso lro rxvlan txvlan; do ethtool -K ${n##*/} $o off 2>/dev/null; done; done\n",
        for_veth: false,
    },
    Setting {
        name: "VLAN devices",
        variables: &[("LB_TEST_LINK", "vlan")],
        commands: "modprobe 8021q || exit 3\n",
        for_veth: true,
    },
    Setting {
        name: "bond",
        variables: &[("LB_TEST_LINK", "bond")],
        commands: "modprobe bonding max_bonds=0 || exit 3\n",
        for_veth: true,
    },
];

/// One boot's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// The links.
    pub driver: &'static Driver,
    /// Their setting.
    pub setting: &'static Setting,
}

impl Work {
    /// `igb, mtu 9000`.
    pub fn name(&self) -> String {
        if *self.setting == SETTINGS[0] {
            self.driver.name.to_owned()
        } else {
            format!("{}, {}", self.driver.name, self.setting.name)
        }
    }

    /// What the guest runs: the test program `program`, told about the links.
    pub fn script(&self, program: &str, patience: u32) -> String {
        let mut script = format!("for m in veth {}; do modprobe $m || exit 3; done\n", self.driver.module);
        script += self.setting.commands;
        script += &format!("export RUST_BACKTRACE=0 LB_TEST_PATIENCE={patience}\n");
        if self.driver.device.is_some() {
            script += "export LB_TEST_NICS=1\n";
        }
        if self.driver.is_generic {
            script += "export LB_TEST_GENERIC=1\n";
        }
        for (name, value) in self.setting.variables {
            script += &format!("export {name}={value}\n");
        }
        script + program + "\n"
    }
}

/// The longest that one boot's work may take.
pub const LIMIT: Duration = Duration::from_secs(1_200);

/// All work, or what runs everywhere.
pub fn work(is_full: bool, drivers: &[String]) -> Vec<Work> {
    let mut all = Vec::new();
    for driver in &DRIVERS {
        let is_wanted = if drivers.is_empty() {
            is_full || driver.device.is_none()
        } else {
            drivers.iter().any(|d| d == driver.name)
        };
        if !is_wanted {
            continue;
        }
        for (number, setting) in SETTINGS.iter().enumerate() {
            if number == 0 || is_full && (setting.for_veth || driver.device.is_some()) {
                all.push(Work { driver, setting });
            }
        }
    }
    all
}

/// Names for messages and for the command line.
pub fn driver_names() -> Vec<&'static str> {
    DRIVERS.iter().map(|driver| driver.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usually_one_boot_is_enough_and_in_full_every_driver_has_its_settings() {
        let names = |full, drivers: &[String]| -> Vec<String> {
            work(full, drivers).iter().map(Work::name).collect()
        };
        assert_eq!(names(false, &[]), ["veth"]);
        assert_eq!(names(false, &["igb".into()]), ["igb"]);
        let full = names(true, &[]);
        assert!(full.contains(&"igb, offloads off".to_owned()), "{full:?}");
        assert!(!full.contains(&"veth, offloads off".to_owned()), "{full:?}");
        assert_eq!(full.len(), DRIVERS.len() * SETTINGS.len() - 1);
    }

    #[test]
    fn the_guest_is_told_about_its_links() {
        let igb = &work(true, &["e1000e".into()])[1];
        let script = igb.script("/program", 10);
        for part in ["modprobe", "e1000e", "LB_TEST_NICS=1", "LB_TEST_GENERIC=1", "LB_TEST_WORKER_MTU=9100"] {
            assert!(script.contains(part), "{part}: {script}");
        }
        assert!(script.ends_with("/program\n"), "{script}");
    }
}
