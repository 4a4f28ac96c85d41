//! Whom a policy can name, and how such names are written.
//!
//! [`Target::parse`] reads one selector (`group:dev`, `tag:web`, `ana@example.com`, `10.0.0.0/8`,
//! `autogroup:member`, `*`, a host alias …); [`parse_ports`] a port list; [`Protocols::parse`] a
//! protocol. Whether a name exists and may stand where it stands is decided by `check`.

use crate::net::{PortRange, Prefix, PrefixError, Protocol};
use std::fmt;
use std::net::IpAddr;

/// An autogroup: a set that the network defines, not the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Autogroup {
    /// Every node that belongs to a user.
    Member,
    /// Every node that has tags.
    Tagged,
    /// The nodes of the user that asks.
    SelfNodes,
    /// What lies beyond exit nodes.
    Internet,
    /// Every address whatsoever, as a source.
    DangerAll,
    /// Nodes shared in from another network.
    Shared,
    /// Users with this role in the network.
    Role(Role),
    /// Every account but root (`ssh` users only).
    NonRoot,
}

/// A user's role in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say all there is to say")]
pub enum Role {
    Owner,
    Admin,
    ItAdmin,
    NetworkAdmin,
    BillingAdmin,
    Auditor,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 6] = [
        Self::Owner,
        Self::Admin,
        Self::ItAdmin,
        Self::NetworkAdmin,
        Self::BillingAdmin,
        Self::Auditor,
    ];

    /// Its name, as in `autogroup:it-admin`.
    #[must_use]
    pub fn name(self) -> &'static str {
        let known = AUTOGROUPS
            .iter()
            .find(|(_, group)| *group == Autogroup::Role(self));
        known.map_or("", |(name, _)| name)
    }
}

const AUTOGROUPS: [(&str, Autogroup); 13] = [
    ("member", Autogroup::Member),
    ("members", Autogroup::Member),
    ("tagged", Autogroup::Tagged),
    ("self", Autogroup::SelfNodes),
    ("internet", Autogroup::Internet),
    ("danger-all", Autogroup::DangerAll),
    ("shared", Autogroup::Shared),
    ("owner", Autogroup::Role(Role::Owner)),
    ("admin", Autogroup::Role(Role::Admin)),
    ("it-admin", Autogroup::Role(Role::ItAdmin)),
    ("network-admin", Autogroup::Role(Role::NetworkAdmin)),
    ("billing-admin", Autogroup::Role(Role::BillingAdmin)),
    ("auditor", Autogroup::Role(Role::Auditor)),
];
const NON_ROOT: &str = "nonroot";

impl Autogroup {
    fn parse(name: &str) -> Option<Self> {
        if name == NON_ROOT {
            return Some(Self::NonRoot);
        }
        let known = AUTOGROUPS.iter().find(|(text, _)| *text == name);
        known.map(|(_, autogroup)| *autogroup)
    }

    /// The names of all autogroups, with their prefix, for near misses.
    pub(super) fn names() -> impl Iterator<Item = String> {
        let all = AUTOGROUPS.iter().map(|(name, _)| *name).chain([NON_ROOT]);
        all.map(|name| format!("autogroup:{name}"))
    }
}

impl fmt::Display for Autogroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = AUTOGROUPS.iter().find(|(_, autogroup)| autogroup == self);
        write!(f, "autogroup:{}", known.map_or(NON_ROOT, |(name, _)| name))
    }
}

/// One selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// `*`: as a source every node and every approved subnet route, as a destination everything.
    Any,
    /// A set that the network defines.
    Autogroup(Autogroup),
    /// A user by login (`ana@example.com`), in lower case: logins know no other.
    User(String),
    /// Every user whose login ends in `@DOMAIN` (`user:*@example.com`).
    Domain(String),
    /// A group of users (`group:dev`), with its prefix.
    Group(String),
    /// Nodes that carry a tag (`tag:web`), with its prefix.
    Tag(String),
    /// A named address or network of the `hosts` section.
    Host(String),
    /// A named set of addresses of the `ipsets` section (`ipset:lab`), with its prefix.
    Ipset(String),
    /// A named service (`svc:db`), with its prefix.
    Service(String),
    /// An address, a prefix, or a range split into prefixes.
    Addrs(Vec<Prefix>),
}

/// Makes a selector of its full name.
type MakeNamed = fn(String) -> Target;

/// Why a text is no selector: what is wrong, and what to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SelectorError {
    pub(super) message: String,
    pub(super) hint: String,
}

impl SelectorError {
    fn new(message: String, hint: impl Into<String>) -> Self {
        Self {
            message,
            hint: hint.into(),
        }
    }
}

impl Target {
    /// Reads a selector. A word without any sign is taken for a host alias.
    pub(super) fn parse(text: &str) -> Result<Self, SelectorError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        if let Some(name) = text.strip_prefix("autogroup:") {
            let Some(autogroup) = Autogroup::parse(name) else {
                let names: Vec<String> = Autogroup::names().collect();
                let near = super::diagnostic::nearest(text, names.iter().map(String::as_str));
                let hint = near.map_or_else(
                    || format!("the autogroups are {}", names.join(", ")),
                    |near| format!("write `{near}`"),
                );
                return Err(SelectorError::new(
                    format!("unknown autogroup `{text}`"),
                    hint,
                ));
            };
            return Ok(Self::Autogroup(autogroup));
        }
        if let Some(domain) = text.strip_prefix("user:*@") {
            return if domain.is_empty() || domain.contains('@') {
                Err(SelectorError::new(
                    format!("`{text}` names no domain"),
                    "write `user:*@example.com`",
                ))
            } else {
                Ok(Self::Domain(domain.to_ascii_lowercase()))
            };
        }
        let prefixed: [(&str, MakeNamed); 4] = [
            ("group:", Self::Group),
            ("tag:", Self::Tag),
            ("ipset:", Self::Ipset),
            ("svc:", Self::Service),
        ];
        for (prefix, make) in prefixed {
            if let Some(name) = text.strip_prefix(prefix) {
                check_name(text, name)?;
                return Ok(make(text.to_owned()));
            }
        }
        if text.contains('@') {
            return parse_user(text);
        }
        if let Some(result) = parse_addrs(text) {
            return result.map(Self::Addrs);
        }
        if text.is_empty() {
            return Err(SelectorError::new(
                "an empty selector".to_owned(),
                "name a user, group, tag, host, address, or `*`",
            ));
        }
        if text.contains(':') || text.chars().any(char::is_whitespace) {
            return Err(SelectorError::new(
                format!("`{text}` selects nothing"),
                "write user@domain, group:NAME, tag:NAME, ipset:NAME, autogroup:NAME, a name of \
                 `hosts`, an address, a prefix, or `*`",
            ));
        }
        Ok(Self::Host(text.to_owned()))
    }
}

fn check_name(text: &str, name: &str) -> Result<(), SelectorError> {
    if name.is_empty() {
        return Err(SelectorError::new(
            format!("`{text}` has no name after the colon"),
            format!("write `{text}NAME`"),
        ));
    }
    if name.chars().any(|c| c.is_whitespace() || c == ':') {
        return Err(SelectorError::new(
            format!("`{text}` is no name"),
            "a name has no spaces and no further colon",
        ));
    }
    Ok(())
}

fn parse_user(text: &str) -> Result<Target, SelectorError> {
    match text.split_once('@') {
        Some((name, domain))
            if !name.is_empty() && !domain.contains('@') && !text.contains([' ', ':', '*']) =>
        {
            Ok(Target::User(text.to_ascii_lowercase()))
        }
        _ => Err(SelectorError::new(
            format!("`{text}` is no login"),
            "write `name@domain`",
        )),
    }
}

/// An address, prefix or range; `None` if the text does not look like one.
fn parse_addrs(text: &str) -> Option<Result<Vec<Prefix>, SelectorError>> {
    if let Some((first, last)) = text.split_once('-')
        && let (Ok(first), Ok(last)) = (first.trim().parse(), last.trim().parse())
    {
        return Some(range_to_prefixes(first, last).ok_or_else(|| {
            SelectorError::new(
                format!("`{text}` is no address range"),
                "write FIRST-LAST, both of one family, the lower first",
            )
        }));
    }
    let addr_text = text.split_once('/').map_or(text, |(addr, _)| addr);
    let looks_numeric =
        addr_text.contains('.') && addr_text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if addr_text.parse::<IpAddr>().is_err() && !looks_numeric && !text.contains('/') {
        return None;
    }
    Some(match text.parse::<Prefix>() {
        Ok(prefix) => Ok(vec![prefix]),
        Err(error @ PrefixError::HostBits(..)) => Err(SelectorError::new(error.to_string(), "")),
        Err(error) => Err(SelectorError::new(
            error.to_string(),
            "write an address (`10.0.0.7`) or a prefix (`10.0.0.0/8`)",
        )),
    })
}

/// The fewest prefixes that hold exactly the addresses from `first` to `last`.
pub(super) fn range_to_prefixes(first: IpAddr, last: IpAddr) -> Option<Vec<Prefix>> {
    let (bits, mut low, high, v4) = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            (32, u128::from(a.to_bits()), u128::from(b.to_bits()), true)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => (128, a.to_bits(), b.to_bits(), false),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    if low > high {
        return None;
    }
    let mut out = Vec::new();
    loop {
        let mut free = low.trailing_zeros().min(bits);
        while free > 0 && block_end(low, free) > high {
            free -= 1;
        }
        let addr = if v4 {
            IpAddr::from((low as u32).to_be_bytes())
        } else {
            IpAddr::from(low.to_be_bytes())
        };
        out.extend(Prefix::containing(addr, (bits - free) as u8));
        let end = block_end(low, free);
        if end >= high {
            return Some(out);
        }
        low = end + 1;
    }
}

/// The last address of the block of `2^free` addresses that starts at `low`.
fn block_end(low: u128, free: u32) -> u128 {
    low | 1u128.checked_shl(free).map_or(u128::MAX, |size| size - 1)
}

/// Reads a port list: `*`, `22`, `80,443`, `8000-8100`, or a mixture.
pub(super) fn parse_ports(text: &str) -> Result<Vec<PortRange>, String> {
    if text == "*" {
        return Ok(vec![PortRange::ALL]);
    }
    text.split(',').map(parse_port_range).collect()
}

fn parse_port_range(text: &str) -> Result<PortRange, String> {
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| digits.parse::<u16>().ok()).flatten()
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let bad = |digits: &str| format!("port range `{text}`: `{digits}` is no port from 1 to 65535");
    let low = number(first)
        .filter(|low| *low > 0)
        .ok_or_else(|| bad(first))?;
    let high = number(last).ok_or_else(|| bad(last))?;
    PortRange::new(low, high).map_err(|error| format!("port range `{text}`: {error}"))
}

/// The protocols that an entry allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocols {
    /// Nothing written: TCP, UDP, ICMP and ICMPv6.
    Usual,
    /// Exactly this one.
    One(Protocol),
}

const PROTOCOLS: [(&str, u8); 15] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ipv4", 4),
    ("ip-in-ip", 4),
    ("tcp", 6),
    ("egp", 8),
    ("igp", 9),
    ("udp", 17),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("icmpv6", 58),
    ("sctp", 132),
    ("fc", 133),
];

impl Protocols {
    /// Reads a protocol name or number. `icmp` means that of IPv4; write `ipv6-icmp` for the other.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        if lower.is_empty() {
            return Some(Self::Usual);
        }
        if let Some(protocol) = Self::named(&lower) {
            return Some(Self::One(protocol));
        }
        let plain = lower.bytes().all(|b| b.is_ascii_digit()) && !lower.starts_with('0');
        let number = plain.then(|| lower.parse().ok()).flatten()?;
        Some(Self::One(Protocol(number)))
    }

    /// The protocol with this name, in lower case.
    #[must_use]
    pub fn named(name: &str) -> Option<Protocol> {
        let known = PROTOCOLS.iter().find(|(known, _)| *known == name);
        known.map(|(_, number)| Protocol(*number))
    }

    /// The known protocol names, for near misses.
    pub(super) fn names() -> impl Iterator<Item = &'static str> {
        PROTOCOLS.iter().map(|(name, _)| *name)
    }

    /// The protocols as a list.
    pub(super) fn list(&self) -> Vec<Protocol> {
        match self {
            Self::Usual => vec![
                Protocol::ICMP,
                Protocol::TCP,
                Protocol::UDP,
                Protocol::ICMPV6,
            ],
            Self::One(protocol) => vec![*protocol],
        }
    }

    /// Whether ports mean something for all of them.
    pub(super) fn has_ports(&self) -> bool {
        match self {
            Self::Usual => true,
            Self::One(protocol) => protocol.has_ports(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn addrs(text: &str) -> Vec<String> {
        match Target::parse(text).unwrap() {
            Target::Addrs(list) => list.iter().map(ToString::to_string).collect(),
            other => panic!("{text} is {other:?}"),
        }
    }

    #[test]
    fn ranges_become_the_fewest_prefixes() {
        assert_eq!(addrs("10.0.0.1-10.0.0.6").len(), 4);
        assert_eq!(addrs("0.0.0.0-255.255.255.255"), ["0.0.0.0/0"]);
        assert_eq!(
            addrs("::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ["::/0"]
        );
        assert_eq!(addrs("fd00::5-fd00::5"), ["fd00::5/128"]);
        assert!(Target::parse("10.0.0.9-10.0.0.1").is_err());
        assert!(Target::parse("10.0.0.9-fd00::1").is_err());
    }

    #[test]
    fn words_are_hosts_and_signs_are_kept_apart() {
        assert_eq!(
            Target::parse("web").unwrap(),
            Target::Host("web".to_owned())
        );
        assert_eq!(
            Target::parse("10.0.0.1").unwrap(),
            Target::parse("10.0.0.1/32").unwrap()
        );
        for wrong in [
            "",
            "tag:",
            "group:a b",
            "a@b@c",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "1.2.3",
            "x:y",
        ] {
            assert!(Target::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_and_protocols() {
        assert_eq!(parse_ports("22,80-90").unwrap().len(), 2);
        for wrong in ["", "0", "ssh", "70000", "9-1", "1-", "-1", "80,", "+80"] {
            assert!(parse_ports(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Protocols::parse("ICMP").unwrap().list(), [Protocol::ICMP]);
        for wrong in ["256", "*", "06", "0", "tcpp"] {
            assert_eq!(Protocols::parse(wrong), None, "{wrong}");
        }
        assert!(!Protocols::parse("gre").unwrap().has_ports());
    }
}
