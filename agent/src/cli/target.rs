//! `DST[:PORT]` and protocol names.

use super::Failure;
use super::arguments::Explain;
use proto::net::Protocol;
use proto::policy::Protocols;
use std::net::{IpAddr, Ipv6Addr};

/// A destination and perhaps a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// An address without brackets, or a name.
    pub host: String,
    /// The port, if one was given.
    pub port: Option<u16>,
}

/// Reads `DST`, `DST:PORT` or `[V6]:PORT`.
pub(super) fn parse(text: &str) -> Result<Port, String> {
    let bare = |host: &str| Port {
        host: host.to_owned(),
        port: None,
    };
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest
            .split_once(']')
            .ok_or("the bracket is not closed: write [ADDRESS]:PORT")?;
        host.parse::<Ipv6Addr>()
            .map_err(|_| "only an IPv6 address stands in brackets")?;
        match rest.strip_prefix(':') {
            None if rest.is_empty() => return Ok(bare(host)),
            None => return Err("write [ADDRESS]:PORT".to_owned()),
            Some(port) => (host, port),
        }
    } else if text.parse::<Ipv6Addr>().is_ok() {
        return Ok(bare(text));
    } else {
        match text.split_once(':') {
            None => (text, ""),
            Some((_, port)) if port.contains(':') => {
                return Err(
                    "an IPv6 address with a port stands in brackets: [ADDRESS]:PORT".into(),
                );
            }
            Some((_, "")) => return Err("there is no port after the colon".to_owned()),
            Some((host, port)) => (host, port),
        }
    };
    if host.is_empty() {
        return Err("a destination is an address or a node's name".to_owned());
    }
    if port.is_empty() {
        return Ok(bare(host));
    }
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse() {
        Ok(port) if digits => Ok(Port {
            host: host.to_owned(),
            port: Some(port),
        }),
        _ => Err(format!("`{port}` is not a port: 0 to 65535")),
    }
}

/// The protocol that is meant: the one that is named, else TCP to a port and ICMP to none.
pub(super) fn choose(explain: &Explain) -> Result<Protocol, Failure> {
    match (explain.proto, explain.dst.port) {
        (Some(protocol), None) if protocol.has_ports() => Err(Failure::Use(format!(
            "{protocol} needs a port: write `weir explain {} {}:PORT`",
            explain.src, explain.dst.host
        ))),
        (Some(protocol), Some(_)) if !protocol.has_ports() => Err(Failure::Use(format!(
            "protocol {protocol} has no ports: leave out the port, or name another protocol \
             with --proto"
        ))),
        (Some(protocol), _) => Ok(protocol),
        (None, Some(_)) => Ok(Protocol::TCP),
        (None, None) => Ok(Protocol::ICMP),
    }
}

/// ICMP is another protocol in IPv6: people say `icmp` and mean the one of that destination.
pub(super) fn first_packet(protocol: Protocol, dst: IpAddr) -> Protocol {
    if protocol == Protocol::ICMP && dst.is_ipv6() {
        Protocol::ICMPV6
    } else {
        protocol
    }
}

/// Reads a protocol by a name that policies use, or by number.
pub(super) fn parse_protocol(text: &str) -> Result<Protocol, String> {
    if let Some(protocol) = Protocols::named(&text.to_ascii_lowercase()) {
        return Ok(protocol);
    }
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(number) if digits => Ok(Protocol(number)),
        _ => Err("a protocol is tcp, udp, icmp, sctp or a number from 0 to 255".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_with_and_without_a_port() {
        for (text, host, port) in [
            ("10.0.0.1", "10.0.0.1", None),
            ("10.0.0.1:80", "10.0.0.1", Some(80)),
            ("fd00::1", "fd00::1", None),
            ("[fd00::1]", "fd00::1", None),
            ("[fd00::1]:443", "fd00::1", Some(443)),
            ("web-1", "web-1", None),
            ("web-1:65535", "web-1", Some(65535)),
            // Reads as an address, as it does everywhere else.
            ("fd00::1:80", "fd00::1:80", None),
        ] {
            let want = Port {
                host: host.to_owned(),
                port,
            };
            assert_eq!(parse(text), Ok(want), "{text}");
        }
        for bad in [
            "",
            ":80",
            "a:",
            "a:b",
            "a:65536",
            "a:+1",
            "[fd00::1",
            "[fd00::1]80",
            "[web]:80",
            "fd00::zz:80",
            "[]:80",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn protocols_by_name_and_number() {
        assert_eq!(parse_protocol("TCP"), Ok(Protocol::TCP));
        assert_eq!(parse_protocol("icmpv6"), Ok(Protocol::ICMPV6));
        assert_eq!(parse_protocol("255"), Ok(Protocol(255)));
        for bad in ["", "256", "+6", "tcpp"] {
            assert!(parse_protocol(bad).is_err(), "{bad}");
        }
    }
}
