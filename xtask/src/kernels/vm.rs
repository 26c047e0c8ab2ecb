//! Boots a virtual machine, monitors it, and ends it by its process ID.
//!
//! QEMU emulates the processor (TCG): no virtualisation support is needed, and throughput is meaningless. Its NICs are
//! taps with virtio-net headers, joined in pairs by bridges, in a network namespace that ends with QEMU.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    image,
    packages::{Tools, Unpacked},
};
use crate::shell;

/// Time limit of a boot. In one boot of 25 the emulator loses a timer of the second processor before init and hangs.
/// Multiplied by [`load_factor`] on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of boots.
const BOOTS: u32 = 2;
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Pairs of NICs: the client's link and two workers'.
const PAIRS: usize = 3;
const MEMORY_MIB: u32 = 2_560;
const PROCESSORS: u32 = 2;

/// A machine to boot.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Tools, including the emulator.
    pub tools: &'a Tools,
    /// Kernel to boot.
    pub kernel: &'a Unpacked,
    /// QEMU device with its options; None for no NICs.
    pub device: Option<&'a str>,
    /// Queue pairs of each NIC.
    pub queues: u32,
    /// Shell script that the guest runs as root.
    pub script: &'a str,
    /// Time limit of the script, without the boot.
    pub limit: Duration,
    /// Directory for the machine's files.
    pub directory: &'a Path,
}

/// Result of a machine.
#[derive(Debug)]
pub struct RunOutcome {
    /// Boots that hung before init.
    pub hung: u32,
    /// Time from the first boot to the end.
    pub took: Duration,
    /// Exit status of the script; None if it did not end.
    pub status: Option<i32>,
}

/// Boots the machine and waits for its end; passes each line of the guest's log to `on_line`.
pub fn run(machine: &Machine, mut on_line: impl FnMut(&str)) -> Result<RunOutcome> {
    let started = Instant::now();
    let directory = machine.directory;
    let _ = fs::remove_dir_all(directory);
    let out = directory.join("out");
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    image::build(machine.tools, machine.kernel, &directory.join("initramfs"))?;
    write(&out.join("guest.sh"), machine.script)?;
    write(&out.join("init.sh"), &init(machine)?)?;
    write(&directory.join("launch.sh"), &launch(machine))?;
    let mut hung = 0;
    loop {
        let mut qemu = Qemu::start(directory)?;
        if qemu.wait_for_boot(&out)? {
            let status = qemu.watch(&out, machine.limit, &mut on_line)?;
            return Ok(RunOutcome { hung, took: started.elapsed(), status });
        }
        drop(qemu);
        hung += 1;
        println!(
            "    boot {hung} did not reach init within {} s",
            BOOT_TIMEOUT.mul_f32(load_factor()).as_secs()
        );
        if hung == BOOTS {
            bail!("{hung} boots hung:\n{}", tail(&directory.join("console")));
        }
    }
}

/// Returns the factor by which this machine is slower than when idle, estimated from its load.
pub fn load_factor() -> f32 {
    let load = fs::read_to_string("/proc/loadavg").ok();
    let load: f32 = load.and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or(1.0);
    let processors = thread::available_parallelism().map_or(1, |count| count.get()) as f32;
    (load / processors).clamp(1.0, 5.0)
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Returns the last lines of a file, for messages.
pub fn tail(file: &Path) -> String {
    let text = fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// Returns the guest's first script: it mounts modules and file systems, runs the test, and always powers off.
fn init(machine: &Machine) -> Result<String> {
    let modules =
        machine.kernel.root.join("lib/modules").canonicalize().context("the kernel has no modules")?;
    Ok(format!(
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8\n\
         : > /run/out/started\n\
         (sleep {limit}; echo o > /proc/sysrq-trigger) &\n\
         rm -rf /lib/modules; mkdir -p /lib/modules /tools; mount --bind {modules} /lib/modules\n\
         for t in modprobe depmod; do printf '#!/bin/bash\\nexport LD_LIBRARY_PATH={libraries}\\nexec -a %s {kmod} \"$@\"\\n' $t > /tools/$t; done\n\
         chmod 755 /tools/*\n\
         export PATH=/tools:$PATH\n\
         echo /tools/modprobe > /proc/sys/kernel/modprobe\n\
         ip link set lo up; mount -t bpf b /sys/fs/bpf 2>/dev/null\n\
         mount -t debugfs d /sys/kernel/debug 2>/dev/null; mount -t tracefs t /sys/kernel/tracing 2>/dev/null\n\
         mount -t cgroup2 c /sys/fs/cgroup 2>/dev/null\n\
         cd /run/out; sh /run/out/guest.sh > /run/out/log 2>&1; status=$?\n\
         dmesg > /run/out/dmesg; echo $status > /run/out/done; sync; echo o > /proc/sysrq-trigger; sleep 10\n",
        limit = machine.limit.as_secs() + 30,
        modules = modules.display(),
        libraries = machine.tools.libraries(),
        kmod = machine.tools.kmod_program()?.display(),
    ))
}

/// Returns the script that creates the taps and then execs QEMU. It runs in a network namespace that ends with QEMU.
fn launch(machine: &Machine) -> String {
    let mut script = String::from("set -e\nip link set lo up\n");
    let mut nics = String::new();
    if let Some(device) = machine.device {
        let (multi, queues) = if machine.queues > 1 { (" multi_queue", machine.queues) } else { ("", 1) };
        for pair in 0..PAIRS {
            script += &format!(
                "ip link add br{pair} type bridge mcast_snooping 0\nip link set br{pair} mtu 9200 up\n"
            );
            for end in 0..2 {
                let tap = format!("n{pair}{end}");
                script += &format!(
                    "ip tuntap add dev {tap} mode tap vnet_hdr{multi}\nip link set {tap} master br{pair} mtu 9200 up\n"
                );
                nics += &format!(
                    " -netdev tap,id={tap},ifname={tap},script=no,downscript=no,queues={queues} \
                     -device pcie-root-port,id=p{tap},chassis={chassis} \
                     -device {device},bus=p{tap},netdev={tap},romfile=,mac=52:54:00:00:0{pair}:0{end}",
                    chassis = 1 + pair * 2 + end,
                );
            }
        }
    }
    let tools = machine.tools;
    let directory = machine.directory.display();
    script += &format!(
        "export QEMU_MODULE_DIR={modules} LD_LIBRARY_PATH={libraries}\n\
         exec {qemu} -L {data} -L {bios} -machine q35 -accel tcg,thread=multi -cpu max -smp {PROCESSORS} \
         -m {MEMORY_MIB} -display none -vga none -audio none -no-reboot -nic none -monitor none \
         -serial file:{directory}/console -kernel {image} -initrd {directory}/initramfs \
         -append 'console=ttyS0 quiet panic=-1 mitigations=off tsc=unstable' \
         -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
         -virtfs local,path={directory}/out,mount_tag=out,security_model=none{nics}\n",
        modules = tools.path("usr/lib/x86_64-linux-gnu/qemu").display(),
        libraries = tools.libraries(),
        qemu = tools.path("usr/bin/qemu-system-x86_64").display(),
        data = tools.path("usr/share/qemu").display(),
        bios = tools.path("usr/share/seabios").display(),
        image = machine.kernel.image.display(),
    );
    script
}

/// The process of QEMU; killed when dropped, or by the kernel if this program ends first.
struct Qemu {
    child: Child,
    errors: PathBuf,
}

impl Qemu {
    fn start(directory: &Path) -> Result<Self> {
        for name in ["console", "out/started", "out/log", "out/done"] {
            let _ = fs::remove_file(directory.join(name));
        }
        let errors = directory.join("qemu.log");
        let file = File::create(&errors).with_context(|| format!("cannot create {}", errors.display()))?;
        let mut command: Command = shell::as_root("unshare");
        // Lower priority than other work on the machine.
        command.args(["--net", "--", "nice", "-n", "5", "sh"]).arg(directory.join("launch.sh"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        test_support::process::die_with_parent(&mut command);
        let child = command.spawn().context("cannot start QEMU")?;
        Ok(Self { child, errors })
    }

    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("cannot wait for QEMU")?.is_some())
    }

    /// Waits for the guest's first script to run; false if it does not within the time limit.
    fn wait_for_boot(&mut self, out: &Path) -> Result<bool> {
        let started = Instant::now();
        while started.elapsed() < BOOT_TIMEOUT.mul_f32(load_factor()) {
            if out.join("started").exists() {
                return Ok(true);
            }
            if self.has_ended()? {
                bail!("QEMU ended before the kernel was up: {}", tail(&self.errors));
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(false)
    }

    /// Passes on the guest's log until the guest ends or the time is over; returns the script's exit status, if it ended.
    fn watch(&mut self, out: &Path, limit: Duration, on_line: &mut impl FnMut(&str)) -> Result<Option<i32>> {
        let started = Instant::now();
        let mut seen = 0;
        loop {
            let has_ended = self.has_ended()?;
            let done = fs::read_to_string(out.join("done")).ok();
            let status = done.and_then(|text| text.trim().parse().ok());
            let log = fs::read(out.join("log")).unwrap_or_default();
            let whole = log.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if whole > seen {
                String::from_utf8_lossy(&log[seen..whole]).lines().for_each(&mut *on_line);
                seen = whole;
            }
            if status.is_some() || has_ended || started.elapsed() > limit {
                return Ok(status);
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // A guest whose script has ended powers itself off.
        for _ in 0..15 {
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                return;
            }
            thread::sleep(POLL_INTERVAL);
        }
        if shell::is_root() {
            let _ = self.child.kill();
        } else {
            // sudo forwards signals.
            let _ = shell::quiet("sudo", &["kill", &self.child.id().to_string()]);
        }
        let _ = self.child.wait();
    }
}
