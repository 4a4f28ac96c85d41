//! Who is measured: a relay, with TLS or without, or the echo; and pairs of clients that send
//! through any of them.
//!
//! Each packet begins with its number and the time at which it left, so that whoever receives it
//! knows how long it took.

use std::net::{TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context;
use proto::derp::{Frame, kind};
use proto::key::{KEY_BYTES, NodeKey};
use tests::process::Process;

use super::STAMP_BYTES;
use super::client::{Client, Door};
use super::echo::Echo;

/// Who is measured.
pub struct Contender {
    /// What it is called.
    pub name: &'static str,
    /// Who carries the packets.
    pub carrier: Carrier,
}

/// Who carries the packets.
pub enum Carrier {
    /// A relay and its door.
    Relay(Process, Door),
    /// The echo.
    Echo(Echo),
}

/// One who sends.
pub enum Sender {
    /// To this key, by a relay.
    Relay(Client, NodeKey),
    /// By the echo.
    Echo(UdpSocket),
}

/// One who receives.
pub enum Receiver {
    /// By a relay.
    Relay(Client),
    /// By the echo.
    Echo(UdpSocket),
}

/// What ends a connection from elsewhere; a socket without one ends by itself.
pub type Handles = Vec<TcpStream>;

impl Contender {
    /// The process that carries the packets.
    pub fn process(&self) -> &Process {
        match &self.carrier {
            Carrier::Relay(process, _) => process,
            Carrier::Echo(echo) => &echo.process,
        }
    }

    /// Pairs of clients, and how to end their connections.
    pub fn pairs(&self, count: usize) -> anyhow::Result<(Vec<(Sender, Receiver)>, Handles)> {
        let (mut pairs, mut handles) = (Vec::new(), Vec::new());
        for number in 0..count {
            pairs.push(match &self.carrier {
                Carrier::Relay(_, door) => {
                    let sender = Client::join(door, 2 * number as u64 + 1)?;
                    let receiver = Client::join(door, 2 * number as u64 + 2)?;
                    handles.extend([sender.connection()?, receiver.connection()?]);
                    let dst = receiver.key;
                    (Sender::Relay(sender, dst), Receiver::Relay(receiver))
                }
                Carrier::Echo(echo) => {
                    let (sender, receiver) = echo.pair(number)?;
                    (Sender::Echo(sender), Receiver::Echo(receiver))
                }
            });
        }
        Ok((pairs, handles))
    }
}

/// Packets that are written at once, each stamped as it is added.
pub struct Batch {
    bytes: Vec<u8>,
    begin: Instant,
    packet: Vec<u8>,
}

impl Batch {
    /// None yet; packets of `size` bytes, their times counted from `begin`.
    pub fn new(size: usize, begin: Instant) -> Self {
        Self {
            bytes: Vec::new(),
            begin,
            packet: vec![0; size.max(STAMP_BYTES)],
        }
    }

    /// Sends packets with these numbers, as one write where the carrier takes streams.
    pub fn send(&mut self, by: &mut Sender, numbers: std::ops::Range<u64>) -> anyhow::Result<()> {
        let stamp = u64::try_from(self.begin.elapsed().as_nanos())?;
        self.bytes.clear();
        for number in numbers {
            self.packet[..8].copy_from_slice(&number.to_be_bytes());
            self.packet[8..STAMP_BYTES].copy_from_slice(&stamp.to_be_bytes());
            match by {
                Sender::Relay(_, dst) => {
                    let (dst, packet) = (*dst, &self.packet[..]);
                    Frame::SendPacket { dst, packet }.encode(&mut self.bytes);
                }
                // What the socket refuses is lost, as on any network.
                Sender::Echo(socket) => drop(socket.send(&self.packet)),
            }
        }
        if let Sender::Relay(client, _) = by {
            client.send(&self.bytes)?;
        }
        Ok(())
    }
}

impl Receiver {
    /// The next packet's number, and how long it took; `buffer` is the caller's to keep.
    pub fn next(
        &mut self,
        begin: Instant,
        buffer: &mut Vec<u8>,
    ) -> anyhow::Result<(u64, Duration)> {
        let packet = match self {
            Self::Relay(client) => {
                client.next_into(kind::RECV_PACKET, buffer)?;
                buffer.get(KEY_BYTES..)
            }
            Self::Echo(socket) => {
                buffer.resize(1 << 16, 0);
                let length = socket.recv(buffer)?;
                buffer.get(..length)
            }
        };
        let packet = packet.and_then(<[u8]>::first_chunk::<STAMP_BYTES>);
        let (number, sent) = packet.context("a packet was cut")?.split_at(8);
        let sent = Duration::from_nanos(u64::from_be_bytes(sent.try_into()?));
        let number = u64::from_be_bytes(number.try_into()?);
        Ok((number, begin.elapsed().saturating_sub(sent)))
    }
}
