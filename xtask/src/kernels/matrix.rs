//! What is run on what: lines of kernels, drivers, and settings of the network.

use std::{path::Path, time::Duration};

/// Lines of kernels, oldest first. The newest that the package lists have comes after them.
pub const LINES: [&str; 4] = ["5.10", "6.1", "6.12", "6.18"];
/// How the newest is asked for.
pub const NEWEST: &str = "newest";
/// What runs without `--full`: the oldest and the newest that most people have.
pub const USUAL: [&str; 2] = ["6.1", NEWEST];

/// What the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Everything once (tests/e2e).
    Tour,
    /// Each program with each shipped setting through the verifier (tests/verifier).
    Verifier,
}

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
    /// What runs.
    pub program: Program,
}

const fn nic(name: &'static str, device: &'static str, module: &'static str) -> Driver {
    Driver { name, device: Some(device), queues: 1, module, is_generic: false, program: Program::Tour }
}

const fn nic_less(name: &'static str, program: Program) -> Driver {
    Driver { name, device: None, queues: 1, module: "veth", is_generic: false, program }
}

/// Every driver, and the verifier alone.
pub const DRIVERS: [Driver; 7] = [
    nic_less("veth", Program::Tour),
    nic_less("verifier", Program::Verifier),
    nic("virtio-net", "virtio-net-pci", "virtio_net"),
    Driver {
        name: "virtio-net-mq",
        device: Some("virtio-net-pci,mq=on,vectors=10"),
        queues: 4,
        module: "virtio_net",
        is_generic: false,
        program: Program::Tour,
    },
    nic("igb", "igb", "igb"),
    nic("vmxnet3", "vmxnet3", "vmxnet3"),
    Driver { is_generic: true, ..nic("e1000e", "e1000e", "e1000e") },
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

    /// The longest that it may take on an idle machine.
    pub fn limit(&self) -> Duration {
        match self.driver.program {
            Program::Tour => Duration::from_secs(1_200),
            Program::Verifier => Duration::from_secs(3 * 3_600),
        }
    }

    /// What the guest runs: the test program at `path`, told about the links.
    pub fn script(&self, path: &Path, patience: u32) -> String {
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
        let arguments = match self.driver.program {
            Program::Tour => "--nocapture",
            Program::Verifier => "--test-threads=1",
        };
        script + &format!("{} {arguments}\n", path.display())
    }
}

/// All work, or what runs everywhere.
pub fn work(is_full: bool, drivers: &[String], settings: &[String]) -> Vec<Work> {
    let mut all = Vec::new();
    for driver in &DRIVERS {
        let is_wanted = match drivers {
            [] => is_full || *driver == DRIVERS[0],
            named => named.iter().any(|name| name == driver.name),
        };
        if !is_wanted {
            continue;
        }
        for (number, setting) in SETTINGS.iter().enumerate() {
            let is_for_all = setting.for_veth || driver.device.is_some();
            let has_settings = driver.program == Program::Tour;
            let is_named = settings.is_empty() || settings.iter().any(|name| name == setting.name);
            if is_named && (number == 0 || has_settings && is_for_all && (is_full || !settings.is_empty())) {
                all.push(Work { driver, setting });
            }
        }
    }
    all
}

/// Names of drivers and of settings, for messages.
pub fn names() -> String {
    let drivers: Vec<&str> = DRIVERS.iter().map(|driver| driver.name).collect();
    let settings: Vec<&str> = SETTINGS.iter().map(|setting| setting.name).collect();
    format!("drivers are {}; settings are {}", drivers.join(", "), settings.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usually_one_boot_is_enough_and_in_full_every_driver_has_its_settings() {
        let names = |full, drivers: &[&str], settings: &[&str]| -> Vec<String> {
            let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
            work(full, &own(drivers), &own(settings)).iter().map(Work::name).collect()
        };
        assert_eq!(names(false, &[], &[]), ["veth"]);
        assert_eq!(names(false, &["igb"], &[]), ["igb"]);
        assert_eq!(names(false, &["igb"], &["bond"]), ["igb, bond"]);
        let full = names(true, &[], &[]);
        assert!(full.contains(&"igb, offloads off".to_owned()), "{full:?}");
        assert!(!full.contains(&"veth, offloads off".to_owned()), "{full:?}");
        // The verifier knows no settings of networks, and veth one less.
        assert_eq!(full.len(), (DRIVERS.len() - 1) * SETTINGS.len());
    }

    #[test]
    fn the_guest_is_told_about_its_links() {
        let work = &work(true, &["e1000e".into()], &["mtu 9000".into()])[0];
        let script = work.script(Path::new("/program"), 10);
        for part in ["modprobe", "e1000e", "LB_TEST_NICS=1", "LB_TEST_GENERIC=1", "LB_TEST_WORKER_MTU=9100"] {
            assert!(script.contains(part), "{part}: {script}");
        }
        assert!(script.ends_with("/program --nocapture\n"), "{script}");
    }
}
