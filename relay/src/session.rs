//! One client: its login, its frames, and what it is sent.
//!
//! ```text
//! login   we say our key · it shows its own, sealed, and a permit · we admit it, or say why not
//! then    read: SendPacket → switch, Ping → Pong, …      both at once, in one task;
//!         write: whatever its queue holds, in batches    whichever ends first ends the session
//! ```
//!
//! A SendPacket frame and the RecvPacket frame that it becomes differ in two fields of the same
//! length, so a packet is carried in the buffer that it was read into: nothing is copied, and
//! nothing allocated for it alone.

use crate::admit::{Admission, Admitted, Pace, Refusal, burst};
use crate::metrics::Metrics;
use crate::queue::{BATCH, Queue};
use crate::switch::{Client, Forwarded, Switch, come_back, frame};
use bytes::{Buf, Bytes, BytesMut};
use proto::derp::login::NONCE_BYTES;
use proto::derp::{
    ClientInfo, Frame, FrameError, GoneReason, HEADER_BYTES, Header, KEEP_ALIVE, KEEP_ALIVE_JITTER,
    LoginBox, MAX_PACKET_BYTES, Sealed, ServerInfo, VERSION, WITHIN_BYTES, is_disco, kind,
};
use proto::id::NetworkId;
use proto::key::{KEY_BYTES, NodeKey, NodeSecret, RelayKey};
use std::collections::{BTreeSet, VecDeque};
use std::io::{self, IoSlice};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{sleep, timeout};

/// Longest login frame: a key, a permit and some words.
const MAX_LOGIN_BYTES: usize = 8 << 10;
/// Longest frame of a client that is logged in.
const MAX_BODY_BYTES: usize = KEY_BYTES + MAX_PACKET_BYTES;
/// The same of another relay.
pub(crate) const MAX_RELAY_BODY_BYTES: usize = WITHIN_BYTES + KEY_BYTES + MAX_BODY_BYTES;
/// Read at once from a client that is silent most of the time: a packet of full size on an ordinary
/// link (WireGuard's 1,420 bytes, sealed and framed), so that one that comes alone is read in one go.
const IDLE_BUFFER: usize = 1_536;
/// Read at once from a client that sends much. A packet that waits somewhere keeps its whole buffer
/// alive, so this bounds what a slow reader's queue can hold on to.
const BUSY_BUFFER: usize = 16 << 10;
/// Who sends more than two packets at once lets others run before more is read. To do so after each
/// packet would wake another thread for each.
const MANY_BYTES: usize = 2 * IDLE_BUFFER;
/// A write that makes no end in this time ends the session.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the last frame to be written.
const LAST_WRITE: Duration = Duration::from_secs(1);
/// Most peers of which a client's leaving is told.
const MAX_SENT_TO: usize = 4_096;
/// Most peers in one window that a client is told are not here.
const MAX_NOT_HERE: u32 = 32;
/// Length of that window.
const NOT_HERE_WINDOW: Duration = Duration::from_secs(1);
/// Longest time a permit's end is waited for; the rest is for the next session.
const LONGEST_SESSION: Duration = Duration::from_secs(30 * 24 * 3_600);

/// What all sessions share.
pub struct Shared {
    /// Who is here.
    pub switch: Switch,
    /// Who may be.
    pub admission: Admission,
    /// The keys of the region's other relays: who proves one of these is a relay, and no node.
    pub relays: BTreeSet<NodeKey>,
    /// Opens the logins.
    pub secret: NodeSecret,
    /// Bytes a second that a client may send; 0: no limit.
    pub rate: u64,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The connection ended or broke.
    #[error("the connection ended")]
    Closed(#[from] io::Error),
    /// What came was no frame.
    #[error("what the client sent is no DERP")]
    Frame(#[from] FrameError),
    /// The login frame was missing, unreadable or sealed for somebody else.
    #[error("the client's login cannot be read")]
    Login,
    /// See [`Refusal`].
    #[error("the client was refused")]
    Refused(#[from] Refusal),
    /// A frame that only relays of the same region may send.
    #[error("the client asked for what only relays of this region may")]
    NotRelay,
    /// What a relay cannot mean.
    #[error("a relay sent what only nodes do")]
    NotNode,
    /// It said nothing for too long.
    #[error("the other relay fell silent")]
    Silent,
    /// It did not read, or its connection is dead.
    #[error("the client did not take what it was sent")]
    Stuck,
    /// Its permit expired.
    #[error("the client's permit expired")]
    Expired,
    /// The relay stops.
    #[error("the relay stops")]
    Stopped,
}

impl Shared {
    /// Our key.
    #[must_use]
    pub fn key(&self) -> RelayKey {
        RelayKey(self.secret.public().0)
    }
}

/// A client that has logged in.
pub struct Session<S> {
    shared: Arc<Shared>,
    client: Arc<Client>,
    is_relay: bool,
    until: Option<u64>,
    reader: Reader<ReadHalf<S>>,
    writer: WriteHalf<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    /// The login. `greeting` goes out before the first frame, `buffer` holds what was read already.
    /// The caller bounds its time.
    ///
    /// # Errors
    /// Why there is no session; the client was told.
    pub async fn login(
        stream: S,
        greeting: String,
        buffer: BytesMut,
        shared: Arc<Shared>,
    ) -> Result<Self, End> {
        let (stream, mut writer) = tokio::io::split(stream);
        let mut reader = Reader::new(stream, buffer);
        let mut hello = greeting.into_bytes();
        Frame::ServerKey(shared.key()).encode(&mut hello);
        writer.write_all(&hello).await?;
        writer.flush().await?;
        let first = reader.frame(MAX_LOGIN_BYTES).await?;
        let (key, info, seal) = open_login(&first, &shared.secret).ok_or(End::Login)?;
        let is_relay = shared.relays.contains(&key);
        let admitted = match is_relay {
            true => Ok(Admitted {
                network: None,
                until: None,
            }),
            false => shared.admission.admit(key, &info, unix_time()),
        };
        let Admitted { network, until } = match admitted {
            Ok(admitted) => admitted,
            Err(refusal) => {
                // A client that knows no such answer sees a broken login, which it is.
                let told = Frame::Health(&refusal.to_string()).to_vec();
                writer.write_all(&told).await?;
                writer.shutdown().await?;
                return Err(refusal.into());
            }
        };
        let rate = if is_relay { 0 } else { shared.rate };
        let welcome = welcome(&seal, rate).ok_or(End::Login)?;
        writer.write_all(&welcome).await?;
        writer.flush().await?;
        Metrics::add(&shared.metrics.logins, 1);
        let client = match is_relay {
            true => shared.switch.enter_relay(key),
            false => shared.switch.enter(network, key),
        };
        Ok(Self {
            shared,
            client,
            is_relay,
            until,
            reader,
            writer,
        })
    }

    /// Everything after the login.
    pub async fn run(self) -> End {
        let Self {
            shared,
            client,
            is_relay,
            until,
            reader,
            writer,
        } = self;
        let rate = if is_relay { 0 } else { shared.rate };
        let mut incoming = Incoming {
            is_relay,
            pace: Pace::new(rate, Instant::now()),
            shared: &shared,
            client: &client,
            reader,
            sent_to: BTreeSet::new(),
            not_here: (Instant::now(), 0),
            home: false,
        };
        let left = until.map_or(LONGEST_SESSION, |until| {
            Duration::from_secs(until.saturating_sub(unix_time())).min(LONGEST_SESSION)
        });
        let mut writing = pin!(write(&client.queue, writer));
        let end = tokio::select! {
            end = incoming.run() => end,
            end = &mut writing => end,
            () = sleep(left) => {
                // A node that has its next permit is back before anybody misses it.
                client.queue.close(Some(come_back(Duration::ZERO)));
                let _ = timeout(LAST_WRITE, &mut writing).await;
                End::Expired
            }
        };
        client.queue.close(None);
        if incoming.home {
            Metrics::take(&shared.metrics.home, 1);
        }
        match is_relay {
            true => shared.switch.leave_relay(&client),
            false => shared.switch.leave(&client, &incoming.sent_to),
        }
        end
    }
}

/// Whose login it is, what it says, and the box for the answer.
fn open_login(bytes: &[u8], secret: &NodeSecret) -> Option<(NodeKey, ClientInfo, LoginBox)> {
    let (frame, _) = Frame::split(bytes).ok()??;
    let Frame::ClientInfo { key, sealed } = frame else {
        return None;
    };
    let seal = LoginBox::new(&*secret.agree(key.0)?);
    let info = serde_json::from_slice(&seal.open(sealed)?).ok()?;
    Some((key, info, seal))
}

fn welcome(seal: &LoginBox, rate: u64) -> Option<Vec<u8>> {
    let info = ServerInfo {
        version: VERSION,
        bytes_per_second: rate,
        bytes_burst: burst(rate),
    };
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).ok()?;
    let bytes = &seal.seal(nonce, &serde_json::to_vec(&info).ok()?);
    Some(Frame::ServerInfo(Sealed { nonce, bytes }).to_vec())
}

/// What a client sends.
struct Incoming<'a, R> {
    shared: &'a Shared,
    client: &'a Client,
    is_relay: bool,
    reader: Reader<R>,
    pace: Pace,
    sent_to: BTreeSet<NodeKey>,
    /// Since when, and how many notices went out.
    not_here: (Instant, u32),
    home: bool,
}

impl<R: AsyncRead + Unpin> Incoming<'_, R> {
    async fn run(&mut self) -> End {
        let longest = match self.is_relay {
            true => MAX_RELAY_BODY_BYTES,
            false => MAX_BODY_BYTES,
        };
        loop {
            let bytes = match self.reader.frame(longest).await {
                Ok(bytes) => bytes,
                Err(end) => return end,
            };
            let length = bytes.len();
            if let Err(end) = self.take(bytes) {
                return end;
            }
            if let Some(wait) = self.pace.take(length, Instant::now()) {
                Metrics::add(&self.shared.metrics.paced, 1);
                sleep(wait).await;
            }
        }
    }

    fn take(&mut self, bytes: BytesMut) -> Result<(), End> {
        let Some((frame, _)) = Frame::split(&bytes)? else {
            return Ok(());
        };
        match frame {
            Frame::SendPacket { .. } if self.is_relay => return Err(End::NotNode),
            Frame::SendPacket { dst, packet } => {
                let disco = is_disco(packet);
                self.forward(dst, disco, bytes);
            }
            Frame::Ping(data) => {
                let pong = self::frame(&Frame::Pong(data));
                self.client.queue.push_control(pong);
            }
            Frame::NotePreferred(home) => self.note_home(home),
            Frame::ForwardPacket { .. }
            | Frame::Within { .. }
            | Frame::WatchConns
            | Frame::ClosePeer(_)
                if !self.is_relay =>
            {
                return Err(End::NotRelay);
            }
            Frame::WatchConns => self.shared.switch.watch(self.client),
            Frame::ClosePeer(peer) => self.shared.switch.close_peer(peer),
            Frame::ForwardPacket { src, dst, packet } => {
                let disco = is_disco(packet);
                self.deliver(None, (src, dst), disco, bytes);
            }
            Frame::Within {
                network,
                kind,
                body,
            } => {
                if let Frame::ForwardPacket { src, dst, packet } = Frame::decode(kind, body)? {
                    let disco = is_disco(packet);
                    self.deliver(Some(network), (src, dst), disco, bytes);
                }
            }
            // Sent by relays alone, or of a later version: it changes nothing here.
            Frame::ServerKey(_)
            | Frame::ClientInfo { .. }
            | Frame::ServerInfo(_)
            | Frame::RecvPacket { .. }
            | Frame::KeepAlive
            | Frame::PeerGone { .. }
            | Frame::PeerPresent { .. }
            | Frame::Pong(_)
            | Frame::Health(_)
            | Frame::Restarting { .. }
            | Frame::Unknown(_) => {}
        }
        Ok(())
    }

    fn forward(&mut self, dst: NodeKey, disco: bool, mut bytes: BytesMut) {
        into_recv_packet(&mut bytes, self.client.key);
        let bytes = bytes.freeze();
        let switch = &self.shared.switch;
        match switch.forward(self.client, dst, bytes, disco) {
            Forwarded::Queued => {
                if self.sent_to.len() < MAX_SENT_TO {
                    self.sent_to.insert(dst);
                }
            }
            Forwarded::NotHere => self.tell_not_here(dst),
        }
    }

    /// A packet of another relay's client; it stays in its buffer like any other.
    fn deliver(
        &self,
        network: Option<NetworkId>,
        (src, dst): (NodeKey, NodeKey),
        disco: bool,
        mut bytes: BytesMut,
    ) {
        // Before the destination: the source, and what wraps it.
        let before = KEY_BYTES + network.map_or(0, |_| WITHIN_BYTES);
        let _ = bytes.split_to(before);
        let header = Header {
            kind: kind::RECV_PACKET,
            length: bytes.len().saturating_sub(HEADER_BYTES),
        };
        if let Some(place) = bytes.first_chunk_mut() {
            *place = header.encode();
        }
        into_recv_packet(&mut bytes, src);
        self.shared
            .switch
            .deliver(network, dst, bytes.freeze(), disco);
    }

    fn tell_not_here(&mut self, peer: NodeKey) {
        let (since, told) = &mut self.not_here;
        let now = Instant::now();
        if now.duration_since(*since) >= NOT_HERE_WINDOW {
            (*since, *told) = (now, 0);
        }
        if *told < MAX_NOT_HERE {
            *told += 1;
            let reason = GoneReason::NotHere;
            let notice = frame(&Frame::PeerGone { peer, reason });
            self.client.queue.push_control(notice);
        }
    }

    fn note_home(&mut self, home: bool) {
        let gauge = &self.shared.metrics.home;
        match (self.home, home) {
            (false, true) => Metrics::add(gauge, 1),
            (true, false) => Metrics::take(gauge, 1),
            (false, false) | (true, true) => {}
        }
        self.home = home;
    }
}

/// `kind ‖ length ‖ destination ‖ packet` becomes `kind ‖ length ‖ source ‖ packet`.
fn into_recv_packet(bytes: &mut BytesMut, src: NodeKey) {
    if let Some(first) = bytes.first_mut() {
        *first = kind::RECV_PACKET;
    }
    if let Some(place) = bytes.get_mut(HEADER_BYTES..HEADER_BYTES + KEY_BYTES) {
        place.copy_from_slice(&src.0);
    }
}

/// Cuts a byte stream into frames, each a slice of what was read.
pub(crate) struct Reader<R> {
    stream: R,
    buffer: BytesMut,
    /// The last read had more than a packet: the next one may, too.
    busy: bool,
    /// The last read left others work, and may have left more to read.
    much: bool,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(crate) fn new(stream: R, buffer: BytesMut) -> Self {
        Self {
            stream,
            buffer,
            busy: false,
            much: false,
        }
    }

    /// The next frame, header included.
    pub(crate) async fn frame(&mut self, limit: usize) -> Result<BytesMut, End> {
        loop {
            let mut wanted = HEADER_BYTES;
            if let Some(header) = self.buffer.first_chunk() {
                let Header { kind, length } = Header::decode(*header)?;
                if length > limit {
                    return Err(FrameError::TooLong { kind, length }.into());
                }
                wanted += length;
                if self.buffer.len() >= wanted {
                    return Ok(self.buffer.split_to(wanted));
                }
            }
            self.fill(wanted - self.buffer.len()).await?;
        }
    }

    async fn fill(&mut self, missing: usize) -> io::Result<()> {
        if self.much {
            // Those who were just handed packets write them before there are more.
            tokio::task::yield_now().await;
        }
        let usual = if self.busy { BUSY_BUFFER } else { IDLE_BUFFER };
        if self.buffer.is_empty() && !self.busy && self.buffer.capacity() > IDLE_BUFFER {
            self.buffer = BytesMut::new();
        }
        // A little room left is not worth a read of its own.
        let mut room = self.buffer.capacity() - self.buffer.len();
        if room < missing.max(usual / 4) {
            self.buffer.reserve(missing.max(usual));
            room = self.buffer.capacity() - self.buffer.len();
        }
        let read = self.stream.read_buf(&mut self.buffer).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.busy = read >= room.min(IDLE_BUFFER);
        self.much = read >= room.min(MANY_BYTES);
        Ok(())
    }
}

/// Writes what waits in a queue, and that the relay is alive when nothing does.
pub(crate) async fn write<W: AsyncWrite + Unpin>(queue: &Queue, mut writer: W) -> End {
    let mut batch = Batch::default();
    let silence = keep_alive();
    loop {
        let more = tokio::select! {
            biased;
            more = queue.take(&mut batch.frames) => more,
            () = sleep(silence) => {
                queue.shrink();
                queue.push_control(frame(&Frame::KeepAlive));
                continue;
            }
        };
        if !more {
            let _ = timeout(LAST_WRITE, writer.shutdown()).await;
            return End::Stopped;
        }
        let written = async {
            writer.write_all_buf(&mut batch).await?;
            writer.flush().await
        };
        match timeout(WRITE_TIMEOUT, written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return End::Closed(error),
            Err(_) => return End::Stuck,
        }
        if batch.frames.capacity() > BATCH {
            batch.frames = VecDeque::new();
        }
    }
}

/// After how much silence of ours a client is told that we are here.
fn keep_alive() -> Duration {
    let mut spread = [0; 2];
    // Without chance they come at once, which works too.
    let _ = getrandom::fill(&mut spread);
    let part = f64::from(u16::from_be_bytes(spread)) / f64::from(u16::MAX);
    KEEP_ALIVE + KEEP_ALIVE_JITTER.mul_f64(part)
}

fn unix_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Frames that are written together.
#[derive(Default)]
struct Batch {
    frames: VecDeque<Bytes>,
}

impl Buf for Batch {
    fn remaining(&self) -> usize {
        self.frames.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.frames.front().map_or(&[], |frame| frame)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        for (slice, frame) in slices.iter_mut().zip(&self.frames) {
            *slice = IoSlice::new(frame);
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(frame) = self.frames.front_mut() {
            if count < frame.len() {
                frame.advance(count);
                return;
            }
            count -= frame.len();
            self.frames.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_changes_its_address_in_place() {
        let (src, dst) = (NodeKey([1; 32]), NodeKey([2; 32]));
        let packet = b"sealed";
        let mut bytes = BytesMut::from(&Frame::SendPacket { dst, packet }.to_vec()[..]);
        let place = bytes.as_ptr();
        into_recv_packet(&mut bytes, src);
        assert_eq!(bytes.as_ptr(), place);
        assert_eq!(bytes[..], Frame::RecvPacket { src, packet }.to_vec());
    }

    #[test]
    fn a_batch_is_written_in_any_pieces() {
        let frames = || VecDeque::from([&b"one"[..], b"", b"three"].map(Bytes::from_static));
        for step in 1..8 {
            let mut batch = Batch { frames: frames() };
            let mut out = Vec::new();
            while batch.has_remaining() {
                let mut slices = [IoSlice::new(&[]); 8];
                let count = batch.chunks_vectored(&mut slices);
                let seen = slices[..count].iter().flat_map(|slice| slice.to_vec());
                let seen: Vec<u8> = seen.take(step).collect();
                batch.advance(seen.len());
                out.extend(seen);
            }
            assert_eq!(out, b"onethree", "{step}");
        }
    }

    fn client() -> Arc<Client> {
        let metrics = Arc::new(Metrics::default());
        Switch::new(metrics).enter(None, NodeKey([1; 32]))
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_hears_in_each_silence_that_the_relay_is_there() {
        let client = client();
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let hear = async {
            let start = tokio::time::Instant::now();
            for _ in 0..3 {
                let mut heard = [0; HEADER_BYTES];
                far.read_exact(&mut heard).await.unwrap();
                assert_eq!(heard, Frame::KeepAlive.to_vec()[..]);
            }
            start.elapsed()
        };
        let took = tokio::select! {
            took = hear => took,
            end = write(&client.queue, near) => panic!("{end}"),
        };
        let (least, most) = (3 * KEEP_ALIVE, 3 * (KEEP_ALIVE + KEEP_ALIVE_JITTER));
        assert!(least <= took && took <= most, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up() {
        let client = client();
        // It takes a few bytes and then no more, with its connection open.
        let (near, _far) = tokio::io::duplex(8);
        client.queue.push_packet(Bytes::from(vec![0; 1_200]), false);
        let start = tokio::time::Instant::now();
        let end = write(&client.queue, near).await;
        assert!(matches!(end, End::Stuck), "{end}");
        assert_eq!(start.elapsed(), WRITE_TIMEOUT);
    }

    #[tokio::test]
    async fn frames_come_whole_however_the_stream_is_cut() {
        let mut stream = Vec::new();
        for length in [0, 1, 1_200, 65_536, 3] {
            let packet = &vec![7; length];
            let dst = NodeKey([2; 32]);
            Frame::SendPacket { dst, packet }.encode(&mut stream);
        }
        for piece in [1, 7, 1_000, 100_000] {
            let mut mock = in_pieces(&stream, piece);
            let mut reader = Reader::new(&mut mock, BytesMut::new());
            let mut lengths = Vec::new();
            while let Ok(frame) = reader.frame(MAX_BODY_BYTES).await {
                lengths.push(frame.len() - HEADER_BYTES - KEY_BYTES);
            }
            assert_eq!(lengths, [0, 1, 1_200, 65_536, 3], "{piece}");
        }
    }

    /// A stream that yields at most `piece` bytes a read.
    fn in_pieces(stream: &[u8], piece: usize) -> impl AsyncRead + Unpin {
        let (mut near, far) = tokio::io::duplex(piece);
        let stream = stream.to_vec();
        tokio::spawn(async move { near.write_all(&stream).await });
        far
    }

    #[tokio::test]
    async fn a_frame_beyond_the_limit_is_refused_before_it_is_read() {
        let header = Header {
            kind: kind::PING,
            length: MAX_BODY_BYTES + 1,
        };
        let bytes = header.encode();
        let mut reader = Reader::new(&bytes[..], BytesMut::new());
        let end = reader.frame(MAX_BODY_BYTES).await;
        assert!(matches!(end, Err(End::Frame(FrameError::TooLong { .. }))));
    }
}
