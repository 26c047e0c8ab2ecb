//! Fetches QEMU and kernels as Debian packages and unpacks them into a cache. Nothing is installed: apt runs with
//! separate sources, package lists and cache, from the mirror that the machine's apt uses, and checks signatures and
//! checksums as usual.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use super::version::Version;
use crate::shell;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const LISTS_FRESH: Duration = Duration::from_secs(24 * 3600);

/// Suites that have or had kernels of other lines than the machine's release. Suites that the mirror no longer has are
/// skipped.
const KERNEL_SUITES: [&str; 6] =
    ["bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports", "sid"];
/// Packages for QEMU and the initramfs; they are fetched even if they are installed.
const TOOLS: [&str; 6] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "busybox-static", "kmod"];

/// A kernel in the package lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// Version of the package.
    pub version: String,
    /// Packages: one, or since 6.19 an image, a base and modules.
    packages: Vec<String>,
}

/// An unpacked kernel in the cache.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// The kernel.
    pub kernel: Kernel,
    /// Path of the compressed image.
    pub image: PathBuf,
    /// Directory whose `lib/modules` has the kernel's modules.
    pub root: PathBuf,
}

/// The unpacked tools: QEMU, busybox, kmod, and the libraries that the machine lacks.
#[derive(Clone, Debug)]
pub struct Tools {
    root: PathBuf,
    /// QEMU's version.
    pub version: String,
}

impl Tools {
    /// Returns a path below the tools' root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Returns the search path of the unpacked libraries.
    pub fn libraries(&self) -> String {
        let directories = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
        directories.map(|name| self.path(name).display().to_string()).join(":")
    }

    /// Returns a command that runs kmod as one of its tools.
    pub fn kmod(&self, tool: &str) -> Result<Command> {
        let directory = self.path("kmod-links");
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let link = directory.join(tool);
        if !link.exists() {
            std::os::unix::fs::symlink(self.kmod_program()?, &link)
                .with_context(|| format!("cannot link {}", link.display()))?;
        }
        let mut command = Command::new(link);
        command.env("LD_LIBRARY_PATH", self.libraries());
        Ok(command)
    }

    /// Returns the path of the kmod program.
    pub fn kmod_program(&self) -> Result<PathBuf> {
        first_file(&[self.path("usr/bin/kmod"), self.path("bin/kmod")])
    }

    /// Returns the path of a statically linked busybox.
    pub fn busybox(&self) -> Result<PathBuf> {
        first_file(&[self.path("usr/bin/busybox"), self.path("bin/busybox")])
    }
}

fn first_file(candidates: &[PathBuf]) -> Result<PathBuf> {
    let found = candidates.iter().find(|path| path.is_file());
    found.cloned().with_context(|| format!("the package does not contain {}", candidates[0].display()))
}

/// The sources of the machine's apt: the release's code name, the archive, the security archive.
#[derive(Debug)]
struct Mirror {
    codename: String,
    archive: String,
    security: Option<String>,
}

/// Returns why kernels cannot be fetched on this machine, if so.
pub fn unsuitable() -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some(format!(
            "kernels are available for x86-64 only, but this machine is {}",
            std::env::consts::ARCH
        ));
    }
    if ["apt-get", "apt-cache", "dpkg-deb"].iter().any(|program| shell::which(program).is_none()) {
        return Some("kernels are fetched as Debian packages, but this machine has no apt".into());
    }
    match os_release("ID") {
        Some(id) if id == "debian" => None,
        id => Some(format!(
            "kernels are fetched as Debian packages, but this machine runs {}",
            id.as_deref().unwrap_or("unknown")
        )),
    }
}

fn os_release(key: &str) -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim_matches('"').to_owned())
}

impl Mirror {
    fn of_this_machine() -> Result<Self> {
        let codename = os_release("VERSION_CODENAME").context("/etc/os-release has no VERSION_CODENAME")?;
        let targets = shell::quiet(
            "apt-get",
            &["indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"],
        )
        .context("apt-get cannot list this machine's package sources")?;
        let archive = mirror_of(&targets, &codename)
            .with_context(|| format!("apt has no package source for {codename}"))?;
        Ok(Self { security: mirror_of(&targets, &format!("{codename}-security")), archive, codename })
    }
}

/// Finds the address of a release in lines of release and address.
fn mirror_of(targets: &str, release: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let (name, uri) = line.split_once(' ')?;
        (name == release).then(|| uri.trim_end_matches('/').to_owned())
    })
}

/// An apt with separate package lists and cache.
#[derive(Debug)]
pub struct Apt {
    home: PathBuf,
    downloads: PathBuf,
}

impl Apt {
    fn new(home: PathBuf, downloads: PathBuf, sources: &str) -> Result<Self> {
        for directory in [home.join("lists/partial"), home.join("cache/archives/partial"), downloads.clone()]
        {
            fs::create_dir_all(&directory)
                .with_context(|| format!("cannot create {}", directory.display()))?;
        }
        let apt = Self { home, downloads };
        let file = apt.sources();
        if fs::read_to_string(&file).is_ok_and(|text| text == sources) {
            return Ok(apt);
        }
        let _ = fs::remove_file(apt.stamp());
        fs::write(&file, sources).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(apt)
    }

    fn sources(&self) -> PathBuf {
        self.home.join("sources.list")
    }

    fn stamp(&self) -> PathBuf {
        self.home.join("refreshed")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let home = self.home.display();
        for option in [
            format!("Dir::Etc::sourcelist={}", self.sources().display()),
            "Dir::Etc::sourceparts=/dev/null".into(),
            format!("Dir::State::lists={home}/lists"),
            format!("Dir::Cache={home}/cache"),
            "APT::Sandbox::User=".into(),
            "APT::Architecture=amd64".into(),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=3".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            "Acquire::IndexTargets::deb::CNF::DefaultEnabled=false".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command.current_dir(&self.downloads).env("LC_ALL", "C");
        command
    }

    /// Fetches the package lists if they are older than a day. Reports and skips lists that cannot be fetched: later
    /// errors name the packages that are missing.
    fn refresh(&self, what: &str) -> Result<()> {
        let is_fresh = fs::metadata(self.stamp())
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age < LISTS_FRESH));
        if is_fresh {
            return Ok(());
        }
        let mut update = self.command("apt-get");
        match shell::with_progress(&format!("fetching the package lists of {what}"), update.arg("update")) {
            Ok(_) => fs::write(self.stamp(), "").context("cannot record when the package lists were fetched"),
            Err(error) => {
                eprintln!("  cannot fetch some package lists: {error:#}");
                Ok(())
            }
        }
    }

    /// Fetches `packages` (NAME=VERSION) and atomically creates `folder` with their contents.
    fn unpack(&self, what: &str, packages: &[String], folder: &Path) -> Result<()> {
        let part = folder.with_extension("part");
        let _ = fs::remove_dir_all(&part);
        fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
        let mut download = self.command("apt-get");
        download.arg("download").args(packages);
        shell::with_progress(&format!("downloading {what}"), &mut download)?;
        for package in packages {
            let file = self.downloaded(package)?;
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("-x").arg(&file).arg(&part);
            let output = unpack.output().context("cannot start dpkg-deb")?;
            ensure!(
                output.status.success(),
                "cannot unpack {}: {}",
                file.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
            let _ = fs::remove_file(file);
        }
        fs::rename(&part, folder).with_context(|| format!("cannot rename {}", part.display()))
    }

    /// Finds the file that `apt-get download NAME=VERSION` created.
    fn downloaded(&self, package: &str) -> Result<PathBuf> {
        let (name, version) = package.split_once('=').context("a package is not in the form NAME=VERSION")?;
        let start = format!("{name}_{}_", version.replace(':', "%3a"));
        let entries = fs::read_dir(&self.downloads)
            .with_context(|| format!("cannot read {}", self.downloads.display()))?;
        let mut paths = entries.flatten().map(|entry| entry.path());
        paths
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&start) && name.ends_with(".deb")
            })
            .with_context(|| format!("apt-get did not download {start}….deb"))
    }
}

/// The cache, and two sets of package lists: those of this release for the tools, several for kernels.
#[derive(Debug)]
pub struct Store {
    cache: PathBuf,
    own: Apt,
    others: Apt,
    codename: String,
}

impl Store {
    /// Opens the cache and refreshes its package lists.
    pub fn open() -> Result<Self> {
        let mirror = Mirror::of_this_machine()?;
        let cache = cache()?;
        let signed =
            if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let line = |archive: &str, suite: &str| format!("deb {signed}{archive} {suite} main\n");
        let security = |suite: &str| {
            mirror
                .security
                .as_ref()
                .map_or(String::new(), |archive| line(archive, &format!("{suite}-security")))
        };
        let codename = mirror.codename.clone();
        let own = line(&mirror.archive, &codename)
            + &line(&mirror.archive, &format!("{codename}-backports"))
            + &security(&codename);
        let others: String =
            KERNEL_SUITES.iter().map(|suite| line(&mirror.archive, suite)).collect::<String>()
                + &security("bookworm");
        let store = Self {
            own: Apt::new(cache.join("apt-own"), cache.join("downloads"), &own)?,
            others: Apt::new(cache.join("apt-kernels"), cache.join("downloads"), &others)?,
            cache,
            codename,
        };
        store.own.refresh("this release")?;
        store.others.refresh("the releases that have kernels")?;
        Ok(store)
    }

    /// Fetches QEMU and the tools that build an initramfs.
    pub fn tools(&self) -> Result<Tools> {
        let backports = format!("{}-backports", self.codename);
        let packages = self.missing_packages(&["-t", &backports]).or_else(|_| self.missing_packages(&[]))?;
        let qemu = packages.iter().find(|package| package.starts_with("qemu-system-x86="));
        let version = match qemu.and_then(|package| package.split_once('=')) {
            Some((_, version)) => version.to_owned(),
            None => bail!(
                "apt does not offer qemu-system-x86: check for broken dependencies with `apt-get check`"
            ),
        };
        let folder = self.cache.join(format!("tools-{}", version.replace([':', '~', '+'], "_")));
        if !folder.is_dir() {
            self.own.unpack(&format!("QEMU {version}, busybox and kmod"), &packages, &folder)?;
        }
        Ok(Tools { root: folder, version })
    }

    /// Returns the packages that this machine would have to install for the tools.
    fn missing_packages(&self, options: &[&str]) -> Result<Vec<String>> {
        let mut simulate = self.own.command("apt-get");
        simulate.args(["-s", "-y", "--no-install-recommends", "--reinstall"]).args(options);
        simulate.arg("install").args(TOOLS);
        let output = simulate.output().context("cannot start apt-get")?;
        let simulation = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "apt cannot find {}: {}",
            TOOLS.join(", "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(parse_simulation(&simulation))
    }

    /// Returns every kernel in the package lists.
    pub fn kernels(&self) -> Result<Vec<Kernel>> {
        let mut search = self.others.command("apt-cache");
        search.args(["search", "--names-only", "^linux-image-[0-9]+[.][0-9]+[.][0-9].*-amd64$"]);
        let found =
            shell::with_output(&mut search, &[]).context("apt-cache cannot search the package lists")?;
        let names: Vec<&str> = found
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| is_plain(name))
            .collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut show = self.others.command("apt-cache");
        show.arg("show").args(&names);
        let stanzas =
            shell::with_output(&mut show, &[]).context("apt-cache cannot show the kernel packages")?;
        Ok(parse_kernels(&stanzas))
    }

    /// Fetches a kernel unless it is in the cache.
    pub fn unpack(&self, kernel: &Kernel) -> Result<Unpacked> {
        let root = self.cache.join("kernels").join(format!("{}_{}", kernel.release, kernel.version));
        fs::create_dir_all(root.parent().expect("the path has a parent directory"))
            .context("cannot create the cache")?;
        if !root.is_dir() {
            let packages: Vec<String> =
                kernel.packages.iter().map(|name| format!("{name}={}", kernel.version)).collect();
            self.others.unpack(&format!("kernel {}", kernel.release), &packages, &root)?;
        }
        // kmod searches lib, which packages of a merged /usr do not have.
        if !root.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("cannot link lib")?;
        }
        let release = &kernel.release;
        let images = [format!("boot/vmlinuz-{release}"), format!("usr/lib/modules/{release}/vmlinuz")];
        let image = first_file(&images.map(|name| root.join(name)))?;
        Ok(Unpacked { kernel: kernel.clone(), image, root })
    }
}

/// Returns the cache directory: `$LB_CACHE_DIR/kernels`, else `$XDG_CACHE_HOME/lb-kernels`, else `~/.cache/lb-kernels`.
fn cache() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = var("LB_CACHE_DIR")
        .map(|directory| directory.join("kernels"))
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("lb-kernels")))
        .or_else(|| Some(var("HOME")?.join(".cache/lb-kernels")))
        .context("none of LB_CACHE_DIR, XDG_CACHE_HOME and HOME is set: set one of them to choose the cache directory")?;
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

/// Parses the lines `Inst NAME [OLD] (VERSION SUITE [ARCH])` that `apt-get -s install` prints.
fn parse_simulation(output: &str) -> Vec<String> {
    output
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
            let version = rest.split_once('(')?.1.split(' ').next()?;
            Some(format!("{name}={version}"))
        })
        .collect()
}

/// Whether a kernel package is a plain one: not cloud, real-time, unsigned, or with debugging symbols.
fn is_plain(name: &str) -> bool {
    !["-cloud-", "-rt-", "-unsigned", "-dbg", "-16k-"].iter().any(|part| name.contains(part))
}

/// Parses kernels from the stanzas of `apt-cache show`: each version once, without release candidates.
fn parse_kernels(stanzas: &str) -> Vec<Kernel> {
    let mut all: Vec<Kernel> = Vec::new();
    for stanza in stanzas.split("\n\n") {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let (Some(package), Some(version)) = (field("Package"), field("Version")) else { continue };
        let Some(release) = package.strip_prefix("linux-image-") else { continue };
        if version.contains("~rc")
            || all.iter().any(|kernel| kernel.version == version && kernel.release == release)
        {
            continue;
        }
        let needed = field("Depends").unwrap_or_default().split(", ").filter_map(|one| one.split(' ').next());
        let parts = needed.filter(|name| name.starts_with("linux-") && name.ends_with(release));
        let packages = std::iter::once(package).chain(parts).map(str::to_owned).collect();
        all.push(Kernel { release: release.to_owned(), version: version.to_owned(), packages });
    }
    all.sort_by_key(|kernel| Version::parse(&kernel.version));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_read_with_all_their_packages_in_the_order_of_their_versions() {
        let stanzas = "Package: linux-image-7.3.4+deb13-amd64\nVersion: 7.3.4-1~bpo13+1\nDepends: dracut | initramfs-tools, \
            linux-base-7.3.4+deb13-amd64 (= 7.3.4-1~bpo13+1), linux-modules-7.3.4+deb13-amd64 (= 7.3.4-1~bpo13+1)\n\n\
            Package: linux-image-6.1.0-56-amd64\nVersion: 6.1.192-2\nDepends: kmod, linux-base (>= 4.3~)\n\n\
            Package: linux-image-7.4.0-amd64\nVersion: 7.4~rc7-1~exp1\n\n\
            Package: linux-image-6.1.0-56-amd64\nVersion: 6.1.192-2\n";
        let kernels = parse_kernels(stanzas);
        let releases: Vec<_> = kernels.iter().map(|kernel| kernel.release.as_str()).collect();
        assert_eq!(releases, ["6.1.0-56-amd64", "7.3.4+deb13-amd64"]);
        assert_eq!(kernels[0].packages, ["linux-image-6.1.0-56-amd64"]);
        assert_eq!(
            kernels[1].packages,
            [
                "linux-image-7.3.4+deb13-amd64",
                "linux-base-7.3.4+deb13-amd64",
                "linux-modules-7.3.4+deb13-amd64"
            ]
        );
    }

    #[test]
    fn what_apt_would_install_is_read_from_its_simulation() {
        let said = "Reading package lists...\nInst kmod (30-1 Debian:12/stable [amd64])\nConf kmod (30-1 Debian)\n\
                    Inst qemu-system-x86 [1:7.2] (1:10.0.2+ds-2 Debian Backports [amd64]) []\n";
        assert_eq!(parse_simulation(said), ["kmod=30-1", "qemu-system-x86=1:10.0.2+ds-2"]);
    }

    #[test]
    fn the_mirror_is_the_one_that_apt_uses() {
        let targets = "bookworm http://mirror.test/debian/\nbookworm-security http://mirror.test/security/\n";
        assert_eq!(mirror_of(targets, "bookworm").as_deref(), Some("http://mirror.test/debian"));
        assert_eq!(mirror_of(targets, "bookworm-security").as_deref(), Some("http://mirror.test/security"));
        assert_eq!(mirror_of(targets, "trixie"), None);
    }

    #[test]
    fn kernels_for_special_uses_are_left_out() {
        assert!(is_plain("linux-image-6.1.0-56-amd64"));
        for name in ["linux-image-6.1.0-56-cloud-amd64", "linux-image-6.1.0-56-rt-amd64"] {
            assert!(!is_plain(name), "{name}");
        }
    }
}
