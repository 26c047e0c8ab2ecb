//! The test matrix: kernel lines, drivers, and network settings.

use std::{path::Path, time::Duration};

/// Kernel lines, oldest first. The newest kernel of the package lists is tested after them.
pub const LINES: [&str; 4] = ["5.10", "6.1", "6.12", "6.18"];
/// Name of the newest kernel of the package lists.
pub const NEWEST: &str = "newest";
/// Kernel lines that run without `--full`: the oldest and the newest in common use.
pub const USUAL: [&str; 2] = ["6.1", NEWEST];

/// What the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Each feature once (tests/e2e).
    Tour,
    /// Each program with each shipped setting through the verifier (tests/verifier).
    Verifier,
}

/// A kind of link between hosts.
#[derive(Debug, PartialEq, Eq)]
pub struct Driver {
    /// Name on the command line and in the results.
    pub name: &'static str,
    /// QEMU device; None for veth pairs.
    pub device: Option<&'static str>,
    /// Queue pairs of the device's taps.
    pub queues: u32,
    /// Kernel module.
    pub module: &'static str,
    /// Whether the driver has no native XDP in any kernel.
    pub is_generic: bool,
    /// Program that runs.
    pub program: Program,
}

const fn nic(name: &'static str, device: &'static str, module: &'static str) -> Driver {
    Driver { name, device: Some(device), queues: 1, module, is_generic: false, program: Program::Tour }
}

const fn without_nic(name: &'static str, program: Program) -> Driver {
    Driver { name, device: None, queues: 1, module: "veth", is_generic: false, program }
}

/// Every driver, and the verifier alone.
pub const DRIVERS: [Driver; 7] = [
    without_nic("veth", Program::Tour),
    without_nic("verifier", Program::Verifier),
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

/// A network setting: variables for the test program, and commands for the guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// Name in the results.
    pub name: &'static str,
    variables: &'static [(&'static str, &'static str)],
    commands: &'static str,
    /// Whether it also applies to veth pairs.
    for_veth: bool,
}

/// All settings; the first one is the default.
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

/// The driver and the setting of one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Driver of the links.
    pub driver: &'static Driver,
    /// Network setting.
    pub setting: &'static Setting,
}

impl Work {
    /// Returns the name, such as `igb, mtu 9000`.
    pub fn name(&self) -> String {
        if *self.setting == SETTINGS[0] {
            self.driver.name.to_owned()
        } else {
            format!("{}, {}", self.driver.name, self.setting.name)
        }
    }

    /// Returns the time limit on an idle machine.
    pub fn limit(&self) -> Duration {
        match self.driver.program {
            Program::Tour => Duration::from_secs(1_200),
            Program::Verifier => Duration::from_secs(3 * 3_600),
        }
    }

    /// Returns the guest's script: it describes the links in variables and runs the test program at `path`.
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
        if let (Program::Verifier, Ok(only)) = (self.driver.program, std::env::var("LB_VERIFIER_ONLY")) {
            script += &format!("export LB_VERIFIER_ONLY='{only}'\n");
        }
        script + &format!("{} {arguments}\n", path.display())
    }
}

/// Returns the boots to run: all, or those that run by default.
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

/// Lists the names of drivers and settings, for messages.
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
        // The verifier has no network settings, and veth has one fewer.
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
