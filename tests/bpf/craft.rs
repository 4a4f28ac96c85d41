//! Packets as values, and the bytes that they are on the wire.

use std::net::IpAddr;

/// TCP flags by letter.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub body: Body,
    pub fragment: Option<Fragment>,
}

/// Its place in a fragmented datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    pub id: u16,
    /// In bytes.
    pub offset: u16,
    pub more: bool,
}

/// What it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Tcp(u16, u16, u8),
    Udp(u16, u16),
    /// Ports and the type of the first chunk.
    Sctp(u16, u16, u8),
    /// Question or answer, and identifier.
    Echo(bool, u16),
    /// An ICMP message of this type.
    Icmp(u8),
    /// An ICMP error about this packet.
    Error(Box<Spec>),
    /// A protocol of this number, without ports.
    Other(u8),
}

impl Spec {
    pub fn new(src: &str, dst: &str, body: Body) -> Self {
        Self {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            body,
            fragment: None,
        }
    }

    pub fn part(mut self, id: u16, offset: u16, more: bool) -> Self {
        self.fragment = Some(Fragment { id, offset, more });
        self
    }

    /// An ICMP error from `from` about this packet, to its sender.
    pub fn error_from(&self, from: &str) -> Self {
        Self {
            src: from.parse().unwrap(),
            dst: self.src,
            body: Body::Error(Box::new(self.clone())),
            fragment: None,
        }
    }

    pub fn protocol(&self) -> u8 {
        match (&self.body, self.src.is_ipv4()) {
            (Body::Tcp(..), _) => 6,
            (Body::Udp(..), _) => 17,
            (Body::Sctp(..), _) => 132,
            (Body::Echo(..) | Body::Icmp(_) | Body::Error(_), true) => 1,
            (Body::Echo(..) | Body::Icmp(_) | Body::Error(_), false) => 58,
            (Body::Other(protocol), _) => *protocol,
        }
    }

    fn transport(&self) -> Vec<u8> {
        let v4 = self.src.is_ipv4();
        let ports = |src: u16, dst: u16| [src.to_be_bytes(), dst.to_be_bytes()].concat();
        match &self.body {
            Body::Tcp(src, dst, flags) => {
                let rest = [0, 0, 0, 1, 0, 0, 0, 1, 0x50, *flags, 4, 0, 0, 0, 0, 0];
                [ports(*src, *dst), rest.to_vec(), vec![7; 12]].concat()
            }
            Body::Udp(src, dst) => [ports(*src, *dst), vec![0, 20, 0, 0], vec![7; 12]].concat(),
            Body::Sctp(src, dst, chunk) => {
                let rest = vec![0, 0, 0, 0, 0, 0, 0, 0, *chunk, 0, 0, 4];
                [ports(*src, *dst), rest].concat()
            }
            Body::Echo(request, id) => {
                let kind = match (v4, request) {
                    (true, true) => 8,
                    (true, false) => 0,
                    (false, true) => 128,
                    (false, false) => 129,
                };
                let id = id.to_be_bytes();
                [vec![kind, 0, 0, 0, id[0], id[1], 0, 1], vec![7; 24]].concat()
            }
            Body::Icmp(kind) => [vec![*kind, 0, 0, 0, 0, 0, 0, 0], vec![7; 8]].concat(),
            Body::Error(inner) => {
                let head = vec![if v4 { 3 } else { 1 }, 1, 0, 0, 0, 0, 0, 0];
                [head, inner.bytes()].concat()
            }
            Body::Other(_) => vec![7; 16],
        }
    }

    /// The bytes, from the IP header on. Checksums are not what is tested, and are zero.
    pub fn bytes(&self) -> Vec<u8> {
        let transport = self.transport();
        let payload = match self.fragment {
            Some(Fragment { offset, .. }) if offset != 0 => vec![9; 24],
            _ => transport,
        };
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let total = u16::try_from(20 + payload.len()).unwrap();
                let (id, field) = self.fragment.map_or((0, 0), |part| {
                    (
                        part.id,
                        part.offset / 8 + if part.more { 0x2000 } else { 0 },
                    )
                });
                let mut bytes = vec![0x45, 0];
                bytes.extend(total.to_be_bytes());
                bytes.extend(id.to_be_bytes());
                bytes.extend(field.to_be_bytes());
                bytes.extend([64, self.protocol(), 0, 0]);
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
                bytes.extend(payload);
                bytes
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let extension = self.fragment.map(|part| {
                    let field = part.offset | u16::from(part.more);
                    let mut header = vec![self.protocol(), 0];
                    header.extend(field.to_be_bytes());
                    header.extend(u32::from(part.id).to_be_bytes());
                    header
                });
                let next = if extension.is_some() {
                    44
                } else {
                    self.protocol()
                };
                let rest = [extension.unwrap_or_default(), payload].concat();
                let mut bytes = vec![0x60, 0, 0, 0];
                bytes.extend(u16::try_from(rest.len()).unwrap().to_be_bytes());
                bytes.extend([next, 64]);
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
                bytes.extend(rest);
                bytes
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                panic!("one packet, two families")
            }
        }
    }
}
