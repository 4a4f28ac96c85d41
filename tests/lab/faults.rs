//! What breaks, what is promised for it, and what it costs: cables, clocks, agents.
//!
//! Each test prints its rows of the table `fault | promise | measured`, and leaves them in the
//! results folder. A lost relay, region, coordinator or agent is measured in `relays.rs`, another
//! address or mapping in `roaming.rs`, cut power to an agent that starts in `lifetime.rs`.
//!
//! ```text
//!  hub   a   b   near            a and b: two uplinks
//!   │    │   │   │
//!  ─┴────┴───┴───┴── internet    ──── far 198.51.100.0/24
//! ```

use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tests::host::Host;
use tests::lab::{Lab, results};
use tests::mesh::{Join, Mesh, Node, SPREAD_BOUND};
use tests::probe::{DENY_BOUND, PASS_BOUND, Question, Talk, passes};
use tests::stream::Numbered;
use tests::topology::Topology;
use tests::wait_until;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
/// Less: what the streams need.
const NARROW: &str = r#"{"acls": [
  {"action": "accept", "proto": "udp", "src": ["*"], "dst": ["*:80-81"]},
]}"#;
/// On a machine of its own a second is promised; a guest has one busy processor for all nodes.
const SLOWER: u32 = 2;

/// Three seconds, and this in an emulator.
const RECABLED: Duration = Duration::from_millis(4_500);

/// Rows of the table.
struct Table(String);

impl Table {
    fn row(
        &mut self,
        fault: &str,
        promise: &str,
        bound: Duration,
        it: Duration,
    ) -> anyhow::Result<()> {
        println!("| {fault} | {promise} | {it:.1?} |");
        writeln!(self.0, "| {fault} | {promise} | {it:.1?} |")?;
        ensure!(it <= bound, "{fault}: {promise}, but it took {it:?}");
        Ok(())
    }

    fn save(&self, name: &str) -> anyhow::Result<()> {
        std::fs::create_dir_all(results())?;
        let head = "| fault | promise | measured |\n|---|---|---|\n";
        let file = results().join(format!("faults-{name}.md"));
        Ok(std::fs::write(file, format!("{head}{}", self.0))?)
    }
}

/// The topology with a relay, and a and b joined.
fn world(name: &str) -> anyhow::Result<(Lab, Mesh)> {
    let topology = Topology::star(&["near"]).switch("far");
    let host = |topology: Topology, name: &str, number: u8| {
        let inside = format!("192.0.2.{number}/24");
        let far = format!("198.51.100.{number}/24");
        topology.host(name, &[("internet", &inside), ("far", &far)])
    };
    let lab = Lab::new(name, &host(host(topology, "a", 21), "b", 22))?;
    let join = |host| Join {
        host,
        owner: "--user ana@example.com",
        routes: "",
    };
    let mesh = Mesh::with_relays(&lab, POLICY, &["near"], &["a", "b"].map(join))?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    Ok((lab, mesh))
}

fn echo(from: &Node, to: &Node, dst: IpAddr) -> anyhow::Result<bool> {
    let question = Question {
        from: Arc::clone(&from.host),
        to: Arc::clone(&to.host),
        dst,
        talk: Talk::Ping,
    };
    passes(&question, PASS_BOUND)
}

fn stream(from: &Node, to: &Node) -> anyhow::Result<Numbered> {
    Numbered::start(&from.host, &to.host, to.v4()?, 80)
}

/// Where the kernel of `node` sends its one peer's packets.
fn endpoint(node: &Node) -> anyhow::Result<String> {
    let shown = node.host.run("wg show weir0 endpoints")?.stdout;
    let endpoint = shown.split_whitespace().nth(1);
    Ok(endpoint.unwrap_or_default().to_owned())
}

/// Counts what the agent on a host asks the world: binding requests by STUN.
struct Asked<'a>(&'a Host);

impl<'a> Asked<'a> {
    fn count(host: &'a Host) -> anyhow::Result<Self> {
        let rules = "table inet asked {
 counter stun { }
 chain out { type filter hook output priority 0; udp sport 51820 @th,96,32 0x2112a442 counter name stun
 }
}
";
        host.run_with("nft -f -", rules)?;
        Ok(Self(host))
    }

    fn so_far(&self) -> anyhow::Result<u64> {
        let shown = self.0.run("nft list counter inet asked stun")?.stdout;
        let words: Vec<&str> = shown.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "packets");
        let number = at.and_then(|at| words.get(at + 1)).context("a number")?;
        Ok(number.parse()?)
    }

    /// How long it takes from `event` until the world is asked. It is asked every 23 s anyway, so
    /// an event must not be waited for in vain until then.
    fn after(&self, event: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
        let before = self.so_far()?;
        event()?;
        let start = Instant::now();
        wait_until("the world is asked", SPREAD_BOUND, || {
            self.so_far().is_ok_and(|now| now > before)
        })?;
        Ok(start.elapsed())
    }
}

/// Cables are pulled and come back, addresses come and go: the agent looks around at once, and
/// traffic goes on as soon as there is a way.
#[test]
fn cables_that_are_pulled_cost_seconds() -> anyhow::Result<()> {
    let (lab, mesh) = world("fault_links")?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let mut table = Table(String::new());
    ensure!(echo(&a, &b, b.v4()?)?, "b does not answer");
    let direct = || endpoint(&a).is_ok_and(|at| !at.starts_with("127."));
    wait_until("a is direct", SPREAD_BOUND, direct)?;

    let second = SLOWER * Duration::from_secs(1);
    let asked = Asked::count(&b.host)?;
    let ip = |line: &str| b.host.ip(&format!("{line}\n"));
    let looks = "paths are looked for within 1 s";
    let took = asked.after(|| ip("addr add 192.0.2.77/24 dev eth0"))?;
    table.row("an address comes", looks, second, took)?;
    let took = asked.after(|| ip("route add default via 192.0.2.1"))?;
    table.row("a default route comes", looks, second, took)?;

    let numbered = stream(&a, &b)?;
    numbered.flows(200)?;
    let way = endpoint(&a)?;
    let cut = usize::from(way.starts_with("198."));
    lab.plug_link(&b.host.name, cut, false)?;
    numbered.flows(300)?;
    let gone = numbered.end()?.outage();
    table.row(
        "one of two uplinks is pulled",
        "traffic within 3 s",
        RECABLED,
        gone,
    )?;

    // Now the other one too: nothing is left.
    let numbered = stream(&a, &b)?;
    numbered.flows(20)?;
    lab.plug_link(&b.host.name, 1 - cut, false)?;
    numbered.sends(200)?;
    let took = asked.after(|| lab.plug_link(&b.host.name, cut, true))?;
    table.row("the uplink is plugged in", looks, second, took)?;
    let plugged = Instant::now() - took;
    numbered.flows(1)?;
    let back = plugged.elapsed();
    table.row(
        "the uplink is plugged in",
        "traffic within 3 s",
        RECABLED,
        back,
    )?;
    numbered.end()?;
    table.save("links")?;
    lab.passed();
    Ok(())
}

/// How often the agent is killed while it carries out a policy.
const KILLS: u64 = 3;
const KILLS_FULL: u64 = 12;
/// How much later than the last time.
const LATER: Duration = Duration::from_millis(60);
/// How long an agent takes from its start to a policy in force: three programs are verified.
const IN_FORCE: Duration = Duration::from_secs(5);

/// An agent is killed ever later after a policy was given. What is permitted by the old policy and
/// by the new one loses no packet, and the next agent puts the new one in force.
#[test]
fn an_agent_killed_in_the_midst_of_a_plan_leaves_nothing_half_done() -> anyhow::Result<()> {
    let (lab, mesh) = world("fault_plan")?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let mut table = Table(String::new());
    let dst = b.v4()?;
    let asks = |talk| Question {
        from: Arc::clone(&a.host),
        to: Arc::clone(&b.host),
        dst,
        talk,
    };
    let numbered = stream(&a, &b)?;
    let full = std::env::var_os("WEIR_FULL").is_some();
    let mut longest = Duration::ZERO;
    for kill in 0..if full { KILLS_FULL } else { KILLS } {
        let narrow = kill % 2 == 0;
        let policy = if narrow { NARROW } else { POLICY };
        mesh.coordinator.set_policy(policy)?;
        let after = Instant::now();
        // The clock is the fault here: at whatever point of the plan that is.
        while after.elapsed() < LATER * u32::try_from(kill)? {
            std::thread::yield_now();
        }
        b.kill();
        let start = Instant::now();
        b.restart()?;
        let open = || passes(&asks(Talk::Tcp(22)), DENY_BOUND).unwrap_or(narrow);
        wait_until("the policy is in force", SPREAD_BOUND, || open() != narrow)?;
        longest = longest.max(start.elapsed());
        ensure!(passes(&asks(Talk::Udp(80 + 1)), PASS_BOUND)?, "b is mute");
    }
    let losses = numbered.end()?;
    ensure!(losses.lost.is_empty(), "{losses:?}");
    table.row(
        "the agent is killed in the midst of a plan",
        "no packet lost; the next agent has the policy in force within 5 s",
        SLOWER * IN_FORCE,
        longest,
    )?;
    table.save("plan")?;
    lab.passed();
    Ok(())
}

/// The clock of the whole guest; right again when dropped.
struct Clock(i64);

impl Clock {
    /// Only where the clock is a guest's own.
    fn of_guest() -> Option<Self> {
        let guest = std::env::var("WEIR_VM").is_ok_and(|machine| machine != "host");
        guest.then_some(Self(0))
    }

    /// Sets it so many seconds off, whatever it was before.
    fn set(&mut self, off: i64) -> anyhow::Result<()> {
        let mut now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        now.tv_sec += off - self.0;
        rustix::time::clock_settime(rustix::time::ClockId::Realtime, now)?;
        self.0 = off;
        Ok(())
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        // The guest goes soon in any case.
        let _ = self.set(0);
    }
}

const HOUR: i64 = 3_600;
/// Longer than a permit for a relay is good for.
const TEN_DAYS: i64 = 240 * HOUR;

/// Every clock of the network jumps ahead and back while traffic flows, first directly, then by a
/// relay, which asks for permits that are good today.
#[test]
fn clocks_that_jump_stop_no_traffic() -> anyhow::Result<()> {
    let Some(mut clock) = Clock::of_guest() else {
        tests::skip("lab::faults::clock", "the clock is the host's own");
        return Ok(());
    };
    let (lab, mesh) = world("fault_clock")?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let relay = &mesh.relays[0];
    let mut table = Table(String::new());
    let numbered = stream(&a, &b)?;
    for off in [3 * HOUR, -3 * HOUR, 0] {
        clock.set(off)?;
        numbered.flows(150)?;
    }
    let losses = numbered.end()?;
    ensure!(losses.lost.is_empty(), "direct: {losses:?}");
    let fault = "all clocks jump three hours ahead, six back";
    table.row(fault, "no packet lost", Duration::ZERO, losses.outage())?;

    let others: Vec<String> = b.host.addrs.iter().map(IpAddr::to_string).collect();
    let others = others.join(", ");
    let cut = format!(
        "table inet cut {{
 chain into {{ type filter hook input priority -200; meta l4proto udp ip saddr {{ {others} }} drop; }}
 chain out {{ type filter hook output priority -200; meta l4proto udp ip daddr {{ {others} }} drop; }}
}}
"
    );
    let numbered = stream(&a, &b)?;
    a.host.run_with("nft -f -", &cut)?;
    let relayed = || {
        [&a, &b]
            .iter()
            .all(|node| endpoint(node).is_ok_and(|at| at.starts_with("127.")))
    };
    wait_until("both are relayed", SPREAD_BOUND, relayed)?;
    numbered.flows(100)?;
    numbered.end()?;
    for (off, fault) in [
        (TEN_DAYS, "clocks ten days ahead, the relay restarted"),
        (0, "clocks back, the relay restarted"),
    ] {
        let numbered = stream(&a, &b)?;
        clock.set(off)?;
        numbered.flows(100)?;
        relay.kill();
        relay.restart()?;
        // Its counters begin anew.
        numbered.flows(100)?;
        ensure!(relay.counter("packets_total")? >= 100, "by which way?");
        let gone = numbered.end()?.outage();
        let bound = SLOWER * Duration::from_secs(5);
        table.row(fault, "traffic by relay within 5 s", bound, gone)?;
    }
    table.save("clock")?;
    lab.passed();
    Ok(())
}
