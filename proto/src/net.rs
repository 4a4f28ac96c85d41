//! Prefixes, port ranges and protocol numbers: the address types that everyone shares.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// Why a text or a pair of numbers is not a [`Prefix`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// The part before the slash is no address.
    #[error("`{0}` is not an IP address")]
    Address(String),
    /// The part after the slash is no length of this family.
    #[error("`/{0}` is not a prefix length: write 0 to 32 for IPv4, 0 to 128 for IPv6")]
    Length(String),
    /// Bits after the prefix are set; `0` is the address, `1` the prefix that was probably meant.
    #[error("`{0}` has host bits set: write `{1}`")]
    HostBits(String, Prefix),
}

/// An IP prefix whose host bits are always zero (the kernel masks them when it reports, so any
/// other form would never converge).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// Every IPv4 address.
    pub const ALL_V4: Self = Self {
        addr: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        len: 0,
    };
    /// Every IPv6 address.
    pub const ALL_V6: Self = Self {
        addr: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        len: 0,
    };

    /// The prefix of `len` bits that contains `addr`; host bits are cleared.
    ///
    /// # Errors
    /// [`PrefixError::Length`] when `len` is too long for the family.
    pub fn containing(addr: IpAddr, len: u8) -> Result<Self, PrefixError> {
        if len > family_bits(addr) {
            return Err(PrefixError::Length(len.to_string()));
        }
        Ok(Self {
            addr: mask(addr, len),
            len,
        })
    }

    /// The prefix that holds exactly one address.
    #[must_use]
    pub fn host(addr: IpAddr) -> Self {
        Self {
            addr,
            len: family_bits(addr),
        }
    }

    /// The first address.
    #[must_use]
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    /// Length in bits.
    #[must_use]
    #[allow(
        clippy::len_without_is_empty,
        reason = "a prefix length, not a container's"
    )]
    pub fn len(&self) -> u8 {
        self.len
    }

    /// Whether it holds exactly one address.
    #[must_use]
    pub fn is_host(&self) -> bool {
        self.len == family_bits(self.addr)
    }

    /// Whether it is IPv4.
    #[must_use]
    pub fn is_v4(&self) -> bool {
        self.addr.is_ipv4()
    }

    /// Whether `addr` lies inside.
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.addr.is_ipv4() == addr.is_ipv4() && mask(addr, self.len) == self.addr
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.len <= other.len && self.contains(other.addr)
    }

    /// Whether the two share an address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

fn family_bits(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

fn mask(addr: IpAddr, len: u8) -> IpAddr {
    match addr {
        IpAddr::V4(v4) => {
            let keep = u32::MAX
                .checked_shl(32 - u32::from(len.min(32)))
                .unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & keep))
        }
        IpAddr::V6(v6) => {
            let keep = u128::MAX
                .checked_shl(128 - u32::from(len.min(128)))
                .unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & keep))
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    /// Reads `ADDR/LEN` or a bare address. Host bits that are set are an error that names the
    /// prefix that was probably meant.
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (addr_text, len_text) = match text.split_once('/') {
            Some((addr, len)) => (addr, Some(len)),
            None => (text, None),
        };
        let addr: IpAddr = addr_text
            .parse()
            .map_err(|_| PrefixError::Address(addr_text.to_owned()))?;
        let len = match len_text {
            None => family_bits(addr),
            Some(digits) => {
                let plain = digits.bytes().all(|b| b.is_ascii_digit());
                plain
                    .then(|| digits.parse().ok())
                    .flatten()
                    .ok_or_else(|| PrefixError::Length(digits.to_owned()))?
            }
        };
        let prefix = Self::containing(addr, len)?;
        if prefix.addr == addr {
            Ok(prefix)
        } else {
            Err(PrefixError::HostBits(text.to_owned(), prefix))
        }
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// Ports from `first` to `last`, both included; `first <= last` always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u16, u16)", into = "(u16, u16)")]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// `first` is greater than `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a port range runs from the lower to the higher port")]
pub struct PortRangeError;

impl PortRange {
    /// Every port, 0 to 65535.
    pub const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// The range from `first` to `last`.
    ///
    /// # Errors
    /// [`PortRangeError`] when `first > last`.
    pub fn new(first: u16, last: u16) -> Result<Self, PortRangeError> {
        if first <= last {
            Ok(Self { first, last })
        } else {
            Err(PortRangeError)
        }
    }

    /// One port.
    #[must_use]
    pub fn single(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// The first port.
    #[must_use]
    pub fn first(&self) -> u16 {
        self.first
    }

    /// The last port.
    #[must_use]
    pub fn last(&self) -> u16 {
        self.last
    }

    /// Whether `port` lies inside.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl TryFrom<(u16, u16)> for PortRange {
    type Error = PortRangeError;

    fn try_from((first, last): (u16, u16)) -> Result<Self, PortRangeError> {
        Self::new(first, last)
    }
}

impl From<PortRange> for (u16, u16) {
    fn from(range: PortRange) -> Self {
        (range.first, range.last)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// An IP protocol number (IANA "Assigned Internet Protocol Numbers").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Protocol(pub u8);

impl Protocol {
    /// Internet Control Message Protocol.
    pub const ICMP: Self = Self(1);
    /// Transmission Control Protocol.
    pub const TCP: Self = Self(6);
    /// User Datagram Protocol.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// Stream Control Transmission Protocol.
    pub const SCTP: Self = Self(132);

    /// Whether packets of this protocol carry ports that policy speaks of.
    #[must_use]
    pub fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ICMP => f.write_str("icmp"),
            Self::TCP => f.write_str("tcp"),
            Self::UDP => f.write_str("udp"),
            Self::ICMPV6 => f.write_str("ipv6-icmp"),
            Self::SCTP => f.write_str("sctp"),
            Self(number) => number.fmt(f),
        }
    }
}

/// An endpoint as DERP and disco write it, and what stands behind it; `None` if that is too short.
pub(crate) fn decode_endpoint(bytes: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let (ip, rest) = bytes.split_first_chunk::<16>()?;
    let (port, rest) = rest.split_first_chunk()?;
    let ip = Ipv6Addr::from(*ip).to_canonical();
    Some((SocketAddr::new(ip, u16::from_be_bytes(*port)), rest))
}

/// Appends an endpoint: address 16, an IPv4 one mapped into IPv6, and port 2.
pub(crate) fn encode_endpoint(endpoint: SocketAddr, out: &mut Vec<u8>) {
    let ip = match endpoint.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    out.extend_from_slice(&ip.octets());
    out.extend_from_slice(&endpoint.port().to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn prefixes_are_canonical_or_refused() {
        assert_eq!(prefix("10.0.0.0/8").to_string(), "10.0.0.0/8");
        assert_eq!(prefix("fd00::1").to_string(), "fd00::1/128");
        let error = "10.0.0.5/24".parse::<Prefix>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`10.0.0.5/24` has host bits set: write `10.0.0.0/24`"
        );
        for bad in [
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "::/129",
            "x/8",
            "",
        ] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn containment_respects_the_family_and_the_edges() {
        assert!(Prefix::ALL_V4.contains("255.255.255.255".parse().unwrap()));
        assert!(!Prefix::ALL_V4.contains("::".parse().unwrap()));
        assert!(prefix("10.0.0.0/9").overlaps(&prefix("10.0.0.0/8")));
        assert!(!prefix("10.0.0.0/9").overlaps(&prefix("10.128.0.0/9")));
        assert!(prefix("fd00::/8").covers(&prefix("fd12::/16")));
        assert!(!prefix("fd12::/16").covers(&prefix("fd00::/8")));
    }

    #[test]
    fn port_ranges_run_upwards() {
        assert_eq!(PortRange::new(2, 1), Err(PortRangeError));
        assert!(PortRange::new(1, 2).unwrap().contains(2));
        assert_eq!(PortRange::try_from((5, 4)), Err(PortRangeError));
    }
}
