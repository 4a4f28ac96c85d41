//! Traffic that is counted while something else happens to the network.
//!
//! [`Numbered`] sends numbered datagrams at a steady pace and knows in the end which never came
//! back. [`Conversation`] keeps a TCP connection busy in both directions and knows when the last
//! byte arrived at either end.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::host::Host;
use crate::packet;
use crate::probe::EchoUdp;

/// Between two numbered datagrams.
const PACE: Duration = Duration::from_millis(5);
/// Between two words of a conversation: many of them run at once.
const SPEECH: Duration = Duration::from_millis(20);
/// How long the last replies may take, after the last datagram was sent.
const LAST_REPLY: Duration = Duration::from_secs(2);

/// Between two words of a trickle.
const DRIP: Duration = Duration::from_millis(5);
/// What each of them is.
const DROP_BYTES: usize = 1 << 14;

/// Sends at a pace that any path keeps up with, until it is over. The receiver sees the end.
///
/// # Errors
/// If nothing can be written for longer than `hang`.
pub fn trickle(stream: &mut TcpStream, hang: Duration, over: &AtomicBool) -> anyhow::Result<()> {
    stream.set_write_timeout(Some(hang))?;
    while !over.load(Ordering::Relaxed) {
        stream.write_all(&[7; DROP_BYTES])?;
        std::thread::sleep(DRIP);
    }
    Ok(stream.shutdown(Shutdown::Write)?)
}

/// Reads to the end, and counts. Returns the longest time without a byte.
///
/// # Errors
/// If nothing comes for longer than `hang`.
pub fn longest_pause(
    mut stream: TcpStream,
    hang: Duration,
    arrived: &AtomicU64,
) -> anyhow::Result<Duration> {
    stream.set_read_timeout(Some(hang))?;
    let (mut bytes, mut last) = (vec![0; 1 << 16], Instant::now());
    let mut longest = Duration::ZERO;
    loop {
        let length = stream.read(&mut bytes)?;
        (longest, last) = (longest.max(last.elapsed()), Instant::now());
        if length == 0 {
            return Ok(longest);
        }
        arrived.fetch_add(length as u64, Ordering::Relaxed);
    }
}

/// Numbered datagrams from one host to another and back.
pub struct Numbered {
    over: Arc<AtomicBool>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<anyhow::Result<BTreeSet<u64>>>,
    sent: Arc<AtomicU64>,
    replies: Arc<AtomicU64>,
    _service: EchoUdp,
}

/// How a numbered stream went.
#[derive(Clone, PartialEq, Eq)]
pub struct Losses {
    /// Datagrams sent.
    pub sent: u64,
    /// The numbers of those that never came back.
    pub lost: Vec<u64>,
}

impl Losses {
    /// The longest time in which nothing came back.
    #[must_use]
    pub fn outage(&self) -> Duration {
        let (mut longest, mut run, mut last) = (0, 0, None);
        for &number in &self.lost {
            let goes_on = last.is_some_and(|last| last + 1 == number);
            run = if goes_on { run + 1 } else { 1 };
            longest = longest.max(run);
            last = Some(number);
        }
        PACE * longest
    }
}

impl std::fmt::Debug for Losses {
    /// Lost numbers as ranges: when they were lost, and for how long, tells more than how many.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for &number in &self.lost {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == number => *last = number,
                Some(_) | None => ranges.push((number, number)),
            }
        }
        let (sent, lost) = (self.sent, self.lost.len());
        write!(f, "{sent} sent, {lost} lost: {ranges:?}")
    }
}

impl Numbered {
    /// Starts the stream, and returns when the first reply is there.
    ///
    /// # Errors
    /// If no reply comes.
    pub fn start(from: &Host, to: &Host, dst: IpAddr, port: u16) -> anyhow::Result<Self> {
        let service = EchoUdp::start(to.udp(dst, port)?)?;
        let socket = from.udp(packet::unspecified(dst), 0)?;
        socket.connect((dst, port))?;
        socket.set_read_timeout(Some(LAST_REPLY))?;
        // The handshake comes first: what is sent before it may be dropped by a full queue.
        let first =
            || socket.send(&u64::MAX.to_be_bytes()).is_ok() && socket.recv(&mut [0; 8]).is_ok();
        crate::wait_until(
            "the first datagram comes back",
            Duration::from_secs(20),
            first,
        )?;

        let over = Arc::new(AtomicBool::new(false));
        let (sent, replies): (Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        let (sending, receiving) = (socket.try_clone()?, socket);
        let (seen, counted) = (Arc::clone(&over), Arc::clone(&sent));
        let sender = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                let number = counted.fetch_add(1, Ordering::Relaxed);
                // A send that fails is a lost datagram like any other.
                let _sent = sending.send(&number.to_be_bytes());
                std::thread::sleep(PACE);
            }
        });
        let (seen, counted) = (Arc::clone(&over), Arc::clone(&replies));
        let receiver = std::thread::spawn(move || {
            let mut back = BTreeSet::new();
            let mut bytes = [0; 8];
            loop {
                match receiving.recv(&mut bytes) {
                    Ok(8) => {
                        back.insert(u64::from_be_bytes(bytes));
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(_) => {}
                    Err(_) if seen.load(Ordering::Relaxed) => return Ok(back),
                    // Silence, or an ICMP error shown as one: the numbers will tell.
                    Err(_) => {}
                }
            }
        });
        Ok(Self {
            over,
            sender,
            receiver,
            sent,
            replies,
            _service: service,
        })
    }

    /// Replies so far.
    #[must_use]
    pub fn replies(&self) -> u64 {
        self.replies.load(Ordering::Relaxed)
    }

    /// Waits until `count` more datagrams were sent, whatever becomes of them.
    ///
    /// # Errors
    /// If that does not happen in time.
    pub fn sends(&self, count: u64) -> anyhow::Result<()> {
        let target = self.sent.load(Ordering::Relaxed) + count;
        let what = format!("{count} more numbered datagrams are sent");
        let sent = || self.sent.load(Ordering::Relaxed) >= target;
        crate::wait_until(&what, Duration::from_secs(30), sent)
    }

    /// Waits until `count` more replies have come: traffic flows.
    ///
    /// # Errors
    /// If they do not come in time.
    pub fn flows(&self, count: u64) -> anyhow::Result<()> {
        let target = self.replies() + count;
        let what = format!("{count} more numbered datagrams come back");
        crate::wait_until(&what, Duration::from_secs(30), || self.replies() >= target)
    }

    /// Ends the stream and tells what was lost.
    ///
    /// # Errors
    /// If one of its threads failed.
    pub fn end(self) -> anyhow::Result<Losses> {
        self.over.store(true, Ordering::Relaxed);
        self.sender.join().ok().context("the sender died")?;
        let sent = self.sent.load(Ordering::Relaxed);
        let back = self.receiver.join().ok().context("the receiver died")??;
        let lost = (0..sent).filter(|number| !back.contains(number)).collect();
        Ok(Losses { sent, lost })
    }
}

/// A TCP connection that carries data in both directions all the time.
pub struct Conversation {
    start: Instant,
    over: Arc<AtomicBool>,
    /// Of the initiator and of the responder.
    ends: [End; 2],
}

/// One end of a conversation.
struct End {
    /// Bytes that arrived.
    bytes: Arc<AtomicU64>,
    /// When the last one did, in milliseconds after the start.
    last_ms: Arc<AtomicU64>,
    /// Whether it speaks at the moment.
    speaks: Arc<AtomicBool>,
}

impl Conversation {
    /// Connects, and starts to speak at both ends.
    ///
    /// # Errors
    /// If the connection is not possible.
    pub fn start(from: &Host, to: &Host, dst: IpAddr, port: u16) -> anyhow::Result<Self> {
        let listener = to.listen(dst, port)?;
        let target = SocketAddr::new(dst, port);
        let bound = crate::probe::PASS_BOUND;
        let near = from
            .enter(|| TcpStream::connect_timeout(&target, bound))
            .with_context(|| format!("{} cannot connect to {} {target}", from.name, to.name))?;
        let (far, _) = listener.accept()?;
        let (start, over) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let ends = [
            End::start(near, start, &over)?,
            End::start(far, start, &over)?,
        ];
        Ok(Self { start, over, ends })
    }

    /// Silences an end (0 the initiator, 1 the responder), or lets it speak again.
    pub fn speak(&self, end: usize, speaks: bool) {
        self.ends[end].speaks.store(speaks, Ordering::Relaxed);
    }

    /// Bytes that arrived at the initiator and at the responder.
    #[must_use]
    pub fn arrived(&self) -> [u64; 2] {
        [0, 1].map(|end| self.ends[end].bytes.load(Ordering::Relaxed))
    }

    /// When the last byte arrived at either end.
    #[must_use]
    pub fn last_arrival(&self) -> Instant {
        let last = |end: &End| end.last_ms.load(Ordering::Relaxed);
        let last = self.ends.iter().map(last).max().unwrap_or(0);
        self.start + Duration::from_millis(last)
    }

    /// Waits until more bytes have arrived at those ends that hear somebody.
    ///
    /// # Errors
    /// If they do not.
    pub fn flows(&self) -> anyhow::Result<()> {
        let before = self.arrived();
        let more = |arrived: [u64; 2]| {
            let heard = |end: usize| self.ends[1 - end].speaks.load(Ordering::Relaxed);
            (0..2).all(|end| !heard(end) || arrived[end] > before[end])
        };
        let bound = Duration::from_secs(20);
        crate::wait_until("both ends hear each other", bound, || more(self.arrived()))
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

impl End {
    /// Speaks and listens on its own threads until the conversation is over.
    fn start(stream: TcpStream, start: Instant, over: &Arc<AtomicBool>) -> anyhow::Result<Self> {
        /// How long a thread may take to see that the conversation is over.
        const LINGER: Duration = Duration::from_millis(200);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LINGER))?;
        stream.set_write_timeout(Some(LINGER))?;
        let end = Self {
            bytes: Arc::default(),
            last_ms: Arc::default(),
            speaks: Arc::new(AtomicBool::new(true)),
        };
        let (mut writing, mut reading) = (stream.try_clone()?, stream);
        let (done, speaks) = (Arc::clone(over), Arc::clone(&end.speaks));
        std::thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                if speaks.load(Ordering::Relaxed) {
                    // A full buffer or a dead connection: the other end's count will tell.
                    let _written = writing.write(&[7; 64]);
                }
                std::thread::sleep(SPEECH);
            }
        });
        let (done, bytes, last) = (
            Arc::clone(over),
            Arc::clone(&end.bytes),
            Arc::clone(&end.last_ms),
        );
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !done.load(Ordering::Relaxed) {
                match reading.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => {
                        bytes.fetch_add(length as u64, Ordering::Relaxed);
                        let now = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
                        last.store(now, Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
            }
        });
        Ok(end)
    }
}
