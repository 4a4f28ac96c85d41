//! A connection on which the relay knows us, until its end.
//!
//! Three things at once, in one task: reading, writing, and asking whether the relay is there. The
//! first to end ends the connection.

use super::dial::{Connected, Wire};
use super::frames::{Frames, Raw};
use super::outbox::{Outbox, Packet};
use super::{Event, LONGEST_RESTART, Link};
use engine::RelayEvent;
use proto::derp::{Frame, FrameError, is_disco, kind};
use proto::key::{KEY_BYTES, NodeKey};
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{sleep, timeout};

/// Between two questions whether the relay is there, and how long it may say nothing after one.
const PULSE: Duration = Duration::from_secs(2);
/// How long it may say nothing when the host's links have changed. TCP repeats itself ever later: on
/// links that are new, a new connection is there sooner.
const SHAKEN_PULSE: Duration = Duration::from_millis(600);
/// A write that makes no end in this time ends the connection.
const WRITE: Duration = Duration::from_secs(10);
/// How often it is told how long an answer takes.
const TELL_LATENCY: Duration = Duration::from_secs(10);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("the relay closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(#[source] io::Error),
    #[error("the relay fell silent")]
    Silent,
    #[error("the host's links changed, and the connection did not last")]
    Shaken,
    #[error("what the relay sends is no DERP: {0}")]
    Frame(#[from] FrameError),
    #[error("the relay restarts")]
    Restarting {
        /// When it wants to see us again.
        reconnect_in: Duration,
    },
    #[error("the agent stops")]
    Stopped,
}

impl End {
    /// How long to wait with the next connection, if that is not for us to say.
    pub(super) fn pause(&self) -> Option<Duration> {
        match self {
            Self::Restarting { reconnect_in } => Some((*reconnect_in).min(LONGEST_RESTART)),
            Self::Shaken => Some(Duration::ZERO),
            _ => None,
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Broken(error),
        }
    }
}

/// Whether the relay is there.
struct Pulse {
    heard: Instant,
    asked: Option<(u64, Instant)>,
    told: Option<Instant>,
}

/// Carries packets until the connection ends.
pub(super) async fn carry(connected: Connected, link: &Link) -> End {
    let Connected { wire, frames, .. } = connected;
    let (reader, writer) = tokio::io::split(wire);
    let pulse = Mutex::new(Pulse {
        heard: Instant::now(),
        asked: None,
        told: None,
    });
    let end = tokio::select! {
        end = read(reader, frames, link, &pulse) => end,
        end = write(writer, &link.outbox) => end,
        end = watch(link, &pulse) => Ok(end),
    };
    end.unwrap_or_else(|end| end)
}

async fn write(mut writer: WriteHalf<Box<dyn Wire>>, outbox: &Outbox) -> Result<End, End> {
    loop {
        let frames = outbox.take().await;
        let written = async {
            writer.write_all(&frames).await?;
            writer.flush().await
        };
        match timeout(WRITE, written).await {
            Ok(written) => written?,
            Err(_) => return Err(End::Silent),
        }
    }
}

/// Asks again and again; ends when an answer is missing. Any byte is an answer.
async fn watch(link: &Link, pulse: &Mutex<Pulse>) -> End {
    let mut shaken = link.shaken.clone();
    let mut patience = PULSE;
    for number in 0_u64.. {
        let now = Instant::now();
        with(pulse, |pulse| pulse.asked = Some((number, now)));
        link.outbox.note(&Frame::Ping(number.to_be_bytes()));
        tokio::select! {
            () = sleep(patience) => {}
            Ok(()) = shaken.changed() => {
                patience = SHAKEN_PULSE;
                continue;
            }
        }
        if with(pulse, |pulse| pulse.heard < now) {
            break;
        }
        patience = PULSE;
    }
    if patience == PULSE {
        End::Silent
    } else {
        End::Shaken
    }
}

async fn read(
    mut reader: ReadHalf<Box<dyn Wire>>,
    mut frames: Frames,
    link: &Link,
    pulse: &Mutex<Pulse>,
) -> Result<End, End> {
    let mut data = Vec::new();
    loop {
        while let Some(raw) = frames.next()? {
            if raw.kind == kind::RECV_PACKET {
                received(raw, link, &mut data);
            } else if let Some(end) = word(&raw, link, pulse)? {
                return Ok(end);
            }
        }
        if !data.is_empty() {
            for from in (link.config.deliver)(&data) {
                if link.tell(RelayEvent::Data { from }).await.is_err() {
                    return Ok(End::Stopped);
                }
            }
            data.clear();
        }
        frames.read(&mut reader).await?;
        with(pulse, |pulse| pulse.heard = Instant::now());
    }
}

/// A packet: discovery goes to the daemon, data to the kernel with what else came at once.
fn received(raw: Raw, link: &Link, data: &mut Vec<Packet>) {
    let mut body = raw.body;
    let Some(from) = body.first_chunk::<KEY_BYTES>().map(|key| NodeKey(*key)) else {
        return;
    };
    let packet = body.split_off(KEY_BYTES);
    if is_disco(&packet) {
        let bytes = packet.to_vec();
        link.mention(Event::Disco { from, bytes });
    } else if !packet.is_empty() {
        data.push((from, packet));
    }
}

/// What the relay says of itself and of peers; some of it ends the connection.
fn word(raw: &Raw, link: &Link, pulse: &Mutex<Pulse>) -> Result<Option<End>, End> {
    match raw.decode()? {
        Frame::Ping(bytes) => link.outbox.note(&Frame::Pong(bytes)),
        Frame::Pong(bytes) => {
            let number = u64::from_be_bytes(bytes);
            if let Some(latency) = with(pulse, |pulse| pulse.answered(number)) {
                link.mention(Event::Said(RelayEvent::Latency(latency)));
            }
        }
        Frame::PeerGone { peer, .. } => {
            link.mention(Event::Said(RelayEvent::PeerGone(peer)));
        }
        Frame::Restarting { reconnect_in, .. } => {
            return Ok(Some(End::Restarting { reconnect_in }));
        }
        Frame::Health(text) if !text.is_empty() => {
            tracing::warn!(region = %link.id, text, "the relay complains");
        }
        _ => {}
    }
    Ok(None)
}

impl Pulse {
    /// How long the answer took, if it is time to tell.
    fn answered(&mut self, number: u64) -> Option<Duration> {
        let (asked, at) = self.asked?;
        let now = Instant::now();
        let due = self.told.is_none_or(|told| now - told >= TELL_LATENCY);
        if asked != number || !due {
            return None;
        }
        self.told = Some(now);
        Some(now - at)
    }
}

fn with<T>(pulse: &Mutex<Pulse>, use_it: impl FnOnce(&mut Pulse) -> T) -> T {
    use_it(&mut pulse.lock().unwrap_or_else(PoisonError::into_inner))
}
