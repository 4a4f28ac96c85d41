//! `cargo xtask lab [TOPOLOGY] [-- CMD]`: a network to play with.
//!
//! Builds a named topology, joins all its machines into one network (unless `--bare`), and gives a
//! shell in which each machine is a command: `web weir status`, `laptop ping web`. With a command
//! it runs that instead and passes on its exit code. All of it is gone at the end.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh};
use tests::topology::{HostPlan, Topology};

/// Everybody may start everything: a lab is for trying things out.
const OPEN_POLICY: &str = r#"{
  "tagOwners": {"tag:lab": []},
  "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
}"#;

#[derive(Parser)]
#[command(
    name = "lab",
    about = "Builds a topology of network namespaces and gives a shell in it"
)]
struct Cli {
    /// Which topology; `list` shows all
    #[arg(default_value = "trio", value_parser = known)]
    topology: String,
    /// Only the namespaces: no coordinator, no agents
    #[arg(long)]
    bare: bool,
    /// Run this instead of a shell
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A topology's name, or `list`.
fn known(name: &str) -> Result<String, String> {
    let is_known = name == "list" || Topology::named().iter().any(|(other, _, _)| *other == name);
    let refused = "no topology is called so; `cargo xtask lab list` shows all";
    is_known.then(|| name.to_owned()).ok_or(refused.to_owned())
}

fn run(cli: &Cli) -> anyhow::Result<u8> {
    if cli.topology == "list" {
        for (name, about, _) in Topology::named() {
            println!("{name:8}  {about}");
        }
        return Ok(0);
    }
    let found = Topology::named()
        .into_iter()
        .find(|(name, _, _)| *name == cli.topology);
    let (_, _, topology) = found.context("a topology that is known")?;
    let lab = Lab::without_captures("lab", &topology)?;
    let mesh = match cli.bare {
        true => None,
        false => Some(join(&lab, &topology)?),
    };
    let code = match cli.command.as_slice() {
        [] => lab.shell()?,
        command => lab.within(command)?,
    };
    drop(mesh);
    lab.passed();
    Ok(code)
}

/// Joins every host on the first switch, the hub apart; a host on a second one offers it.
fn join(lab: &Lab, topology: &Topology) -> anyhow::Result<Mesh> {
    let internet = topology
        .switches
        .first()
        .context("a topology has a switch")?;
    let member = |host: &&HostPlan| {
        host.name != "hub"
            && host
                .links
                .first()
                .is_some_and(|(switch, _)| switch == internet)
    };
    let members = topology.hosts.iter().filter(member);
    let named: Vec<(&str, String)> = members.map(|host| (&*host.name, lans(host))).collect();
    let joins: Vec<Join<'_>> = named
        .iter()
        .map(|(host, routes)| Join {
            host,
            owner: "--tag tag:lab",
            routes,
        })
        .collect();
    Mesh::start(lab, OPEN_POLICY, &joins)
}

/// The IPv4 networks of a host's further interfaces: 10.1.0.1/24 is in 10.1.0.0/24.
fn lans(host: &HostPlan) -> String {
    let addrs = host.links.iter().skip(1).flat_map(|(_, addrs)| addrs);
    let network = |addr: &String| addr.rsplit_once('.').map(|(net, _)| format!("{net}.0/24"));
    addrs.filter_map(network).collect::<Vec<_>>().join(",")
}
