//! What may stand on the command line.

use super::target::{Port, parse_protocol};
use crate::config::{DEFAULT_INTERFACE, DEFAULT_LISTEN_PORT, InterfaceName};
use crate::local::report::{GuardMode, Refuse};
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use ebpf::reason::Reason;
use proto::control::MAX_HOSTNAME_BYTES;
use proto::net::{Prefix, Protocol};
use proto::netmap::MAX_ROUTES_PER_NODE;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Joins this machine to a weir network, and tells how that goes.
#[derive(Parser)]
#[command(name = "weir", version, disable_help_subcommand = true)]
pub struct Arguments {
    /// What every verb takes.
    #[command(flatten)]
    pub shared: Shared,
    /// What is to be done.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Where help lists what every command takes: after the command's own.
const EVERYWHERE: &str = "Options of every command";

/// What every verb takes, before or after its name.
#[derive(Args)]
pub struct Shared {
    /// Folder with the node's keys and last netmap [default: /var/lib/weir]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The agent's socket [default: /run/weir/weir.sock, or DIR/weir.sock of another --state-dir]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub json: bool,
}

/// What can be done.
#[derive(Subcommand)]
pub enum Verb {
    /// Run the agent: the service that connects this machine
    Agent(Agent),
    /// Join a network with a token, or come up again without one
    Up(Up),
    /// Take the device and its programs away; `weir up` brings them back
    Down {
        /// Also leave the network, and forget keys and state
        #[arg(long)]
        purge: bool,
    },
    /// Decide for this machine alone, whatever the network's policy says
    Set(Set),
    /// How this machine is connected, and what is wrong if something is
    Status,
    /// The nodes that this one may talk with
    Peers,
    /// Ask a peer for an echo through the tunnel
    Ping {
        /// A peer's name or address
        peer: String,
        /// How often [default: 4, or 60 with --until-direct]
        #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..))]
        count: Option<u16>,
        /// Go on until the answers come by a direct path, or the count is over
        #[arg(long)]
        until_direct: bool,
    },
    /// How a peer is reached, where else it might be, and why not there
    Path {
        /// A peer's name or address
        peer: String,
    },
    /// What the programs do with a connection, and which rule says so
    Explain(Explain),
    /// Packets let through and dropped, by reason
    Counters,
    /// How the world sees this machine: its addresses, its NAT, whether UDP is blocked
    Netcheck,
    /// Follow dropped packets as they are dropped, until Ctrl-C
    Monitor(Monitor),
    /// For whoever looks for a fault in weir
    #[command(subcommand)]
    Debug(Debug),
    /// Check what weir needs of this machine
    Doctor,
    /// Policy files, without an agent
    #[command(subcommand)]
    Policy(Policy),
}

/// `weir debug`.
#[derive(Subcommand)]
pub enum Debug {
    /// Write down what the agent's decisions came from since its start, and what comes, so that they
    /// can be replayed; addresses and names of this network are in it, no keys but public ones
    Record(Record),
}

/// `weir debug record`.
#[derive(Args)]
pub struct Record {
    /// How long to go on
    #[arg(long, value_name = "N", default_value_t = 60)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
    /// Let the agent decide everything anew first, as after a restart, where the beginning is no
    /// longer kept; packets go on meanwhile
    #[arg(long)]
    pub anew: bool,
    /// The new file [default: weir-TIME.trace]
    pub file: Option<PathBuf>,
}

/// `weir policy`.
#[derive(Subcommand)]
pub enum Policy {
    /// Whether a file may become a network's policy
    Check {
        /// The policy
        file: PathBuf,
        /// Also compile it for this network and run its tests
        #[arg(long, value_name = "TOPOLOGY.json")]
        network: Option<PathBuf>,
    },
    /// Whether a policy's own tests hold in a network
    Test {
        /// The policy
        #[arg(long, value_name = "FILE")]
        policy: PathBuf,
        /// Users and nodes
        #[arg(long, value_name = "TOPOLOGY.json")]
        network: PathBuf,
    },
    /// What every node of a network gets, as JSON
    Compile {
        /// The policy
        #[arg(long, value_name = "FILE")]
        policy: PathBuf,
        /// Users and nodes
        #[arg(long, value_name = "TOPOLOGY.json")]
        network: PathBuf,
        /// The network's settings
        #[arg(long, value_name = "FILE")]
        settings: Option<PathBuf>,
    },
    /// Which rule allows a connection, or which come closest
    Explain(Explain),
    /// Who may reach more or less by NEW than by OLD; exits with 0 if nobody, with 1 if somebody
    Diff(PolicyDiff),
    /// Print a policy in its one form: other whitespace, the same words and comments
    Fmt {
        /// The policy
        file: PathBuf,
        /// Only tell whether it is in that form; exits with 1 if not
        #[arg(long, conflicts_with = "write")]
        check: bool,
        /// Change the file instead of printing
        #[arg(long)]
        write: bool,
    },
}

/// `weir policy diff`.
#[derive(Args)]
pub struct PolicyDiff {
    /// The policy as it was
    pub old: PathBuf,
    /// The policy as it is to be
    pub new: PathBuf,
    /// Users and nodes
    #[arg(long, value_name = "TOPOLOGY.json")]
    pub network: PathBuf,
    /// The network's settings
    #[arg(long, value_name = "FILE")]
    pub settings: Option<PathBuf>,
}

/// `weir agent`.
#[derive(Args)]
pub struct Agent {
    /// Name of the WireGuard device
    #[arg(long, value_name = "NAME", default_value = DEFAULT_INTERFACE)]
    pub interface: InterfaceName,
    /// Its UDP port
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_LISTEN_PORT)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub listen_port: u16,
    /// Where programs and maps are pinned [default: /sys/fs/bpf/weir/NAME]
    #[arg(long, value_name = "DIR")]
    pub bpf_dir: Option<PathBuf>,
}

/// `weir up`.
#[derive(Args)]
pub struct Up {
    /// A join token, or `-` to read one from stdin
    ///
    /// A token on the command line can be seen by other users while the command runs: prefer `-`
    /// or --token-file.
    pub token: Option<String>,
    /// Read the token from a file
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// What to be called in the network [default: this machine's host name]
    #[arg(long, value_name = "H", value_parser = parse_hostname)]
    pub hostname: Option<String>,
    /// Subnets to offer to the network, comma-separated; empty to withdraw all
    #[arg(long, value_name = "CIDR,…", value_parser = parse_routes)]
    pub advertise_routes: Option<Routes>,
    /// How long to wait until this machine is up; the agent keeps trying afterwards
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub timeout: u32,
}

/// `weir set`.
#[derive(Args)]
#[group(required = true, multiple = true)]
pub struct Set {
    /// Let nothing in that others begin, whatever policy says
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "true")]
    pub shields_up: Option<bool>,
    /// What becomes of packets that policy does not permit to leave here: `answer` tells whoever
    /// sent them, `drop` does not
    #[arg(long, value_name = "HOW", value_parser = parse_refuse)]
    pub refuse: Option<Refuse>,
    /// Whether floods to WireGuard's port are held off before it sees them: `on`; `tc`, but never in
    /// the driver of a network card; or `off`
    #[arg(long, value_name = "HOW", value_parser = parse_guard)]
    pub guard: Option<GuardMode>,
    /// Whether the router of a private network is asked to open WireGuard's port, by PCP, NAT-PMP
    /// or UPnP: `on` or `off`
    #[arg(long, value_name = "HOW", value_parser = parse_switch)]
    pub port_mapping: Option<bool>,
}

/// Subnets, as given on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routes(pub BTreeSet<Prefix>);

/// `weir explain`.
#[derive(Args)]
pub struct Explain {
    /// Who initiates: an address or a node's name
    #[arg(value_name = "SRC")]
    pub src: String,
    /// To whom; an IPv6 address with a port stands in brackets
    #[arg(value_name = "DST[:PORT]", value_parser = super::target::parse)]
    pub dst: Port,
    /// Protocol by name or number [default: tcp with a port, icmp without]
    #[arg(long, value_name = "P", value_parser = parse_protocol)]
    pub proto: Option<Protocol>,
    /// Ask this policy instead of the agent
    #[arg(long, value_name = "FILE", requires = "network")]
    pub policy: Option<PathBuf>,
    /// Users and nodes, with --policy
    #[arg(long, value_name = "TOPOLOGY.json", requires = "policy")]
    pub network: Option<PathBuf>,
}

/// `weir monitor`.
#[derive(Args)]
pub struct Monitor {
    /// Only packets dropped for this reason
    #[arg(long, value_name = "R", value_parser = PossibleValuesParser::new(
        Reason::ALL.iter().map(|reason| reason.name())
    ))]
    pub reason: Option<String>,
    /// Only packets from or to this node or address
    #[arg(long, value_name = "P")]
    pub peer: Option<String>,
}

/// What the command line says; or how it should end already (help was asked for, or it says
/// nothing that makes sense), after that has been printed.
///
/// # Errors
/// The exit code: 0 after help, 2 after wrong use.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Arguments, ExitCode> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let error = match Arguments::try_parse_from(&arguments) {
        Ok(parsed) => return Ok(parsed),
        Err(error) => error,
    };
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    match without_tokens(&error.render().to_string(), &arguments) {
        Some(safe) => eprint!("{safe}"),
        // Nobody to tell if stderr is closed.
        None => drop(error.print()),
    }
    Err(ExitCode::from(code))
}

/// The text with every join token among the arguments cut short; `None` if there is none in it.
fn without_tokens(text: &str, arguments: &[OsString]) -> Option<String> {
    let arguments = arguments.iter().filter_map(|argument| argument.to_str());
    let tokens: Vec<&str> = arguments
        .filter(|argument| argument.contains("weir1.") && text.contains(argument))
        .collect();
    let safe = |text: String, token: &&str| text.replace(token, "weir1.…");
    (!tokens.is_empty()).then(|| tokens.iter().fold(text.to_owned(), safe))
}

fn parse_refuse(text: &str) -> Result<Refuse, String> {
    match text {
        "answer" => Ok(Refuse::Answer),
        "drop" => Ok(Refuse::Drop),
        _ => Err("`answer` or `drop`".to_owned()),
    }
}

fn parse_guard(text: &str) -> Result<GuardMode, String> {
    match text {
        "on" => Ok(GuardMode::On),
        "tc" => Ok(GuardMode::Tc),
        "off" => Ok(GuardMode::Off),
        _ => Err("`on`, `tc` or `off`".to_owned()),
    }
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("`on` or `off`".to_owned()),
    }
}

fn parse_hostname(text: &str) -> Result<String, String> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let edges = text.starts_with('-') || text.ends_with('-');
    if (1..=MAX_HOSTNAME_BYTES).contains(&text.len()) && !edges && text.bytes().all(legal) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(format!(
            "a host name here is one label: letters, digits and `-` inside, \
             at most {MAX_HOSTNAME_BYTES}"
        ))
    }
}

fn parse_routes(text: &str) -> Result<Routes, String> {
    let words = text.split(',').map(str::trim);
    let routes: BTreeSet<Prefix> = words
        .filter(|word| !word.is_empty())
        .map(|word| word.parse().map_err(|error| format!("{error}")))
        .collect::<Result<_, _>>()?;
    if routes.len() > MAX_ROUTES_PER_NODE {
        return Err(format!("at most {MAX_ROUTES_PER_NODE} subnets"));
    }
    Ok(Routes(routes))
}

#[cfg(test)]
mod tests;
