//! Which names, prefixes and offers are legal. Pure, but for the random numbers at the end.

use super::CommandError;
use proto::control::MAX_HOSTNAME_BYTES;
use proto::id::NetworkId;
use proto::net::Prefix;
use proto::netmap::{MAX_ENDPOINTS_PER_NODE, MAX_ROUTES_PER_NODE, Network};
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest login (RFC 5321 4.5.3.1: local part, at sign, domain).
const MAX_LOGIN_BYTES: usize = 64 + 1 + 255;
/// Most tags of one token.
const MAX_TAGS: usize = 64;
/// Names further apart than this are not taken for a slip of the finger.
const MAX_EDITS: usize = 3;

/// What a name names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind {
    /// A network.
    Network,
    /// A user, by login.
    User,
    /// A tag.
    Tag,
    /// A node.
    Node,
}

impl NameKind {
    /// What a legal name looks like.
    #[must_use]
    pub fn rule(self) -> &'static str {
        match self {
            Self::Network | Self::Node => {
                "use 1 to 63 lower-case letters, digits and hyphens, with no hyphen at either end"
            }
            Self::User => "write NAME@DOMAIN in lower case",
            Self::Tag => {
                "write `tag:` and a name that starts with a letter, then lower-case \
                          letters, digits and hyphens"
            }
        }
    }
}

impl fmt::Display for NameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Network => "network",
            Self::User => "user",
            Self::Tag => "tag",
            Self::Node => "node",
        })
    }
}

fn refused(kind: NameKind, name: &str) -> CommandError {
    CommandError::Name {
        kind,
        name: name.chars().take(MAX_LOGIN_BYTES).collect(),
    }
}

/// A network's or node's name: one label (RFC 1123 2.1), lower case.
///
/// # Errors
/// [`CommandError::Name`].
pub fn name(kind: NameKind, given: &str) -> Result<String, CommandError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let legal = (1..=MAX_HOSTNAME_BYTES).contains(&given.len())
        && given.bytes().all(plain)
        && !given.starts_with('-')
        && !given.ends_with('-');
    if legal {
        Ok(given.to_owned())
    } else {
        Err(refused(kind, given))
    }
}

/// A user's login, in lower case.
///
/// # Errors
/// [`CommandError::Name`].
pub fn login(given: &str) -> Result<String, CommandError> {
    let lower = given.to_ascii_lowercase();
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'@' | b',' | b'"' | b'\\');
    let legal = lower.len() <= MAX_LOGIN_BYTES
        && lower.split_once('@').is_some_and(|(local, domain)| {
            !local.is_empty()
                && !domain.is_empty()
                && local.bytes().all(plain)
                && domain.bytes().all(plain)
        });
    if legal {
        Ok(lower)
    } else {
        Err(refused(NameKind::User, given))
    }
}

/// A node's tags: at least one.
///
/// # Errors
/// [`CommandError::Name`].
pub fn owner_tags(given: BTreeSet<String>) -> Result<BTreeSet<String>, CommandError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    for tag in &given {
        let rest = tag.strip_prefix("tag:").unwrap_or_default();
        let first = rest
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_lowercase());
        if !first || rest.len() > MAX_HOSTNAME_BYTES || !rest.bytes().all(plain) {
            return Err(refused(NameKind::Tag, tag));
        }
    }
    if given.is_empty() || given.len() > MAX_TAGS {
        return Err(refused(NameKind::Tag, ""));
    }
    Ok(given)
}

/// The name that a node gets for this host name: whatever it says becomes a legal label.
#[must_use]
pub fn hostname(given: &str) -> String {
    let first = given
        .split('.')
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let label: String = first.chars().map(plain).take(MAX_HOSTNAME_BYTES).collect();
    match label.trim_matches('-') {
        "" => "node".to_owned(),
        label => label.to_owned(),
    }
}

/// `wanted`, or with the first number behind it that makes it unique: `web`, `web-2`, `web-3`.
#[must_use]
pub fn unique(wanted: &str, taken: &BTreeSet<String>) -> String {
    let numbered = (2..).map(|number: u64| {
        let suffix = format!("-{number}");
        let room = MAX_HOSTNAME_BYTES - suffix.len();
        let stem: String = wanted.chars().take(room).collect();
        format!("{}{suffix}", stem.trim_end_matches('-'))
    });
    let mut candidates = std::iter::once(wanted.to_owned()).chain(numbered);
    candidates
        .find(|name| !taken.contains(name))
        .unwrap_or_default()
}

/// Why nodes cannot get addresses from a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressReason {
    /// Not of the family asked for.
    #[error("it is of the other address family")]
    Family,
    /// Too small or too large.
    #[error("write a length from /8 to /29 for IPv4, from /16 to /120 for IPv6")]
    Length,
    /// Special use (RFC 6890).
    #[error("it overlaps {0}, which has a meaning of its own")]
    Special(Prefix),
}

/// The prefix, if nodes can get IPv4 addresses from it.
pub(super) fn v4(prefix: Prefix) -> Result<Prefix, CommandError> {
    // This host, loopback, link-local, multicast and reserved (RFC 6890 2.2.2).
    let special = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"];
    addresses(prefix, true, 8..=29, &special)
}

/// The prefix, if nodes can get IPv6 addresses from it.
pub(super) fn v6(prefix: Prefix) -> Result<Prefix, CommandError> {
    // Loopback, mapped v4 and the like, link-local, multicast (RFC 6890 2.2.3).
    let special = ["::/8", "fe80::/10", "ff00::/8"];
    addresses(prefix, false, 16..=120, &special)
}

fn addresses(
    prefix: Prefix,
    is_v4: bool,
    lengths: std::ops::RangeInclusive<u8>,
    special: &[&str],
) -> Result<Prefix, CommandError> {
    let special = special
        .iter()
        .filter_map(|text| text.parse::<Prefix>().ok());
    let reason = if prefix.is_v4() != is_v4 {
        Some(AddressReason::Family)
    } else if let Some(taken) = special.into_iter().find(|it| it.overlaps(&prefix)) {
        Some(AddressReason::Special(taken))
    } else if !lengths.contains(&prefix.len()) {
        Some(AddressReason::Length)
    } else {
        None
    };
    match reason {
        Some(reason) => Err(CommandError::Addresses { prefix, reason }),
        None => Ok(prefix),
    }
}

/// The last host number that both prefixes have an address for.
pub(super) fn last_host(v4: Prefix, v6: Prefix) -> u64 {
    // The first address of a v4 prefix names the prefix, the last is its broadcast address.
    let v4_last = (1_u64 << (32 - u32::from(v4.len()))) - 2;
    let v6_bits = 128 - u32::from(v6.len());
    let v6_last = 1_u64.checked_shl(v6_bits).map_or(u64::MAX, |size| size - 1);
    v4_last.min(v6_last)
}

/// Carrier-grade NAT space (RFC 6598), which no server's LAN uses.
pub(super) fn default_v4() -> Prefix {
    let base = IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0));
    Prefix::containing(base, 10).unwrap_or(Prefix::ALL_V4)
}

/// A unique local /48 (RFC 4193 3.2.2: 40 random bits).
pub(super) fn random_v6() -> Prefix {
    let mut octets = [0; 16];
    fill_random(&mut octets[1..6]);
    octets[0] = 0xfd;
    Prefix::containing(IpAddr::V6(Ipv6Addr::from(octets)), 48).unwrap_or(Prefix::ALL_V6)
}

/// An id that says nothing about how many networks there are. 53 bits pass through any JSON reader.
pub(super) fn random_network_id() -> NetworkId {
    let mut bytes = [0; 8];
    fill_random(&mut bytes);
    NetworkId((u64::from_be_bytes(bytes) >> 11).max(1))
}

/// Fills `bytes` from the operating system. Without randomness there is nothing safe to do.
#[allow(
    clippy::expect_used,
    reason = "a coordinator without randomness must not go on"
)]
pub(super) fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the operating system gives random bytes");
}

/// Why what a node says of itself is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// See [`MAX_ROUTES_PER_NODE`].
    #[error("a node offers at most {MAX_ROUTES_PER_NODE} routes")]
    TooManyRoutes,
    /// See [`MAX_ENDPOINTS_PER_NODE`].
    #[error("a node reports at most {MAX_ENDPOINTS_PER_NODE} endpoints")]
    TooManyEndpoints,
    /// The route would catch the network's own addresses.
    #[error("the route {route} overlaps {own}, the addresses of the network's nodes")]
    OwnPrefix {
        /// The route.
        route: Prefix,
        /// The network's prefix.
        own: Prefix,
    },
    /// Exit nodes are another thing.
    #[error("the default route {0} cannot be offered as a subnet route; name the subnets")]
    Default(Prefix),
}

/// What a node says of itself, cut to what its peers can use.
pub(super) fn offer(
    network: &Network,
    routes: &BTreeSet<Prefix>,
    endpoints: &[SocketAddr],
) -> Result<Vec<SocketAddr>, OfferError> {
    if routes.len() > MAX_ROUTES_PER_NODE {
        return Err(OfferError::TooManyRoutes);
    }
    if endpoints.len() > MAX_ENDPOINTS_PER_NODE {
        return Err(OfferError::TooManyEndpoints);
    }
    for route in routes {
        if route.len() == 0 {
            return Err(OfferError::Default(*route));
        }
        if let Some(own) = [network.v4, network.v6]
            .into_iter()
            .find(|own| own.overlaps(route))
        {
            return Err(OfferError::OwnPrefix { route: *route, own });
        }
    }
    let mut usable: Vec<SocketAddr> = Vec::new();
    for endpoint in endpoints {
        let plain = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
        if crate::snapshot::is_endpoint(plain) && !usable.contains(&plain) {
            usable.push(plain);
        }
    }
    Ok(usable)
}

/// The known name that `given` was probably meant to be.
pub(super) fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let limit = (given.chars().count() / 3).clamp(1, MAX_EDITS);
    let scored = known.into_iter().map(|name| (edits(given, name), name));
    scored
        .filter(|(edits, _)| *edits <= limit)
        .min()
        .map(|(_, name)| name.to_owned())
}

/// Insertions, deletions, replacements and swaps of neighbours between two names (optimal string
/// alignment).
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > MAX_EDITS || a.len() > MAX_LOGIN_BYTES {
        return usize::MAX;
    }
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut fewest = replaced.min(row[j - 1] + 1).min(rows[i - 1][j] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                fewest = fewest.min(rows[i - 2][j - 2] + 1);
            }
            row.push(fewest);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_host_calls_itself_becomes_a_label() {
        for (given, label) in [
            ("Web01.example.com", "web01"),
            ("-_x_-", "x"),
            ("", "node"),
            ("...", "node"),
            ("büro", "b-ro"),
            ("a b\n;rm", "a-b--rm"),
        ] {
            assert_eq!(hostname(given), label, "{given}");
        }
        assert_eq!(hostname(&"x".repeat(500)).len(), MAX_HOSTNAME_BYTES);
    }

    #[test]
    fn a_second_web_is_web_2_and_a_long_name_stays_a_label() {
        let taken = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        assert_eq!(unique("web", &taken(&[])), "web");
        assert_eq!(unique("web", &taken(&["web"])), "web-2");
        assert_eq!(unique("web", &taken(&["web", "web-2"])), "web-3");
        let long = "x".repeat(MAX_HOSTNAME_BYTES);
        let name = unique(&long, &taken(&[&long]));
        assert_eq!(
            (name.len(), name.ends_with("x-2")),
            (MAX_HOSTNAME_BYTES, true)
        );
    }

    #[test]
    fn prefixes_with_a_meaning_of_their_own_hold_no_nodes() {
        let v4_of = |text: &str| v4(text.parse().unwrap());
        let v6_of = |text: &str| v6(text.parse().unwrap());
        for good in [
            "100.64.0.0/10",
            "10.0.0.0/8",
            "192.168.7.0/24",
            "10.9.8.0/29",
        ] {
            assert!(v4_of(good).is_ok(), "{good}");
        }
        for bad in [
            "127.0.0.0/8",
            "0.0.0.0/0",
            "224.0.0.0/8",
            "10.0.0.0/30",
            "fd00::/48",
        ] {
            assert!(v4_of(bad).is_err(), "{bad}");
        }
        assert!(v6_of("fd00:1::/48").is_ok() && v6(random_v6()).is_ok());
        for bad in ["fe80::/64", "ff02::/64", "::/0", "fd00::/127", "10.0.0.0/8"] {
            assert!(v6_of(bad).is_err(), "{bad}");
        }
        let small = ["10.9.8.0/29".parse().unwrap(), "fd00::/64".parse().unwrap()];
        assert_eq!(last_host(small[0], small[1]), 6);
    }

    #[test]
    fn names_are_checked_and_slips_are_recognised() {
        assert!(name(NameKind::Network, "home-2").is_ok());
        for bad in ["", "-a", "a-", "A", "a.b", "a b"] {
            assert!(name(NameKind::Network, bad).is_err(), "{bad}");
        }
        assert_eq!(login("Ana@Example.com").unwrap(), "ana@example.com");
        for bad in ["ana", "@x", "a@", "a@b@c", "a b@c"] {
            assert!(login(bad).is_err(), "{bad}");
        }
        for bad in ["web", "tag:", "tag:1", "tag:A", "tag:a b"] {
            assert!(
                owner_tags(BTreeSet::from([bad.to_owned()])).is_err(),
                "{bad}"
            );
        }
        assert_eq!(nearest("hoem", ["home", "work"]).as_deref(), Some("home"));
        assert_eq!(nearest("hom", ["home", "work"]).as_deref(), Some("home"));
        assert_eq!(nearest("xyz", ["home"]), None);
    }
}
