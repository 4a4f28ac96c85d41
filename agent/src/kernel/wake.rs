//! Word when the machine slept and is awake again.
//!
//! While a machine is suspended nothing of a process runs and the clock of its timers stands still,
//! so that afterwards all that it knew of the world seems young. The links need not change. But a
//! timer that is to end when the wall clock is set ends on waking, too (`timekeeping_resume` in
//! kernel/time/timekeeping.c), and then CLOCK_BOOTTIME, which goes on in sleep, says how long it was.

use rustix::io::{Errno, read};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// A shorter sleep is none: the two clocks are not read at one moment.
const SHORTEST: Duration = Duration::from_millis(500);
/// The timer ends by itself after so many seconds: ten years.
const FAR: i64 = 10 * 365 * 24 * 3600;

/// Says each time that the machine wakes how long it slept, until `woke` returns false. A wall clock
/// that is set is no sleep. It waits in the calling thread.
///
/// # Errors
/// What the kernel says.
pub fn watch(mut woke: impl FnMut(Duration) -> bool) -> io::Result<()> {
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC)?;
    let mut before = slept();
    loop {
        wait(timer.as_fd())?;
        let now = slept();
        let long = now.saturating_sub(std::mem::replace(&mut before, now));
        if long >= SHORTEST && !woke(long) {
            return Ok(());
        }
    }
}

/// Until the wall clock is set, or ten years are over.
fn wait(timer: BorrowedFd<'_>) -> io::Result<()> {
    let mut end = clock_gettime(ClockId::Realtime);
    end.tv_sec = end.tv_sec.saturating_add(FAR);
    let once = Itimerspec {
        it_interval: Timespec::default(),
        it_value: end,
    };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(timer, flags, &once)?;
    match read(timer, &mut [0; 8]) {
        Ok(_) | Err(Errno::CANCELED | Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// How long the machine slept since it was started.
fn slept() -> Duration {
    let [always, awake] = [ClockId::Boottime, ClockId::Monotonic].map(|clock| {
        let time = clock_gettime(clock);
        let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
    });
    always.saturating_sub(awake)
}
