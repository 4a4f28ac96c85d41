//! A machine that sleeps: the kernel suspends it, forgets WireGuard's sessions, and wakes it again.
//!
//! The whole machine does, with all hosts of the lab on it. So this runs in a guest and nowhere else,
//! and only in one that can do without its root file system, which comes from the host and does not
//! survive: `xtask/vm/in-memory.sh`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tests::lab::Lab;
use tests::nat::{MAPPED_PORT, Nat};
use tests::stream::Numbered;
use tests::topology::Topology;

/// Set where the machine may be put to sleep.
const MAY_SLEEP: &str = "WEIR_MAY_SLEEP";
/// For how many seconds.
const ASLEEP: u64 = 4;
/// Within this of waking, paths are asked.
const ASKED: Duration = Duration::from_secs(1);
/// Within this, there are answers: if the kernel's first initiation goes where nobody is any more, it
/// sends the next one five seconds later (`REKEY_TIMEOUT`).
const FOLLOWED: Duration = Duration::from_secs(6);

/// b talks to a, whose router maps it to another port as the machine falls asleep, and lets nothing in
/// by the old one.
///
/// ```text
///  hub   b            a 10.1.0.2
///   │    │             └ lan ─ router
///  ─┴────┴─────────────────────┴── internet
/// ```
#[test]
fn who_slept_asks_its_paths_at_once() -> anyhow::Result<()> {
    if std::env::var_os(MAY_SLEEP).is_none() {
        tests::skip("asleep", "this machine may not be put to sleep");
        return Ok(());
    }
    let topology = Topology::star(&["b"]).behind_a_router("a");
    let lab = Lab::new("asleep", &topology)?;
    let router = lab.host("router");
    Nat::PortRestricted.install(&router, lab.host("a").v4())?;
    let mesh = super::roaming::mesh(&lab, lab.host("hub").v4(), ["a", "b"])?;
    let [a, b] = ["a", "b"].map(|name| mesh.node(name));
    let numbered = Numbered::start(&b.host, &a.host, a.v4()?, 80)?;
    numbered.flows(20)?;
    let (old, new) = (MAPPED_PORT.to_string(), (MAPPED_PORT + 1).to_string());
    let rules = router.run("nft list ruleset")?.stdout;
    ensure!(rules.contains(&old), "{rules}");
    let rules = format!("flush ruleset\n{}", rules.replace(&old, &new));
    router.run_with("nft -f -", &rules)?;
    router.run("conntrack -F")?;
    let slept = sleep()?;
    let awake = Instant::now();
    // Nothing of a's passes the router but what its agent asks.
    let mapped = format!("dport={new}");
    let is_mapped = || {
        let known = router.run("conntrack -L -p udp");
        known.is_ok_and(|known| known.stdout.contains(&mapped))
    };
    tests::wait_until("a asks its paths", ASKED, is_mapped)?;
    let asked = awake.elapsed();
    numbered.flows(400)?;
    let losses = numbered.end()?;
    let gone = losses.outage();
    println!("asleep for {slept:?}; paths asked within {asked:?}, an outage of {gone:?}");
    ensure!(gone <= FOLLOWED, "{losses:?}");
    let endpoint = b.host.run("wg show weir0 endpoints")?.stdout;
    ensure!(endpoint.trim_end().ends_with(&new), "{endpoint}");
    lab.passed();
    Ok(())
}

/// Puts the machine to sleep, and returns for how long it was.
fn sleep() -> anyhow::Result<Duration> {
    let alarm = "/sys/class/rtc/rtc0/wakealarm";
    fs::write(alarm, "0").context("nothing would wake this machine")?;
    fs::write(alarm, format!("+{ASLEEP}"))?;
    let before = asleep();
    fs::write("/sys/power/state", "mem").context("this machine cannot sleep")?;
    let slept = asleep().saturating_sub(before);
    ensure!(slept > Duration::from_secs(1), "it slept for {slept:?}");
    Ok(slept)
}

/// How long the machine slept since it was started.
fn asleep() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let [always, awake] = [ClockId::Boottime, ClockId::Monotonic].map(|clock| {
        let time = clock_gettime(clock);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    });
    always.saturating_sub(awake)
}
