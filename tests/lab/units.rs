//! The units as systemd runs them: their sandboxes, readiness, watchdog and restarts.
//!
//! A systemd of the machine's own version is process 1 of a host's mount and process namespaces,
//! with `/run` and `/var/lib` of its own and the committed units in it, less three things: programs
//! and configuration are found elsewhere, nothing else of the machine is started, and the watchdog
//! is quicker. It manages the control groups of the whole kernel, so it needs a guest.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Mesh, SPREAD_BOUND};
use tests::probe::{PASS_BOUND, Question, Talk, passes};
use tests::process::{Output, Process};
use tests::stream::Numbered;
use tests::topology::Topology;
use tests::wait_until;

use crate::{POLICY, TRIO};

const SYSTEMD: [&str; 2] = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
/// How long systemd takes to start, to restart a unit, or to notice that it hangs.
const UNIT_BOUND: Duration = Duration::from_secs(40);

/// Prepares the namespaces and becomes systemd: folder of the units, folder of the programs,
/// program.
const BOOT: &str = "set -e
units=$1 programs=$2 systemd=$3
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && mkdir -p /run/systemd
mount --bind \"$programs\" /opt
cp -r \"$units\" /run/systemd/system
exec env -i PATH=\"$PATH\" container=weir unshare --pid --fork --kill-child --mount-proc --propagation shared \\
  \"$systemd\" --system --unit=lab.target --log-target=console --show-status=no";

const LAB_TARGET: &str = "[Unit]\nDefaultDependencies=no\n";
const DROP_IN: &str = "[Unit]\nDefaultDependencies=no\n[Service]\nWatchdogSec=5\n";

/// The relay's configuration: its defaults, and a network.
const RELAY: &str = "[[network]]\nid = 1\nkeys = \
    [\"permitkey:1111111111111111111111111111111111111111111111111111111111111111\"]\n";

/// A host's systemd.
struct Systemd {
    host: Arc<Host>,
    process: Arc<Process>,
    /// Process 1, as the lab numbers it.
    first: String,
}

impl Systemd {
    fn start(host: Arc<Host>, systemd: &Path) -> anyhow::Result<Self> {
        let units = host.folder.join("units");
        for name in ["weir", "weir-coordinator", "weir-relay"] {
            let file = format!("packaging/systemd/{name}.service");
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
            let unit = std::fs::read_to_string(file)?
                .replace("/usr/bin/", "/opt/")
                .replace("/etc/weir/", "/run/systemd/system/");
            let drop_in = units.join(format!("{name}.service.d"));
            std::fs::create_dir_all(&drop_in)?;
            std::fs::write(units.join(format!("{name}.service")), unit)?;
            let log = host.folder.join(format!("{name}.log"));
            let log = log.display();
            let output = format!("StandardOutput=append:{log}\nStandardError=append:{log}\n");
            std::fs::write(drop_in.join("lab.conf"), DROP_IN.to_owned() + &output)?;
        }
        std::fs::write(units.join("lab.target"), LAB_TARGET)?;
        std::fs::write(
            units.join("coordinator.toml"),
            "listen = \"127.0.0.1:8443\"\n",
        )?;
        std::fs::write(units.join("relay.toml"), RELAY)?;
        let boot = host.folder.join("boot.sh");
        std::fs::write(&boot, BOOT)?;
        let programs = std::env::var("WEIR_BIN_DIR").context("WEIR_BIN_DIR is not set")?;
        let line = format!(
            "unshare --mount sh {} {} {programs} {}",
            boot.display(),
            units.display(),
            systemd.display()
        );
        let process = host.start_whole("systemd", &line)?;
        let mut first = String::new();
        wait_until("systemd starts", UNIT_BOUND, || {
            let child = host.output(&format!("pgrep -x systemd -P {}", process.pid()));
            first = child.map_or(String::new(), |child| child.stdout.trim().to_owned());
            !first.is_empty()
        })?;
        let this = Self {
            host,
            process,
            first,
        };
        wait_until("systemd is up", UNIT_BOUND, || {
            this.output("systemctl is-active lab.target")
                .is_ok_and(|output| output.code == 0)
        })?;
        Ok(this)
    }

    /// Runs a command line in systemd's namespaces.
    fn output(&self, line: &str) -> anyhow::Result<Output> {
        let enter = format!("nsenter --target {} --mount --pid {line}", self.first);
        self.host.output_with(&enter, "", UNIT_BOUND)
    }

    fn run(&self, line: &str) -> anyhow::Result<String> {
        let output = self.output(line)?.success();
        Ok(output
            .with_context(|| format!("systemd says:\n{}", self.process.said()))?
            .stdout)
    }

    /// A property of a unit, as systemd has it.
    fn shows(&self, unit: &str, property: &str) -> anyhow::Result<String> {
        let line = format!("systemctl show {unit} --property {property} --value");
        Ok(self.run(&line)?.trim().to_owned())
    }

    /// Waits until the agent's unit runs again, as another process than `pid`.
    fn restarts(&self, pid: &str) -> anyhow::Result<()> {
        wait_until("systemd has restarted the agent", UNIT_BOUND, || {
            let other = self.shows("weir", "MainPID").is_ok_and(|now| now != pid);
            let active = self.shows("weir", "ActiveState");
            other && active.is_ok_and(|state| state == "active")
        })
    }

    /// Asks the agent for its status until it fits.
    fn until(&self, what: &str, fits: impl Fn(&serde_json::Value) -> bool) -> anyhow::Result<()> {
        wait_until(what, SPREAD_BOUND, || {
            let status = self.output("/opt/weir status --json");
            status.is_ok_and(|status| status.json().is_ok_and(|status| fits(&status)))
        })
    }
}

/// Where systemd is, if it can run here.
fn systemd() -> Result<PathBuf, &'static str> {
    let first = std::fs::read_to_string("/proc/1/comm").unwrap_or_default();
    if first.trim() == "systemd" {
        return Err("this machine's own systemd must not be disturbed: it runs in a guest");
    }
    let found = SYSTEMD.iter().map(PathBuf::from).find(|path| path.exists());
    found.ok_or("systemd is not installed")
}

/// ```text
///  hub   a   b      a: systemd as process 1, and a LAN of its own, lan0 10.77.0.0/24
///   │    │   │
///  ─┴────┴───┴── internet
/// ```
#[test]
fn the_units_do_their_work_under_systemd() -> anyhow::Result<()> {
    let systemd = match systemd() {
        Ok(systemd) => systemd,
        Err(reason) => {
            tests::skip("lab::units", reason);
            return Ok(());
        }
    };
    let lab = Lab::new("units", &Topology::star(&["a", "b"]))?;
    let mesh = Mesh::start(&lab, POLICY, &TRIO[1..2])?;
    let (a, b) = (lab.host("a"), mesh.node("b"));
    mesh.coordinator
        .admin("user create ana@example.com --network home")?;
    a.ip("link add lan0 type dummy\naddr add 10.77.0.1/24 dev lan0\nlink set lan0 up")?;
    let token = mesh
        .coordinator
        .token("--network home --user ana@example.com")?;
    let file = a.folder.join("token");
    std::fs::write(&file, token)?;

    let system = Systemd::start(Arc::clone(&a), &systemd)?;
    // `start` returns when the agent says that it is ready.
    system.run("systemctl start weir.service")?;
    system.run(&format!(
        "/opt/weir up --token-file {} --hostname a --advertise-routes 10.77.0.0/24",
        file.display()
    ))?;
    mesh.coordinator.admin("route approve a 10.77.0.0/24")?;
    system.until("the programs are attached", |status| {
        status["acl"]["attached"] == true && status["coordinator"]["connected"] == true
    })?;
    mesh.settled(&[("b", 1)])?;

    // What the sandbox must let through: pins that others see, and switches of two devices.
    let pins = a.folder.join("bpf/weir/weir0");
    assert!(pins.join("ingress").exists(), "{}", pins.display());
    for (file, wanted) in [
        ("/sys/class/net/weir0/threaded", "1"),
        ("/proc/sys/net/ipv4/conf/weir0/forwarding", "1"),
        ("/proc/sys/net/ipv4/conf/lan0/forwarding", "1"),
    ] {
        wait_until(&format!("{file} is {wanted}"), SPREAD_BOUND, || {
            let read = system.run(&format!("cat {file}"));
            read.is_ok_and(|read| read.trim() == wanted)
        })?;
    }
    let ask = |talk| -> anyhow::Result<Question> {
        let (from, to, dst) = (Arc::clone(&a), Arc::clone(&b.host), b.v4()?);
        Ok(Question {
            from,
            to,
            dst,
            talk,
        })
    };
    assert!(passes(&ask(Talk::Tcp(80))?, PASS_BOUND)?);
    assert!(!passes(&ask(Talk::Tcp(22))?, PASS_BOUND)?);

    // Stopped, started, killed, hung: not one packet notices.
    let stream = Numbered::start(&a, &b.host, b.v4()?, 80)?;
    stream.flows(10)?;
    system.run("systemctl stop weir.service")?;
    assert_eq!(system.shows("weir", "Result")?, "success");
    stream.flows(10)?;
    system.run("systemctl start weir.service")?;
    let pid = system.shows("weir", "MainPID")?;
    system.run("systemctl kill --signal=KILL weir.service")?;
    system.restarts(&pid)?;
    let pid = system.shows("weir", "MainPID")?;
    system.run("systemctl kill --signal=STOP weir.service")?;
    system.restarts(&pid)?;
    assert_eq!(system.shows("weir", "NRestarts")?, "2");
    system.until("it serves as before", |status| {
        status["acl"]["attached"] == true && status["coordinator"]["connected"] == true
    })?;
    stream.flows(10)?;
    let losses = stream.end()?;
    assert!(losses.lost.is_empty(), "{losses:?}");

    system.run("/opt/weir down --purge")?;
    assert!(!system.run("ip -br link")?.contains("weir0"));
    assert!(!pins.exists(), "{}", pins.display());

    coordinator(&system)?;
    relay(&system)?;
    lab.passed();
    Ok(())
}

/// The coordinator's unit: a user of its own that systemd makes, and a state that outlives it.
fn coordinator(system: &Systemd) -> anyhow::Result<()> {
    system.run("systemctl start weir-coordinator.service")?;
    let admin = "/opt/weir-coordinator --state-dir /var/lib/weir-coordinator";
    system.run(&format!("{admin} network create office"))?;
    system.run("systemctl restart weir-coordinator.service")?;
    assert!(
        system
            .run(&format!("{admin} network list"))?
            .contains("office")
    );
    let pid = system.shows("weir-coordinator", "MainPID")?;
    let owner = system.run(&format!("stat --format %u /proc/{pid}"))?;
    assert_ne!(owner.trim(), "0", "it is not root");
    system.run("systemctl stop weir-coordinator.service")?;
    assert_eq!(system.shows("weir-coordinator", "Result")?, "success");
    Ok(())
}

/// The relay's unit: ports below 1024 without root, an identity that outlives a restart, and no
/// going on with a configuration that is wrong.
fn relay(system: &Systemd) -> anyhow::Result<()> {
    let log = system.host.folder.join("weir-relay.log");
    let starts = || -> anyhow::Result<Vec<String>> {
        let log = std::fs::read_to_string(&log)?;
        let listens = |line: &&str| line.starts_with("weir-relay listens on [::]:443, ");
        Ok(log.lines().filter(listens).map(str::to_owned).collect())
    };
    system.run("systemctl start weir-relay.service")?;
    let pid = system.shows("weir-relay", "MainPID")?;
    let owner = system.run(&format!("stat --format %u /proc/{pid}"))?;
    assert_ne!(owner.trim(), "0", "it is not root");
    system.run("systemctl restart weir-relay.service")?;
    let said = starts()?;
    assert!(
        said.len() == 2 && said[0] == said[1],
        "key and certificate stay: {said:?}"
    );
    assert_eq!(system.shows("weir-relay", "Result")?, "success");
    system.run("systemctl stop weir-relay.service")?;
    assert_eq!(system.shows("weir-relay", "Result")?, "success");

    system.run("sed -i s/id/ib/ /run/systemd/system/relay.toml")?;
    assert!(system.run("systemctl start weir-relay.service").is_err());
    assert_eq!(system.shows("weir-relay", "ExecMainStatus")?, "2");
    assert_eq!(system.shows("weir-relay", "NRestarts")?, "0");
    Ok(())
}
