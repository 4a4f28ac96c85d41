//! Is a connection possible? Asked with real sockets, from one host of a lab to another.
//!
//! A probe opens what it needs at both ends and exchanges one word there and back, so "passes"
//! means that data went both ways. "Denied" means that nothing came back in a bounded time; a test
//! that must be sure *why* compares the receiver's counters besides.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto};

use crate::host::Host;
use crate::packet;

/// How long a permitted connection may take: the first one waits for a WireGuard handshake, whose
/// first message may be lost and is sent again after five seconds. Less than the 15 s after which
/// WireGuard itself notices that a peer's session is gone (`KEEPALIVE_TIMEOUT` + `REKEY_TIMEOUT`).
pub const PASS_BOUND: Duration = Duration::from_secs(12);
/// How long a denied one is given. What passes here takes milliseconds.
pub const DENY_BOUND: Duration = Duration::from_millis(1500);

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Talk {
    /// TCP to a port.
    Tcp(u16),
    /// UDP to a port.
    Udp(u16),
    /// SCTP to a port, where the kernel has it.
    Sctp(u16),
    /// An ICMP or ICMPv6 echo.
    Ping,
    /// Another protocol by its number, with a few bytes of payload.
    Protocol(u8),
}

/// A question: can `from` start this talk with `to`, at the address `dst`?
#[derive(Clone)]
pub struct Question {
    /// Who starts.
    pub from: Arc<Host>,
    /// Who answers; has the address `dst`.
    pub to: Arc<Host>,
    /// Where to.
    pub dst: IpAddr,
    /// What.
    pub talk: Talk,
}

/// A question and whether the answer should be yes.
pub type Expectation = (Question, bool);

/// Asks all at once, for a denied answer takes time, and compares. Returns a line for each question
/// that was answered otherwise than expected; empty is good.
///
/// # Errors
/// If a probe cannot be set up at all.
pub fn disagreements(expectations: &[Expectation]) -> anyhow::Result<Vec<String>> {
    let answers: Vec<anyhow::Result<bool>> = std::thread::scope(|scope| {
        let ask = |(question, expected): &Expectation| {
            let bound = if *expected { PASS_BOUND } else { DENY_BOUND };
            let question = question.clone();
            scope.spawn(move || passes(&question, bound))
        };
        let threads: Vec<_> = expectations.iter().map(ask).collect();
        let answer = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(answer).collect()
    });
    let mut wrong = Vec::new();
    for ((question, expected), answer) in expectations.iter().zip(answers) {
        if answer? != *expected {
            let Question {
                from,
                to,
                dst,
                talk,
            } = question;
            let said = if *expected { "was denied" } else { "passed" };
            wrong.push(format!(
                "{} -> {} ({dst}) {talk:?} {said}",
                from.name, to.name
            ));
        }
    }
    Ok(wrong)
}

/// Asks one question.
///
/// # Errors
/// If the sockets for it cannot be opened, which says nothing about the network.
pub fn passes(question: &Question, bound: Duration) -> anyhow::Result<bool> {
    let Question {
        from,
        to,
        dst,
        talk,
    } = question;
    match *talk {
        Talk::Tcp(port) => tcp(from, to, *dst, port, bound),
        Talk::Udp(port) => udp(from, to, *dst, port, bound),
        Talk::Sctp(port) => sctp(from, to, *dst, port, bound),
        Talk::Ping => ping(from, *dst, bound),
        Talk::Protocol(number) => protocol(from, to, *dst, number, bound),
    }
}

/// One word over an echo service.
const WORD: &[u8] = b"is anybody there?";

fn tcp(from: &Host, to: &Host, dst: IpAddr, port: u16, bound: Duration) -> anyhow::Result<bool> {
    let _service = EchoTcp::start(to.listen(dst, port)?)?;
    let target = SocketAddr::new(dst, port);
    let Ok(stream) = from.enter(|| TcpStream::connect_timeout(&target, bound)) else {
        return Ok(false);
    };
    exchange(stream, bound)
}

/// Sends the word and waits for it to come back.
fn exchange(mut stream: TcpStream, bound: Duration) -> anyhow::Result<bool> {
    stream.set_read_timeout(Some(bound))?;
    let mut back = [0; WORD.len()];
    Ok(stream.write_all(WORD).is_ok() && stream.read_exact(&mut back).is_ok() && back == WORD)
}

fn udp(from: &Host, to: &Host, dst: IpAddr, port: u16, bound: Duration) -> anyhow::Result<bool> {
    let _service = EchoUdp::start(to.udp(dst, port)?)?;
    let socket = from.udp(packet::unspecified(dst), 0)?;
    socket.set_read_timeout(Some(bound))?;
    // What our own side's ACL drops may be refused at once: denied all the same.
    if socket.send_to(WORD, (dst, port)).is_err() {
        return Ok(false);
    }
    let mut back = [0; 64];
    let heard = socket.recv_from(&mut back);
    Ok(heard.is_ok_and(|(length, _)| &back[..length] == WORD))
}

fn sctp(from: &Host, to: &Host, dst: IpAddr, port: u16, bound: Duration) -> anyhow::Result<bool> {
    let open = || stream_socket(dst, ipproto::SCTP);
    let listener = to.enter(open)?;
    rustix::net::bind(&listener, &SocketAddr::new(dst, port))?;
    rustix::net::listen(&listener, 16)?;
    let _service = EchoTcp::start(TcpListener::from(listener))?;
    let stream = TcpStream::from(from.enter(open)?);
    // Bounds connect(2) too: socket(7), SO_SNDTIMEO.
    stream.set_write_timeout(Some(bound))?;
    if rustix::net::connect(&stream, &SocketAddr::new(dst, port)).is_err() {
        return Ok(false);
    }
    exchange(stream, bound)
}

fn stream_socket(addr: IpAddr, protocol: Protocol) -> rustix::io::Result<OwnedFd> {
    let (family, flags) = (packet::family(addr), SocketFlags::CLOEXEC);
    rustix::net::socket_with(family, SocketType::STREAM, flags, Some(protocol))
}

/// Whether the kernel speaks SCTP.
#[must_use]
pub fn kernel_has_sctp() -> bool {
    let flags = SocketFlags::CLOEXEC;
    let (inet, stream) = (AddressFamily::INET, SocketType::STREAM);
    rustix::net::socket_with(inet, stream, flags, Some(ipproto::SCTP)).is_ok()
}

/// Sends one echo request and waits for its reply.
fn ping(from: &Host, dst: IpAddr, bound: Duration) -> anyhow::Result<bool> {
    let number = if dst.is_ipv4() {
        packet::ICMP
    } else {
        packet::ICMPV6
    };
    let socket = from.enter(|| packet::raw_socket(dst, number))?;
    let id = fresh_id();
    let request = packet::echo_request(dst, id, 1, WORD);
    if socket.send_to(&request, (dst, 0)).is_err() {
        return Ok(false);
    }
    hears(&socket, bound, |packet| {
        packet::is_echo_reply(packet, dst, id)
    })
}

/// Sends a packet of a protocol without ports; the other side sends it back once.
fn protocol(
    from: &Host,
    to: &Host,
    dst: IpAddr,
    number: u8,
    bound: Duration,
) -> anyhow::Result<bool> {
    let theirs = to.enter(|| packet::raw_socket(dst, number))?;
    let ours = from.enter(|| packet::raw_socket(dst, number))?;
    let word = format!("{} {}", from.name, fresh_id());
    if ours.send_to(word.as_bytes(), (dst, 0)).is_err() {
        return Ok(false);
    }
    let mut source = None;
    let heard = hears_from(&theirs, bound, |bytes, from| {
        source = Some(from);
        packet::payload(bytes, dst).ends_with(word.as_bytes())
    })?;
    let Some(source) = source.filter(|_| heard) else {
        return Ok(false);
    };
    let answer = format!("{word} to you too");
    if theirs.send_to(answer.as_bytes(), (source.ip(), 0)).is_err() {
        return Ok(false);
    }
    hears(&ours, bound, |bytes| {
        packet::payload(bytes, dst).ends_with(answer.as_bytes())
    })
}

/// Whether a packet that fits arrives in time.
fn hears(
    socket: &UdpSocket,
    bound: Duration,
    mut fits: impl FnMut(&[u8]) -> bool,
) -> anyhow::Result<bool> {
    hears_from(socket, bound, |bytes, _| fits(bytes))
}

fn hears_from(
    socket: &UdpSocket,
    bound: Duration,
    mut fits: impl FnMut(&[u8], SocketAddr) -> bool,
) -> anyhow::Result<bool> {
    let deadline = Instant::now() + bound;
    let mut bytes = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        socket.set_read_timeout(Some(left))?;
        if let Ok((length, from)) = socket.recv_from(&mut bytes)
            && fits(&bytes[..length], from)
        {
            return Ok(true);
        }
    }
}

/// A number that no other probe of this process uses at the time.
fn fresh_id() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A TCP echo service; ends when dropped. What it accepted lives as long as the other end.
pub struct EchoTcp {
    listener: TcpListener,
}

impl EchoTcp {
    /// Serves on a listener.
    ///
    /// # Errors
    /// If the listener cannot be shared with a thread.
    pub fn start(listener: TcpListener) -> anyhow::Result<Self> {
        let accepting = listener.try_clone()?;
        std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                std::thread::spawn(move || echo(stream));
            }
        });
        Ok(Self { listener })
    }
}

impl Drop for EchoTcp {
    fn drop(&mut self) {
        // Wakes the thread that accepts: its accept fails from now on.
        let _woken = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

fn echo(mut stream: TcpStream) {
    let mut bytes = [0; 16384];
    while let Ok(length @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..length]).is_err() {
            break;
        }
    }
    // Fails only if the other side was faster.
    let _closed = stream.shutdown(Shutdown::Both);
}

/// A UDP echo service; has left its port when it is dropped.
pub struct EchoUdp {
    over: Arc<AtomicBool>,
    socket: UdpSocket,
    thread: Option<JoinHandle<()>>,
}

impl EchoUdp {
    /// Serves on a socket that is bound to a concrete address.
    ///
    /// # Errors
    /// If the socket cannot be shared with a thread.
    pub fn start(socket: UdpSocket) -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let (serving, seen) = (socket.try_clone()?, Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 65536];
            while !seen.load(Ordering::Relaxed) {
                if let Ok((length, from)) = serving.recv_from(&mut bytes) {
                    // A reply that our own ACL denies is dropped, as any packet may be.
                    let _sent = serving.send_to(&bytes[..length], from);
                }
            }
        });
        Ok(Self {
            over,
            socket,
            thread: Some(thread),
        })
    }
}

impl Drop for EchoUdp {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // A datagram to itself wakes the thread. Should that fail, it stays, and harms nobody.
        let awake = self
            .socket
            .local_addr()
            .and_then(|own| self.socket.send_to(&[], own));
        if let (Ok(_), Some(thread)) = (awake, self.thread.take()) {
            let _ended = thread.join();
        }
    }
}
