//! A topology, made of network namespaces, and gone again at its end.
//!
//! All switches are bridges in one namespace, the fabric; every host has a namespace of its own
//! and a veth pair to each of its switches. Nothing is made in the namespace that the lab was
//! started in.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context;

use crate::evidence;
use crate::host::Host;
use crate::process;
use crate::topology::{HostPlan, Topology};

/// Every packet of every interface of a host, its tunnel too: heads only, and no more than 64 MB.
const CAPTURE: &str = "tcpdump -i any -n -U -s 128 -C 64 -W 1 -Z root -w capture.pcap";

/// What cables take if nobody says otherwise, in bytes.
const MTU: u32 = 1_500;
/// How long making or removing all namespaces of a lab may take.
const BUILD_BOUND: Duration = Duration::from_secs(60);

/// A living topology. Call [`Lab::passed`] at the end of a test: a lab that goes without leaves
/// its evidence in the results folder.
pub struct Lab {
    /// What it is called: the test's name.
    pub name: String,
    /// The files of this lab; a folder for each host.
    pub folder: PathBuf,
    hosts: BTreeMap<String, Arc<Host>>,
    /// Start of the names of its namespaces: no two labs on a machine share one.
    prefix: String,
    /// Keeps the folder until the lab is gone.
    _folder: tempfile::TempDir,
    passed: bool,
}

impl Lab {
    /// Makes a topology, with a capture running on every host.
    ///
    /// # Errors
    /// If we are not root, or a tool that it needs is missing.
    pub fn new(name: &str, topology: &Topology) -> anyhow::Result<Self> {
        let lab = Self::without_captures(name, topology)?;
        for host in lab.hosts.values() {
            host.start("capture", CAPTURE)?;
        }
        Ok(lab)
    }

    /// Makes a topology; nothing listens in.
    ///
    /// # Errors
    /// If we are not root, or a tool that it needs is missing.
    pub fn without_captures(name: &str, topology: &Topology) -> anyhow::Result<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("weir{}-{number}", std::process::id());
        let folder = tempfile::Builder::new().prefix("weir-lab-").tempdir()?;
        let mut lab = Self {
            name: name.to_owned(),
            folder: folder.path().to_owned(),
            hosts: BTreeMap::new(),
            prefix,
            _folder: folder,
            passed: false,
        };
        lab.build(topology)
            .with_context(|| format!("cannot build the lab {name}"))?;
        Ok(lab)
    }

    /// The host of that name.
    ///
    /// # Panics
    /// If the topology has none.
    #[must_use]
    pub fn host(&self, name: &str) -> Arc<Host> {
        let found = self.hosts.get(name);
        Arc::clone(found.unwrap_or_else(|| panic!("no host {name} in this topology")))
    }

    /// All hosts, by name.
    #[must_use]
    pub fn hosts(&self) -> &BTreeMap<String, Arc<Host>> {
        &self.hosts
    }

    /// Unplugs a host from its first switch, or plugs it in again.
    ///
    /// # Errors
    /// If the cable is not there.
    pub fn plug(&self, host: &str, plugged: bool) -> anyhow::Result<()> {
        self.plug_link(host, 0, plugged)
    }

    /// The same with its cable to its switch of this number.
    ///
    /// # Errors
    /// If the cable is not there.
    pub fn plug_link(&self, host: &str, number: usize, plugged: bool) -> anyhow::Result<()> {
        let state = if plugged { "up" } else { "down" };
        let fabric = self.netns("fabric");
        batch(
            Some(&fabric),
            &format!("link set {} {state}\n", port(host, number)),
        )
    }

    /// Ends the lab without evidence: all went well.
    pub fn passed(mut self) {
        self.passed = true;
    }

    /// A shell in which every host is a command: `web weir status`; a host's name alone is a
    /// shell on it. Returns the shell's exit code.
    ///
    /// # Errors
    /// If there is no terminal or no shell.
    pub fn shell(&self) -> anyhow::Result<u8> {
        use std::io::IsTerminal;
        anyhow::ensure!(std::io::stdin().is_terminal(), "a shell needs a terminal");
        let names: Vec<&str> = self.hosts.keys().map(String::as_str).collect();
        println!("\nMachines: {}", names.join(" "));
        println!(
            "Each is a command: `{} ip addr`, or alone for a shell there.",
            names[0]
        );
        println!("`exit` ends it, and all of it is gone.\n");
        self.within(&["sh".to_owned(), "-i".to_owned()])
    }

    /// Runs a command that finds every host as a command, and returns its exit code.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn within(&self, command: &[String]) -> anyhow::Result<u8> {
        let doors = self.doors()?;
        let (program, arguments) = command.split_first().context("no command")?;
        let path = std::env::var("PATH").unwrap_or_default();
        let status = Command::new(program)
            .args(arguments)
            .env("PATH", format!("{}:{path}", doors.display()))
            .env("PS1", "lab$ ")
            .status()
            .with_context(|| format!("cannot start `{program}`"))?;
        Ok(status
            .code()
            .and_then(|code| code.try_into().ok())
            .unwrap_or(1))
    }

    /// A folder with one command for each host, named after it, that runs its arguments there,
    /// and with links to our binaries.
    fn doors(&self) -> anyhow::Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let folder = self.folder.join("bin");
        std::fs::create_dir_all(&folder)?;
        for binary in ["weir", "weir-coordinator", "weir-relay"] {
            if let (Ok(file), link) = (crate::binary(binary), folder.join(binary))
                && !link.exists()
            {
                std::os::unix::fs::symlink(file, link)?;
            }
        }
        for host in self.hosts.values() {
            let file = folder.join(&host.name);
            std::fs::write(&file, host.door()?)?;
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(folder)
    }

    fn netns(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn build(&mut self, topology: &Topology) -> anyhow::Result<()> {
        let fabric = self.netns("fabric");
        let mut outside = format!("netns add {fabric}\n");
        let mut switches = String::new();
        for switch in &topology.switches {
            // No learning delay, no querier: a switch as dumb as a cable.
            writeln!(
                switches,
                "link add {switch} type bridge forward_delay 0 mcast_snooping 0"
            )?;
            writeln!(switches, "link set {switch} up")?;
        }
        for plan in &topology.hosts {
            writeln!(outside, "netns add {}", self.netns(&plan.name))?;
            for (number, (switch, _)) in plan.links.iter().enumerate() {
                let (netns, port) = (self.netns(&plan.name), port(&plan.name, number));
                let mtu = topology.mtus.get(switch).copied().unwrap_or(MTU);
                writeln!(
                    outside,
                    "link add eth{number} netns {netns} mtu {mtu} type veth \
                     peer name {port} netns {fabric} mtu {mtu}"
                )?;
                writeln!(switches, "link set {port} master {switch} up")?;
            }
        }
        batch(None, &outside)?;
        batch(Some(&fabric), &switches)?;
        for plan in &topology.hosts {
            let netns = self.netns(&plan.name);
            let host = Host::new(plan, &netns, self.folder.join(&plan.name))?;
            host.enter(|| no_duplicate_detection(plan.links.len()))?;
            batch(Some(&netns), &configuration(plan)?)?;
            self.hosts.insert(plan.name.clone(), Arc::new(host));
        }
        Ok(())
    }

    fn remove(&self) -> anyhow::Result<()> {
        for host in self.hosts.values() {
            host.end();
        }
        let mut names = String::new();
        for entry in std::fs::read_dir("/run/netns")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("{}-", self.prefix)) {
                writeln!(names, "netns del {name}")?;
            }
        }
        batch(None, &names)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.passed {
            match evidence::collect(self) {
                Ok(folder) => eprintln!("evidence of {}: {}", self.name, folder.display()),
                Err(error) => eprintln!("no evidence of {}: {error:#}", self.name),
            }
        }
        if let Err(error) = self.remove() {
            eprintln!("the lab {} left something behind: {error:#}", self.name);
        }
    }
}

/// The switch's end of a host's cable.
fn port(host: &str, number: usize) -> String {
    format!("{host}.{number}")
}

/// Switches duplicate address detection off on the interfaces of the namespace that we are in: it
/// would hold every IPv6 address back for seconds, and nobody here has the same one.
fn no_duplicate_detection(interfaces: usize) -> anyhow::Result<()> {
    for number in 0..interfaces {
        std::fs::write(
            format!("/proc/sys/net/ipv6/conf/eth{number}/accept_dad"),
            "0",
        )?;
    }
    Ok(())
}

/// What a host's namespace needs: addresses and routes.
fn configuration(plan: &HostPlan) -> anyhow::Result<String> {
    let mut lines = String::from("link set lo up\n");
    for (number, (_, addrs)) in plan.links.iter().enumerate() {
        for addr in addrs {
            writeln!(lines, "addr add {addr} dev eth{number}")?;
        }
        writeln!(lines, "link set eth{number} up")?;
    }
    for (prefix, gateway) in &plan.routes {
        writeln!(lines, "route add {prefix} via {gateway}")?;
    }
    Ok(lines)
}

/// Runs several `ip` commands in one process, in a namespace or in the one we are in.
fn batch(netns: Option<&str>, lines: &str) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    command.args(["-batch", "-"]);
    process::run(&mut command, lines, BUILD_BOUND)?.success()?;
    Ok(())
}

/// The folder for what outlives a lab: the variable `WEIR_RESULTS`, else `results` here.
#[must_use]
pub fn results() -> PathBuf {
    std::env::var_os("WEIR_RESULTS").map_or_else(|| Path::new("results").to_owned(), PathBuf::from)
}
