//! `cargo xtask setup`: installs what the other verbs need, after saying what and why.
//!
//! Knows Debian and Ubuntu (apt) and Fedora (dnf). A need is met when its program or file is
//! there, however it came; only then-missing packages are installed, in one go, by one sudo.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;

use crate::house;

/// What a verb is about to do; each brings its own needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Compile the workspace.
    Build,
    /// Run labs and the demo: namespaces, probes, captures.
    Lab,
    /// Run the coordinator's tests against a Postgres that they start.
    Database,
    /// Run the relay's tests against a certificate authority that they start.
    Authority,
    /// Run the lab of a node behind a proxy.
    Proxy,
    /// Run stock kernels in QEMU.
    Qemu,
    /// Build the User Mode Linux kernel.
    Uml,
}

/// A program or an absolute path, and the packages that have it.
struct Need {
    wanted: &'static str,
    debian: &'static str,
    fedora: &'static str,
    why: &'static str,
}

const fn need(
    wanted: &'static str,
    debian: &'static str,
    fedora: &'static str,
    why: &'static str,
) -> Need {
    Need {
        wanted,
        debian,
        fedora,
        why,
    }
}

const BUILD: &[Need] = &[need(
    "cc",
    "gcc libc6-dev",
    "gcc glibc-devel",
    "links the programs",
)];
const LAB: &[Need] = &[
    need("ip", "iproute2", "iproute", "makes namespaces and links"),
    need(
        "tc",
        "iproute2",
        "iproute-tc",
        "shapes and shows traffic control",
    ),
    need(
        "nft",
        "nftables",
        "nftables",
        "builds NATs and firewalls in labs",
    ),
    need(
        "wg",
        "wireguard-tools",
        "wireguard-tools",
        "shows WireGuard's state",
    ),
    need("ping", "iputils-ping", "iputils", "sends ICMP"),
    need(
        "tcpdump",
        "tcpdump",
        "tcpdump",
        "captures what a failing test saw",
    ),
    need(
        "miniupnpd",
        "miniupnpd-nftables",
        "miniupnpd",
        "opens ports of a lab's router",
    ),
    need("iperf3", "iperf3", "iperf3", "measures throughput"),
    need("nmap", "nmap", "nmap", "scans where a policy must hold"),
    need(
        "ps",
        "procps",
        "procps-ng",
        "lists processes of a failing test",
    ),
    need(
        "busybox",
        "busybox-static",
        "busybox",
        "is a guest's first program",
    ),
    need("unshare", "util-linux", "util-linux", "makes namespaces"),
    need(
        "script",
        "bsdutils",
        "util-linux-script",
        "gives a shell in namespaces a terminal",
    ),
];
const DATABASE: &[Need] = &[need(
    "postgres",
    "postgresql",
    "postgresql-server",
    "runs the store's tests on Postgres",
)];
// Fedora has no package of it: the tests are skipped there.
const AUTHORITY: &[Need] = &[need(
    "pebble",
    "pebble",
    "",
    "gives certificates to the relay's tests",
)];
const PROXY: &[Need] = &[need(
    "tinyproxy",
    "tinyproxy-bin",
    "tinyproxy",
    "is the only way out of a lab's network",
)];
const QEMU: &[Need] = &[
    need(
        "qemu-system-x86_64",
        "qemu-system-x86",
        "qemu-system-x86-core",
        "runs stock kernels",
    ),
    need(
        "busybox",
        "busybox-static",
        "busybox",
        "is a guest's first program",
    ),
    need("xz", "xz-utils", "xz", "unpacks a kernel's modules"),
];
const UML: &[Need] = &[
    need(
        "/usr/src/linux-source-6.12.tar.xz",
        "linux-source-6.12",
        "",
        "is the source of the User Mode Linux kernel",
    ),
    need("cc", "gcc libc6-dev", "gcc glibc-devel", "compiles it"),
    need("make", "make", "make", "builds it"),
    need("flex", "flex", "flex", "builds its configuration tools"),
    need("bison", "bison", "bison", "builds its configuration tools"),
    need("bc", "bc", "bc", "builds it"),
    need(
        "pahole",
        "dwarves",
        "dwarves",
        "gives it BTF, the types eBPF needs",
    ),
    need(
        "/usr/include/libelf.h",
        "libelf-dev",
        "elfutils-libelf-devel",
        "gives it BTF",
    ),
    need("xz", "xz-utils", "xz", "unpacks its source"),
    need(
        "busybox",
        "busybox-static",
        "busybox",
        "is a guest's first program",
    ),
];

fn needs(purpose: Purpose) -> &'static [Need] {
    match purpose {
        Purpose::Build => BUILD,
        Purpose::Lab => LAB,
        Purpose::Database => DATABASE,
        Purpose::Authority => AUTHORITY,
        Purpose::Proxy => PROXY,
        Purpose::Qemu => QEMU,
        Purpose::Uml => UML,
    }
}

/// The verb: everything that `demo` and `test` may need on this machine.
pub fn run_verb() -> anyhow::Result<u8> {
    for_tests()?;
    if cfg!(target_arch = "x86_64") && Family::here()? == Family::Debian {
        ensure(&[Purpose::Qemu])?;
    }
    println!("Everything needed is here.");
    Ok(0)
}

/// What tests need before they are built; emulated kernels bring their own needs.
pub fn for_tests() -> anyhow::Result<()> {
    ensure(&[Purpose::Build, Purpose::Lab, Purpose::Database])?;
    // Not every distribution has a package of each.
    for purpose in [Purpose::Authority, Purpose::Proxy] {
        if let Err(error) = ensure(&[purpose]) {
            eprintln!("xtask setup: {error:#}; tests that need it are skipped");
        }
    }
    Ok(())
}

/// Installs what is missing for the purposes. Returns at once when nothing is.
pub fn ensure(purposes: &[Purpose]) -> anyhow::Result<()> {
    let missing: Vec<&Need> = purposes
        .iter()
        .flat_map(|&purpose| needs(purpose))
        .filter(|need| !is_there(need.wanted))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let family = Family::here()?;
    let mut packages = BTreeSet::new();
    for need in &missing {
        let names = family.packages(need);
        anyhow::ensure!(
            !names.is_empty(),
            "{} is missing ({}), and this distribution has no package of it",
            need.wanted,
            need.why
        );
        if names.split(' ').any(|name| packages.insert(name)) {
            eprintln!("xtask setup: {names} is missing: it {}", need.why);
        }
    }
    install(family, &packages)?;
    for need in missing {
        anyhow::ensure!(
            is_there(need.wanted),
            "{} is still missing after installing {}",
            need.wanted,
            family.packages(need)
        );
    }
    Ok(())
}

fn is_there(wanted: &str) -> bool {
    if wanted.starts_with('/') {
        return Path::new(wanted).exists();
    }
    if wanted == "postgres" {
        return postgres_folder().is_some() || house::program(wanted).is_some();
    }
    house::program(wanted).is_some()
}

/// Where Debian keeps the server's programs, outside PATH.
fn postgres_folder() -> Option<std::path::PathBuf> {
    std::fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .map(|version| version.path().join("bin"))
        .find(|bin| bin.join("initdb").is_file())
}

fn install(family: Family, packages: &BTreeSet<&str>) -> anyhow::Result<()> {
    let root = rustix::process::geteuid().is_root();
    let names: Vec<&str> = packages.iter().copied().collect();
    let shown = family.install_line(&names);
    if !root {
        anyhow::ensure!(
            std::io::stdin().is_terminal(),
            "packages are missing; install them with:\n    sudo {shown}"
        );
        anyhow::ensure!(
            house::program("sudo").is_some(),
            "packages are missing and there is no sudo; as root run:\n    {shown}"
        );
        eprint!("xtask setup: run `sudo {shown}` now? [Y/n] ");
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        let yes = matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes");
        anyhow::ensure!(yes, "nothing was installed");
    }
    eprintln!("xtask setup: {shown}");
    let script = match family {
        // A fresh machine has no package lists, an old one has stale ones.
        Family::Debian => format!("apt-get -q update && {shown}"),
        Family::Fedora => shown.clone(),
    };
    let mut command = Command::new(if root { "sh" } else { "sudo" });
    if !root {
        command.arg("sh");
    }
    command
        .args(["-c", &script])
        .env("DEBIAN_FRONTEND", "noninteractive");
    // Our stdout may be a command's output; the installer talks on stderr.
    command.stdout(std::io::stderr());
    let status = command.status().context("cannot run the package manager")?;
    anyhow::ensure!(status.success(), "`{shown}` failed; its words are above");
    Ok(())
}

/// Lets apt read its package lists anew, if we may without asking. What comes of it shows in
/// what apt then knows.
pub fn refresh_lists() {
    let (program, first) = match rustix::process::geteuid().is_root() {
        true => ("apt-get", None),
        false => ("sudo", Some(["-n", "apt-get"])),
    };
    let mut command = Command::new(program);
    command
        .args(first.into_iter().flatten())
        .args(["-q", "update"]);
    let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// The distributions that we know the packages of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    Debian,
    Fedora,
}

impl Family {
    pub fn here() -> anyhow::Result<Family> {
        let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        Family::of(&release).context(
            "this is neither Debian, Ubuntu nor Fedora: install the programs by hand \
             (xtask/src/setup.rs lists them) and run the verb again",
        )
    }

    fn of(os_release: &str) -> Option<Family> {
        let words: Vec<String> = os_release
            .lines()
            .filter_map(|line| {
                line.strip_prefix("ID=")
                    .or_else(|| line.strip_prefix("ID_LIKE="))
            })
            .flat_map(|value| value.trim_matches('"').split(' ').map(str::to_owned))
            .collect();
        let is = |name: &str| words.iter().any(|word| word == name);
        if is("debian") || is("ubuntu") {
            Some(Family::Debian)
        } else if is("fedora") || is("rhel") {
            Some(Family::Fedora)
        } else {
            None
        }
    }

    fn packages(self, need: &Need) -> &'static str {
        match self {
            Family::Debian => need.debian,
            Family::Fedora => need.fedora,
        }
    }

    fn install_line(self, names: &[&str]) -> String {
        let names = names.join(" ");
        match self {
            Family::Debian => format!("apt-get -q install -y --no-install-recommends {names}"),
            Family::Fedora => format!("dnf -q install -y {names}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_are_known_by_their_family() {
        assert_eq!(Family::of("ID=debian\n"), Some(Family::Debian));
        assert_eq!(
            Family::of("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"),
            Some(Family::Debian)
        );
        assert_eq!(
            Family::of("NAME=\"Fedora Linux\"\nID=fedora\n"),
            Some(Family::Fedora)
        );
        assert_eq!(
            Family::of("ID=rocky\nID_LIKE=\"rhel centos fedora\"\n"),
            Some(Family::Fedora)
        );
        assert_eq!(Family::of("ID=alpine\n"), None);
        assert_eq!(Family::of("VERSION_ID=debian\n"), None);
    }

    #[test]
    fn every_need_says_why_and_has_a_package_for_debian() {
        for purpose in [
            Purpose::Build,
            Purpose::Lab,
            Purpose::Database,
            Purpose::Authority,
            Purpose::Proxy,
            Purpose::Qemu,
            Purpose::Uml,
        ] {
            for need in needs(purpose) {
                assert!(!need.debian.is_empty(), "{}", need.wanted);
                assert!(!need.why.is_empty(), "{}", need.wanted);
            }
        }
    }
}
