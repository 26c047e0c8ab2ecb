//! Builds an initramfs for a kernel, which mounts the host's root read-only over 9p with an in-memory overlay and
//! switches to it. So a virtual machine needs no disk image and runs the host's programs.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use super::packages::{Tools, Unpacked};

/// Modules that the guest needs to mount the host's files.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for m in /m/*; do insmod $m || echo "insmod $m failed"; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /lower || echo "cannot mount the root of the host"
mount -t tmpfs t /upper; mkdir /upper/u /upper/w
mount -t overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w o /root || echo "cannot mount the overlay"
for f in proc sys dev; do mount --move /$f /root/$f; done
mount -t tmpfs t /root/run; mkdir -p /root/run/out /root/dev/pts /root/run/netns
mount -t devpts p /root/dev/pts
mount -t 9p -o rw,trans=virtio,version=9p2000.L,msize=524288 out /root/run/out || echo "cannot mount the directory of results"
exec switch_root /root /bin/sh /run/out/init.sh
"#;

/// Builds the initramfs as `file`.
pub fn build(tools: &Tools, kernel: &Unpacked, file: &Path) -> Result<()> {
    index_modules(tools, kernel)?;
    let root = file.with_extension("root");
    let _ = fs::remove_dir_all(&root);
    for directory in ["bin", "m", "proc", "sys", "dev", "lower", "upper", "root"] {
        fs::create_dir_all(root.join(directory))
            .with_context(|| format!("cannot create {}", root.display()))?;
    }
    let busybox = tools.busybox()?;
    fs::copy(&busybox, root.join("bin/busybox")).context("cannot copy busybox")?;
    for (number, module) in modules(tools, kernel)?.iter().enumerate() {
        copy_module(&busybox, module, &root.join("m"), number)?;
    }
    let init = root.join("init");
    fs::write(&init, INIT).with_context(|| format!("cannot write {}", init.display()))?;
    make_executable(&init)?;
    pack(&busybox, &root, file)?;
    fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))
}

/// Creates the module index, which Debian's packages create only when they are installed.
fn index_modules(tools: &Tools, kernel: &Unpacked) -> Result<()> {
    let release = &kernel.kernel.release;
    if kernel.root.join("lib/modules").join(release).join("modules.dep").exists() {
        return Ok(());
    }
    let mut depmod = tools.kmod("depmod")?;
    depmod.arg("-b").arg(&kernel.root).arg(release);
    let output = depmod.output().context("cannot start depmod")?;
    ensure!(output.status.success(), "depmod {release}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Returns the files of [`MODULES`] and of their dependencies, in load order. Built-in modules have no file.
fn modules(tools: &Tools, kernel: &Unpacked) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let mut modprobe = tools.kmod("modprobe")?;
        modprobe.arg("-d").arg(&kernel.root).args(["-S", &kernel.kernel.release, "--show-depends", module]);
        let output = modprobe.output().context("cannot start modprobe")?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Some(path) = line.strip_prefix("insmod ") else { continue };
            let path = PathBuf::from(path.trim());
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    ensure!(!files.is_empty(), "{} has none of the modules {}", kernel.kernel.release, MODULES.join(", "));
    Ok(files)
}

/// Copies a module and decompresses it, because busybox loads only plain modules.
fn copy_module(busybox: &Path, module: &Path, directory: &Path, number: usize) -> Result<()> {
    let name = module.file_name().context("a module has a file name")?.to_string_lossy().into_owned();
    let to = |name: &str| directory.join(format!("{:03}-{name}", number));
    if let Some(plain) = name.strip_suffix(".xz") {
        let mut xz = Command::new(busybox);
        xz.args(["xz", "-dc"]).arg(module);
        return run_into(&mut xz, &to(plain));
    }
    if name.ends_with(".zst") {
        bail!("{} is compressed with zstd, which is not supported", module.display());
    }
    fs::copy(module, to(&name)).with_context(|| format!("cannot copy {}", module.display())).map(drop)
}

fn pack(busybox: &Path, root: &Path, file: &Path) -> Result<()> {
    let script = r#"cd "$1" && find . | "$2" cpio -o -H newc 2>/dev/null | gzip -1"#;
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "pack"]).arg(root).arg(busybox);
    run_into(&mut shell, file)
}

fn run_into(command: &mut Command, file: &Path) -> Result<()> {
    let output = File::create(file).with_context(|| format!("cannot create {}", file.display()))?;
    let status = command.stdout(Stdio::from(output)).status();
    let status = status.with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn make_executable(file: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", file.display()))
}
