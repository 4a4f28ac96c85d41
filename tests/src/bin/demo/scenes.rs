//! The scenes, in order. Each leaves the office as the next one expects it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context;
use tests::probe::{DENY_BOUND, PASS_BOUND, Question, Talk, passes};
use tests::stream::{Conversation, Numbered};
use tests::wait_until;

use crate::http;
use crate::narrator::{Narrator, Stage};
use crate::office::{JOINS, Office};

/// What crosses the tunnel in one piece.
const FILE_BYTES: usize = 100_000_000;
/// How long the throughput is measured.
const MEASURE_SECONDS: u32 = 3;

/// A scene with its title and its sentence.
type Scene = (
    &'static str,
    &'static str,
    fn(&mut Stage, &Office) -> anyhow::Result<String>,
);

/// The scenes after the first.
const SCENES: &[Scene] = &[
    (
        "What a node knows of itself",
        "The agent answers on a socket of its own machine. It knows only the peers that policy \
         lets it talk with.",
        status,
    ),
    (
        "Permitted and denied connections",
        "Policy names who may start what. Answers pass by themselves, the reverse direction does \
         not; what no rule names is dropped. TCP, UDP and ICMP, IPv4 and IPv6.",
        connections,
    ),
    (
        "100 MB over HTTP",
        "A permitted transfer through the tunnel arrives bit for bit.",
        transfer,
    ),
    (
        "A scan finds nothing",
        "The build server is a peer of the web server, but may start nothing towards it.",
        scan,
    ),
    (
        "Two sites",
        "Machines on the two LANs run nothing of ours. Their routers carry them through the \
         tunnel, with the policy applied and their own addresses kept.",
        sites,
    ),
    (
        "The agent dies",
        "The programs and their tables belong to the kernel. An agent killed under traffic \
         changes no verdict, and neither does its return.",
        agent_dies,
    ),
    (
        "A rule is taken back",
        "Policy holds for what is already open: a connection that carries data is cut.",
        revocation,
    ),
    (
        "The coordinator dies",
        "Nodes keep their keys, peers and policy. With the coordinator gone, two machines that had \
         nothing to say to each other so far open a connection; only changes have to wait.",
        coordinator_dies,
    ),
    (
        "Throughput",
        "Data never meets our user space: in-kernel WireGuard with the programs on its device. \
         (A figure from this kernel and this machine, not a claim.)",
        throughput,
    ),
    (
        "Direct where it can be, by relay where not",
        "Elsewhere: two servers behind routers find a direct path. UDP is then blocked, and traffic \
         goes on by a relay, sealed as ever; the relay's region is lost; UDP is back.",
        |stage, _| crate::paths::play(stage),
    ),
    (
        "Leaving",
        "`weir down --purge` takes away all that the agent made.",
        leaving,
    ),
];

/// Plays all scenes; if nobody can join, there is nothing to see.
pub fn play(narrator: &mut Narrator, office: &mut Office) {
    let joined = narrator.scene(
        "Six machines join",
        "The coordinator holds public keys and the policy, and is never on the path of data. Each \
         machine joins with a token that works once, read from stdin.",
        |stage| join(stage, office),
    );
    let office = &*office;
    for (title, sentence, scene) in SCENES.iter().filter(|_| joined) {
        narrator.scene(title, sentence, |stage| scene(stage, office));
    }
}

fn join(stage: &mut Stage, office: &mut Office) -> anyhow::Result<String> {
    let begun = Instant::now();
    let policy = office.policy.clone();
    let coordinator = &office.open()?.coordinator;
    for line in [
        "network create home",
        "user create ana@example.com --network home",
    ] {
        let output = coordinator.admin(line)?;
        stage.command("hub", &format!("weir-coordinator {line}"), &output);
    }
    let output = coordinator.set_policy(&policy)?;
    stage.command(
        "hub",
        "weir-coordinator policy set small-office.hujson",
        &output,
    );
    let outputs = office.join()?;
    for (join, output) in JOINS.iter().zip(&outputs) {
        let routes = match join.routes {
            "" => String::new(),
            routes => format!(" --advertise-routes {routes}"),
        };
        stage.command(join.host, &format!("weir up -{routes} < token"), output);
    }
    let took = begun.elapsed().as_secs_f64();
    stage.check(
        &format!("every `weir up` succeeded, after {took:.1} s"),
        true,
    );
    for (site, route) in [("oslo", "10.1.0.0/24"), ("paris", "10.2.0.0/24")] {
        let node = office.node(site)?;
        let routed = || {
            let routes = node.host.output("ip route show table all");
            routes.is_ok_and(|output| output.stdout.contains(&format!("{route} dev weir0")))
        };
        wait_until(
            &format!("{site} has a route to {route}"),
            tests::mesh::SPREAD_BOUND,
            routed,
        )?;
        stage.check(&format!("{site} has the approved route to {route}"), true);
    }
    Ok(format!("{} nodes in {took:.1} s", outputs.len()))
}

fn status(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let laptop = office.node("laptop")?;
    for verb in ["status", "peers"] {
        let output = laptop.weir(verb)?;
        stage.command("laptop", &format!("weir {verb}"), &output);
    }
    let status = laptop.status()?;
    stage.check(
        "the programs are attached",
        status["acl"]["attached"] == true,
    );
    stage.check(
        "the coordinator is connected",
        status["coordinator"]["connected"] == true,
    );
    let peers = laptop.weir("peers --json")?.json()?;
    let names = peers["peers"].as_array().context("a list of peers")?;
    let mut names: Vec<&str> = names
        .iter()
        .filter_map(|peer| peer["name"].as_str())
        .collect();
    names.sort_unstable();
    stage.check(
        "the laptop knows web and build, and no other node",
        names == ["build", "web"],
    );
    Ok(format!("attached, {} peers", names.len()))
}

/// One row of the table of connections.
fn attempt(
    stage: &mut Stage,
    office: &Office,
    (from, to, dst): (&str, &str, IpAddr),
    talk: Talk,
    expected: bool,
) -> anyhow::Result<()> {
    let bound = if expected { PASS_BOUND } else { DENY_BOUND };
    let (from_host, to_host) = (office.host(from), office.host(to));
    let question = Question {
        from: from_host,
        to: to_host,
        dst,
        talk,
    };
    let passed = passes(&question, bound)?;
    let what = match talk {
        Talk::Tcp(port) => format!("TCP {port}"),
        Talk::Udp(port) => format!("UDP {port}"),
        Talk::Sctp(port) => format!("SCTP {port}"),
        Talk::Ping => "ping".to_owned(),
        Talk::Protocol(number) => format!("protocol {number}"),
    };
    let outcome = if passed { "passes" } else { "is denied" };
    let family = if dst.is_ipv4() { "IPv4" } else { "IPv6" };
    let line = format!("{from:>10} → {to:<10} {what:<9} {family}  {outcome}");
    stage.check(&line, passed == expected);
    Ok(())
}

fn connections(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let table: &[(&str, &str, Talk, bool)] = &[
        ("laptop", "web", Talk::Tcp(80), true),
        ("laptop", "web", Talk::Ping, true),
        ("laptop", "web", Talk::Tcp(22), false),
        ("web", "laptop", Talk::Tcp(80), false),
        ("web", "db", Talk::Tcp(5432), true),
        ("web", "db", Talk::Udp(5432), true),
        ("web", "db", Talk::Tcp(5433), false),
        ("db", "web", Talk::Tcp(5432), false),
        ("web", "build", Talk::Udp(514), true),
        ("web", "build", Talk::Tcp(514), false),
        ("build", "web", Talk::Udp(514), false),
        ("build", "web", Talk::Ping, false),
    ];
    for &(from, to, talk, expected) in table {
        for dst in [office.v4(to)?, office.v6(to)?] {
            attempt(stage, office, (from, to, dst), talk, expected)?;
        }
    }
    let explained = office.node("laptop")?.weir_with("explain laptop web:22")?;
    stage.command("laptop", "weir explain laptop web:22", &explained);
    stage.check(
        "the node explains a denial",
        explained.stdout.contains("DENY"),
    );
    Ok(format!("{} attempts, as the policy says", table.len() * 2))
}

fn transfer(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let body = http::noise(FILE_BYTES);
    let sum = http::sha256(&body);
    let web = office.v4("web")?;
    http::serve_once(office.host("web").listen(web, 443)?, body);
    let download = http::fetch(&office.host("laptop"), SocketAddr::new(web, 443))?;
    stage.note(&format!("sent by web       sha256 {sum}"));
    stage.note(&format!("got by laptop     sha256 {}", download.sha256));
    stage.check("the checksums are equal", download.sha256 == sum);
    let rate = rate(FILE_BYTES, download.time);
    Ok(format!(
        "100 MB in {:.1} s, {rate}",
        download.time.as_secs_f64()
    ))
}

fn scan(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let web = office.v4("web")?;
    let host = office.host("web");
    let _http = tests::probe::EchoTcp::start(host.listen(web, 80)?)?;
    let _ssh = tests::probe::EchoTcp::start(host.listen(web, 22)?)?;
    let denied = denials(office, "build")?;
    let line = format!("nmap -n -Pn -sT -T5 --max-retries 0 -p 1-200 {web}");
    let mut open: Vec<Vec<u16>> = Vec::new();
    for from in ["laptop", "build"] {
        let output = office
            .host(from)
            .output_with(&line, "", Duration::from_secs(120))?;
        stage.command(from, &line, &output);
        let ports = output.stdout.lines().filter(|line| line.contains(" open "));
        open.push(
            ports
                .filter_map(|line| line.split('/').next()?.parse().ok())
                .collect(),
        );
    }
    let expected: [Vec<u16>; 2] = [vec![80], vec![]];
    stage.check(
        "the laptop finds the one port that it may use",
        open[0] == expected[0],
    );
    stage.check("the build server finds none", open[1] == expected[1]);
    let counted = denials(office, "build")? - denied;
    stage.check(
        &format!("its own programs dropped the {counted} packets"),
        counted >= 200,
    );
    Ok(format!("200 ports scanned, {} found", open[1].len()))
}

/// Packets that a node's programs have dropped.
fn denials(office: &Office, name: &str) -> anyhow::Result<u64> {
    let counters = office.node(name)?.counters()?;
    let denied = counters.iter().filter(|(key, _)| key.contains("/deny/"));
    Ok(denied.map(|(_, packets)| packets).sum())
}

fn sites(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let files = office.v4("oslo-desk")?;
    let desk = office.v4("paris-desk")?;
    let sites = |from, to, dst| (from, to, dst);
    attempt(
        stage,
        office,
        sites("paris-desk", "oslo-desk", files),
        Talk::Tcp(443),
        true,
    )?;
    attempt(
        stage,
        office,
        sites("paris-desk", "oslo-desk", files),
        Talk::Tcp(22),
        false,
    )?;
    attempt(
        stage,
        office,
        sites("oslo-desk", "paris-desk", desk),
        Talk::Tcp(443),
        false,
    )?;
    let listener = office.host("oslo-desk").listen(files, 443)?;
    let target = SocketAddr::new(files, 443);
    let connect = || std::net::TcpStream::connect_timeout(&target, PASS_BOUND);
    let stream = office.host("paris-desk").enter(connect)?;
    let (_, source) = listener.accept()?;
    stage.check(
        &format!("oslo-desk sees the real source, {}", source.ip()),
        source == stream.local_addr()? && source.ip() == desk,
    );
    Ok("LAN to LAN, no address translation".to_owned())
}

fn agent_dies(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let web = office.node("web")?;
    let (laptop, target) = (office.host("laptop"), office.v4("web")?);
    let stream = Numbered::start(&laptop, &web.host, target, 443)?;
    stream.flows(100)?;
    stage.note(&format!(
        "web$ kill -9 {}        # the agent",
        web.process().pid()
    ));
    web.kill();
    stage.check("the agent is gone", !web.process().runs());
    stream.flows(100)?;
    attempt(
        stage,
        office,
        ("laptop", "web", target),
        Talk::Tcp(80),
        true,
    )?;
    attempt(
        stage,
        office,
        ("laptop", "web", target),
        Talk::Tcp(22),
        false,
    )?;
    web.restart()?;
    web.until("web is up again", |status| status["phase"] == "up")?;
    stage.check("the agent is back", true);
    stream.flows(100)?;
    let losses = stream.end()?;
    let line = format!(
        "{} datagrams sent meanwhile, {} lost",
        losses.sent,
        losses.lost.len()
    );
    stage.check(&line, losses.lost.is_empty());
    Ok(line)
}

fn revocation(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    /// After this long nothing of a revoked connection may arrive any more.
    const CUT_BOUND: Duration = Duration::from_secs(1);
    let (laptop, web) = (office.host("laptop"), office.host("web"));
    let target = office.v4("web")?;
    let narrowed = office
        .policy
        .replace("tag:web:80,443,5201", "tag:web:443,5201");
    anyhow::ensure!(
        narrowed != office.policy,
        "the policy no longer names the ports of tag:web"
    );
    let revoked = Conversation::start(&laptop, &web, target, 80)?;
    let beside = Numbered::start(&laptop, &web, target, 443)?;
    revoked.flows()?;
    let coordinator = &office.mesh()?.coordinator;
    let output = coordinator.set_policy(&narrowed)?;
    let at = Instant::now();
    stage.command(
        "hub",
        "weir-coordinator policy set without-port-80.hujson",
        &output,
    );
    beside.flows(400)?;
    let late = revoked.last_arrival().saturating_duration_since(at);
    let line = match late.as_millis() {
        0 => "no byte came on port 80 after the command had returned".to_owned(),
        late => format!("the last byte on port 80 came {late} ms after the change"),
    };
    stage.check(&line, late < CUT_BOUND && at.elapsed() > CUT_BOUND);
    let losses = beside.end()?;
    let (sent, lost) = (losses.sent, losses.lost.len());
    let beside = format!("on port 443 beside it {sent} datagrams were sent, {lost} lost");
    stage.check(&beside, lost == 0);
    coordinator.set_policy(&office.policy)?;
    Ok(line)
}

fn coordinator_dies(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let coordinator = &office.mesh()?.coordinator;
    let stream = Numbered::start(
        &office.host("laptop"),
        &office.host("web"),
        office.v4("web")?,
        443,
    )?;
    coordinator.kill();
    stage.note("hub$ kill -9 …        # the coordinator");
    attempt(
        stage,
        office,
        ("laptop", "build", office.v4("build")?),
        Talk::Tcp(8080),
        true,
    )?;
    let refused = coordinator.admin_with("policy get")?;
    stage.command("hub", "weir-coordinator policy get", &refused);
    stage.check("changes are refused, and say why", refused.code == 1);
    let node = office.node("laptop")?;
    node.until("the laptop notices", |status| {
        status["coordinator"]["connected"] == false
    })?;
    stream.flows(50)?;
    coordinator.restart()?;
    node.until("the laptop is connected again", |status| {
        status["coordinator"]["connected"] == true
    })?;
    stage.check(
        "the coordinator is back and the laptop found it by itself",
        true,
    );
    let losses = stream.end()?;
    let line = format!(
        "{} datagrams sent meanwhile, {} lost",
        losses.sent,
        losses.lost.len()
    );
    stage.check(&line, losses.lost.is_empty());
    Ok(format!("a new connection; {line}"))
}

fn throughput(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let (web, laptop) = (office.host("web"), office.host("laptop"));
    let target = office.v4("web")?;
    let server = web.start(
        "iperf3",
        &format!("iperf3 --server --one-off --bind {target}"),
    )?;
    let listens = || server.said().contains("listening") || !server.runs();
    let line = format!("iperf3 --client {target} --time {MEASURE_SECONDS} --json");
    // iperf3 writes its greeting late when it has no terminal: ask the kernel.
    let bound = || {
        web.output("ss -Hltn sport = 5201")
            .is_ok_and(|out| !out.stdout.is_empty())
    };
    wait_until("iperf3 listens", PASS_BOUND, || listens() || bound())?;
    let report = laptop.run(&line)?.json()?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.context("iperf3 reports a rate")?;
    stage.note(&format!(
        "laptop$ iperf3 --client {target} --time {MEASURE_SECONDS}"
    ));
    let line = format!("{:.0} Mb/s, one TCP stream", bits / 1e6);
    stage.check(&line, bits > 0.0);
    Ok(line)
}

fn leaving(stage: &mut Stage, office: &Office) -> anyhow::Result<String> {
    let db = office.node("db")?;
    let output = db.weir("down --purge")?;
    stage.command("db", "weir down --purge", &output);
    let links = db.host.run("ip -br link")?;
    stage.command("db", "ip -br link", &links);
    stage.check("the device is gone", !links.stdout.contains("weir0"));
    let pins = std::fs::read_dir(db.host.folder.join("bpf"))?.count();
    stage.check("nothing is pinned any more", pins == 0);
    let web = office.node("web")?;
    let key_gone = || web.kernel_peers().is_ok_and(|peers| peers.len() == 2);
    let gone = wait_until("web forgets it", tests::mesh::SPREAD_BOUND, key_gone);
    stage.check("its peers have forgotten it", gone.is_ok());
    let list = office.mesh()?.coordinator.admin("node list")?;
    stage.command("hub", "weir-coordinator node list", &list);
    Ok("nothing left behind".to_owned())
}

fn rate(bytes: usize, time: Duration) -> String {
    format!("{:.0} Mb/s", bytes as f64 * 8.0 / 1e6 / time.as_secs_f64())
}
