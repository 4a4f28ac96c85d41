//! Whom a proxy is not for: the rules of `NO_PROXY`, which no standard has. These are the ones that
//! most programs agree on.

use proto::net::Prefix;
use std::net::IpAddr;

/// Hosts that are reached directly.
///
/// | entry | means |
/// |---|---|
/// | `*` | everybody |
/// | `example.com` | that host, and all below |
/// | `.example.com`, `*.example.com` | all below |
/// | `192.0.2.7`, `10.0.0.0/8`, `fd00::/8` | these, where an address is written, not where a name leads to one |
/// | any but `*` and prefixes, and `:443` | that port alone |
///
/// This machine is always one of them: `localhost`, all below, 127.0.0.0/8 and `::1`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exempt(Vec<Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    hosts: Hosts,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Hosts {
    All,
    /// A host, and all below.
    From(String),
    /// All below one.
    Below(String),
    In(Prefix),
}

impl Exempt {
    /// Reads a list whose entries stand between commas or spaces. What cannot be read is left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let words = text.split(|it: char| it == ',' || it.is_whitespace());
        let entry = |word: &str| {
            let entry = Entry::parse(&word.to_ascii_lowercase());
            if entry.is_none() {
                tracing::warn!(word, "NO_PROXY: an entry cannot be read, and is left out");
            }
            entry
        };
        Self(
            words
                .filter(|it| !it.is_empty())
                .filter_map(entry)
                .collect(),
        )
    }

    /// Whether `HOST:PORT` is one of them.
    #[must_use]
    pub fn has(&self, target: &str) -> bool {
        let target = target.to_ascii_lowercase();
        let (host, port) = with_port(&target);
        let host = host.trim_end_matches('.');
        let addr = literal(host);
        is_this_machine(host, addr) || self.0.iter().any(|entry| entry.has(host, addr, port))
    }
}

impl Entry {
    fn parse(word: &str) -> Option<Self> {
        if word == "*" {
            let (hosts, port) = (Hosts::All, None);
            return Some(Self { hosts, port });
        }
        if let Some((addr, len)) = word.split_once('/') {
            let prefix = Prefix::containing(literal(addr)?, len.parse().ok()?).ok()?;
            let (hosts, port) = (Hosts::In(prefix), None);
            return Some(Self { hosts, port });
        }
        // An IPv6 address may stand without brackets, and has no port then.
        let (host, port) = match literal(word) {
            Some(_) => (word, None),
            None => with_port(word),
        };
        let below = host.strip_prefix("*.").or_else(|| host.strip_prefix('.'));
        let name = below.unwrap_or(host).trim_end_matches('.');
        if name.is_empty() || name.contains(['*', ':']) && literal(name).is_none() {
            return None;
        }
        let hosts = match (below, literal(name)) {
            (None, Some(addr)) => Hosts::In(Prefix::host(addr)),
            (None, None) => Hosts::From(name.to_owned()),
            (Some(_), _) => Hosts::Below(name.to_owned()),
        };
        Some(Self { hosts, port })
    }

    fn has(&self, host: &str, addr: Option<IpAddr>, port: Option<u16>) -> bool {
        let below = |name: &str| {
            let rest = host.strip_suffix(name);
            rest.is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        };
        let hosts = match &self.hosts {
            Hosts::All => true,
            Hosts::From(name) => host == name || below(name),
            Hosts::Below(name) => below(name),
            Hosts::In(prefix) => addr.is_some_and(|addr| prefix.contains(addr)),
        };
        hosts && self.port.is_none_or(|only| port == Some(only))
    }
}

fn is_this_machine(host: &str, addr: Option<IpAddr>) -> bool {
    match addr {
        Some(addr) => addr.is_loopback(),
        None => host == "localhost" || host.ends_with(".localhost"),
    }
}

/// Host and port, if there is one.
fn with_port(text: &str) -> (&str, Option<u16>) {
    let split = text.rsplit_once(':');
    let split = split.and_then(|(host, port)| Some((host, port.parse().ok()?)));
    split.map_or((text, None), |(host, port)| (host, Some(port)))
}

/// An address, with brackets or without.
fn literal(host: &str) -> Option<IpAddr> {
    let inner = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    let addr: IpAddr = inner.unwrap_or(host).parse().ok()?;
    Some(addr.to_canonical())
}
