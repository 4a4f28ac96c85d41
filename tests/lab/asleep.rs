//! A machine that sleeps: the kernel suspends it, forgets WireGuard's sessions, and wakes it again.
//!
//! The whole machine does, with all hosts of the lab on it. So this runs in a guest and nowhere else,
//! and only in one that can do without its root file system, which comes from the host and does not
//! survive: `xtask/vm/in-memory.sh`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::roaming::Rebinding;

/// Set where the machine may be put to sleep.
const MAY_SLEEP: &str = "WEIR_MAY_SLEEP";
/// For how many seconds: longer than a kernel waits between two initiations (`REKEY_TIMEOUT`).
const ASLEEP: u64 = 8;
/// Within this of waking, paths are asked.
const ASKED: Duration = Duration::from_secs(1);
/// Within this, there are answers.
const FOLLOWED: Duration = Duration::from_secs(3);

/// The router maps a anew as the machine falls asleep.
#[test]
fn who_slept_asks_its_paths_at_once() -> anyhow::Result<()> {
    if std::env::var_os(MAY_SLEEP).is_none() {
        tests::skip("asleep", "this machine may not be put to sleep");
        return Ok(());
    }
    let rebinding = Rebinding::start("asleep")?;
    rebinding.map_anew()?;
    let slept = sleep()?;
    let awake = Instant::now();
    // Nothing of a's passes the router but what its agent asks.
    let mapped = format!("dport={}", Rebinding::PORT);
    let is_mapped = || {
        let known = rebinding.router.run("conntrack -L -p udp");
        known.is_ok_and(|known| known.stdout.contains(&mapped))
    };
    tests::wait_until("a asks its paths", ASKED, is_mapped)?;
    let asked = awake.elapsed();
    let gone = rebinding.end(FOLLOWED)?;
    println!("asleep for {slept:?}; paths asked within {asked:?}, an outage of {gone:?}");
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
