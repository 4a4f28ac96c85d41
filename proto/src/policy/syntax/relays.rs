//! `derpMap`: the policy's own relays, beside those of the coordinator's configuration or in their
//! place.
//!
//! Regions have the form that users of other control planes know. What is known of it and changes
//! nothing here (codes, coordinates, addresses beside a host name) is passed over; what would be
//! less safe than it looks is a fault.

use super::{Reader, kind, span};
use crate::id::RegionId;
use crate::key::Fingerprint;
use crate::netmap::{
    MAX_HOSTS_PER_REGION, MAX_REGION_NAME_BYTES, MAX_REGIONS, MAX_STUN_SERVERS, Region, RelayHost,
};
use crate::policy::diagnostic::Code;
use crate::policy::document::RelayChange;
use jsonc_parser::ast;
use jsonc_parser::common::Ranged;
use std::collections::BTreeMap;

/// The port of a relay that names none.
const DERP_PORT: u16 = 443;
/// The port of STUN that names none.
const STUN_PORT: u16 = 3478;
/// A certificate that is taken whoever vouches for it, by the SHA-256 of its DER form.
const PIN: &str = "sha256-raw:";

pub(super) fn derp_map(reader: &mut Reader<'_>, value: &ast::Value<'_>) -> RelayChange {
    const FIELDS: &[&str] = &["OmitDefaultRegions", "Regions", "HomeParams"];
    let mut change = RelayChange::default();
    let Some(fields) = reader.fields(value, "`derpMap`", FIELDS) else {
        return change;
    };
    if let Some(value) = fields.get("OmitDefaultRegions") {
        change.replaces = reader.boolean(value, "`OmitDefaultRegions`");
    }
    let Some(regions) = fields.get("Regions") else {
        return change;
    };
    for (name, value) in reader.entries(regions, "`Regions`") {
        let Ok(id) = name.value.parse().map(RegionId) else {
            let message = format!("`{}` is no region's number", name.value);
            let hint = "write a number from 0 to 65535, in quotes";
            reader.fault(name.span, Code::BadValue, message, hint);
            continue;
        };
        let read = match value {
            ast::Value::NullKeyword(_) => None,
            value => region(reader, value, id, &mut change.stun),
        };
        change.regions.insert(id, read);
    }
    let place = span(regions.range());
    if change.regions.len() > MAX_REGIONS || change.stun.len() > MAX_STUN_SERVERS {
        let message = format!(
            "`derpMap` has at most {MAX_REGIONS} regions and {MAX_STUN_SERVERS} nodes that are \
             `STUNOnly`"
        );
        reader.fault(place, Code::BadValue, message, "");
    }
    change
}

fn region(
    reader: &mut Reader<'_>,
    value: &ast::Value<'_>,
    id: RegionId,
    stun: &mut Vec<String>,
) -> Option<Region> {
    const FIELDS: &[&str] = &[
        "RegionID",
        "RegionCode",
        "RegionName",
        "Latitude",
        "Longitude",
        "Avoid",
        "NoMeasureNoHome",
        "Nodes",
    ];
    let fields = reader.fields(value, "a region", FIELDS)?;
    if let Some(value) = fields.get("RegionID")
        && number(reader, value, "`RegionID`", 0..=65_535)? != i64::from(id.0)
    {
        let message = format!("this is region {id}, and its `RegionID` is another");
        let place = span(value.range());
        reader.fault(place, Code::BadValue, message, "make them the same");
    }
    let mut name = format!("region {id}");
    for field in ["RegionCode", "RegionName"] {
        if let Some(value) = fields.get(field) {
            name = reader.string(value, &format!("`{field}`"))?.value;
        }
    }
    if !(1..=MAX_REGION_NAME_BYTES).contains(&name.len()) || name.contains(char::is_control) {
        let message = format!("a region's name has 1 to {MAX_REGION_NAME_BYTES} plain bytes");
        reader.fault(fields.span, Code::BadValue, message, "");
    }
    let nodes = fields
        .get("Nodes")
        .map_or(&[][..], |value| reader.items(value, "`Nodes`"));
    let mut hosts = Vec::new();
    for value in nodes {
        match node(reader, value)? {
            Node::Relay(host) => hosts.push(host),
            Node::Stun(server) => stun.push(server),
        }
    }
    if hosts.len() > MAX_HOSTS_PER_REGION {
        let message = format!("a region has at most {MAX_HOSTS_PER_REGION} nodes");
        reader.fault(fields.span, Code::BadValue, message, "");
    }
    // A region where nobody relays is only a place to ask for one's address.
    (!hosts.is_empty()).then_some(Region { name, hosts })
}

enum Node {
    Relay(RelayHost),
    Stun(String),
}

fn node(reader: &mut Reader<'_>, value: &ast::Value<'_>) -> Option<Node> {
    const FIELDS: &[&str] = &[
        "Name",
        "RegionID",
        "HostName",
        "CertName",
        "IPv4",
        "IPv6",
        "STUNPort",
        "STUNOnly",
        "DERPPort",
        "InsecureForTests",
        "STUNTestIP",
        "CanPort80",
    ];
    let fields = reader.fields(value, "a relay", FIELDS)?;
    let Some(host) = fields.get("HostName") else {
        reader.missing(&fields, "a relay", "HostName", "\"HostName\": \"HOST\"");
        return None;
    };
    let host = reader.string(host, "`HostName`")?;
    let Some(name) = host_name(&host.value) else {
        let message = format!("`{}` is neither a host's name nor its address", host.value);
        reader.fault(
            host.span,
            Code::BadValue,
            message,
            "write it without a port",
        );
        return None;
    };
    let port = |reader: &mut Reader<'_>, field: &str, least, usual| match fields.get(field) {
        None => Some(i64::from(usual)),
        Some(value) => match number(reader, value, &format!("`{field}`"), least..=65_535)? {
            0 => Some(i64::from(usual)),
            port => Some(port),
        },
    };
    let derp = port(reader, "DERPPort", 0, DERP_PORT)?;
    // -1: it answers no STUN.
    let stun = u16::try_from(port(reader, "STUNPort", -1, STUN_PORT)?).ok();
    let mut flag = |field: &str| {
        let value = fields.get(field)?;
        Some((reader.boolean(value, &format!("`{field}`")), value))
    };
    let stun_only = matches!(flag("STUNOnly"), Some((true, _)));
    if let Some((true, value)) = flag("InsecureForTests") {
        let message = "a relay's certificate is always checked";
        let hint = "pin it: `\"CertName\": \"sha256-raw:…\"`";
        reader.fault(span(value.range()), Code::BadValue, message, hint);
    }
    let certificate = match fields.get("CertName") {
        Some(value) => Some(pin(reader, value)?),
        None => None,
    };
    if stun_only {
        return stun.map(|port| Node::Stun(format!("{name}:{port}")));
    }
    Some(Node::Relay(RelayHost {
        addr: format!("{name}:{derp}"),
        stun,
        plain: false,
        certificate,
    }))
}

/// A host as it stands before a port.
fn host_name(text: &str) -> Option<String> {
    if let Ok(v6) = text.parse::<std::net::Ipv6Addr>() {
        return Some(format!("[{v6}]"));
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let fits = (1..=253).contains(&text.len()) && text.bytes().all(plain);
    fits.then(|| text.to_owned())
}

fn pin(reader: &mut Reader<'_>, value: &ast::Value<'_>) -> Option<Fingerprint> {
    let text = reader.string(value, "`CertName`")?;
    let hex = text.value.strip_prefix(PIN);
    let pinned = hex.and_then(|hex| format!("sha256:{hex}").parse().ok());
    if pinned.is_none() {
        let message = "`CertName` is only taken as the hash of a certificate";
        let hint = "write `sha256-raw:` and 64 hexadecimal digits, or leave it out";
        reader.fault(text.span, Code::BadValue, message, hint);
    }
    pinned
}

fn number(
    reader: &mut Reader<'_>,
    value: &ast::Value<'_>,
    what: &str,
    fits: std::ops::RangeInclusive<i64>,
) -> Option<i64> {
    let number = match value {
        ast::Value::NumberLit(number) => number.value.parse().ok(),
        _ => None,
    };
    let number = number.filter(|number| fits.contains(number));
    if number.is_none() {
        let (least, most) = (fits.start(), fits.end());
        let message = format!(
            "{what} must be a number from {least} to {most}, and this is {}",
            kind(value)
        );
        reader.fault(span(value.range()), Code::BadValue, message, "");
    }
    number
}

impl RelayChange {
    /// The relays of a network that without this policy has `regions` and `stun`. Where the two
    /// together are more than a netmap may hold, the policy's stay.
    pub fn apply(&self, regions: &mut BTreeMap<RegionId, Region>, stun: &mut Vec<String>) {
        if self.replaces {
            regions.clear();
            stun.clear();
        }
        for (id, region) in &self.regions {
            match region {
                Some(region) => regions.insert(*id, region.clone()),
                None => regions.remove(id),
            };
        }
        while regions.len() > MAX_REGIONS {
            let other = regions
                .keys()
                .rev()
                .find(|id| !self.regions.contains_key(id));
            let Some(other) = other.copied() else { break };
            regions.remove(&other);
        }
        let more = self.stun.iter().filter(|server| !stun.contains(server));
        let more: Vec<String> = more.cloned().collect();
        stun.splice(0..0, more);
        stun.truncate(MAX_STUN_SERVERS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(map: &str) -> Result<RelayChange, String> {
        let text = format!(r#"{{"acls": [], "derpMap": {map}}}"#);
        match crate::policy::parse(&text) {
            Ok(policy) => Ok(policy.relays),
            Err(faults) => Err(faults.render("policy")),
        }
    }

    fn named(ids: &[u16]) -> BTreeMap<RegionId, Region> {
        let region = |id: &u16| {
            let hosts = Vec::new();
            let name = format!("configured {id}");
            (RegionId(*id), Region { name, hosts })
        };
        ids.iter().map(region).collect()
    }

    #[test]
    fn relays_are_added_replaced_and_taken_away() {
        let pin = "ab".repeat(32);
        let change = parse(&format!(
            r#"{{"Regions": {{
                "1": null,
                "900": {{"RegionID": 900, "RegionCode": "fra", "RegionName": "Frankfurt", "Nodes": [
                    {{"Name": "a", "RegionID": 900, "HostName": "fra.example.com", "CanPort80": true}},
                    {{"HostName": "2001:db8::1", "DERPPort": 8443, "STUNPort": -1,
                      "CertName": "sha256-raw:{pin}"}},
                    {{"HostName": "stun.example.com", "STUNOnly": true}},
                ]}},
                "901": {{"Nodes": [{{"HostName": "192.0.2.7", "STUNOnly": true, "STUNPort": 7}}]}},
            }}}}"#
        ))
        .unwrap();
        let (mut regions, mut stun) = (named(&[1, 2]), vec!["configured:1".to_owned()]);
        change.apply(&mut regions, &mut stun);
        let ids: Vec<u16> = regions.keys().map(|id| id.0).collect();
        assert_eq!(ids, [2, 900]);
        assert_eq!(
            stun,
            ["stun.example.com:3478", "192.0.2.7:7", "configured:1"]
        );
        let region = &regions[&RegionId(900)];
        assert_eq!(region.name, "Frankfurt");
        let host = |addr: &str, stun, certificate| RelayHost {
            addr: addr.to_owned(),
            stun,
            plain: false,
            certificate,
        };
        let pinned = Some(Fingerprint([0xab; 32]));
        let expected = [
            host("fra.example.com:443", Some(3478), None),
            host("[2001:db8::1]:8443", None, pinned),
        ];
        assert_eq!(region.hosts, expected);

        let change = parse(r#"{"OmitDefaultRegions": true}"#).unwrap();
        change.apply(&mut regions, &mut stun);
        assert!(regions.is_empty() && stun.is_empty());
        assert_eq!(parse("{}").unwrap(), RelayChange::default());
    }

    #[test]
    fn what_cannot_be_used_is_a_fault_at_its_place() {
        let node = |node: &str| format!(r#"{{"Regions": {{"1": {{"Nodes": [{node}]}}}}}}"#);
        let many: String = (0..65).map(|id| format!(r#""{id}": null,"#)).collect();
        for (map, why) in [
            ("[]".to_owned(), "an object"),
            (r#"{"Region": {}}"#.to_owned(), "write `Regions`"),
            (
                r#"{"Regions": {"x": null}}"#.to_owned(),
                "is no region's number",
            ),
            (
                r#"{"Regions": {"1": {"RegionID": 2}}}"#.to_owned(),
                "make them the same",
            ),
            (node("{}"), "has no `HostName`"),
            (node(r#"{"HostName": "a:1"}"#), "without a port"),
            (
                node(r#"{"HostName": "a", "DERPPort": 65536}"#),
                "from 0 to 65535",
            ),
            (
                node(r#"{"HostName": "a", "CertName": "b.example.com"}"#),
                "sha256-raw:",
            ),
            (
                node(r#"{"HostName": "a", "InsecureForTests": true}"#),
                "always checked",
            ),
            (node(&r#"{"HostName": "a"},"#.repeat(9)), "at most 8"),
            (format!(r#"{{"Regions": {{{many}}}}}"#), "at most 64"),
        ] {
            let faults = parse(&map).unwrap_err();
            assert!(faults.contains(why), "{map}: {faults}");
        }
    }

    #[test]
    fn more_than_a_netmap_holds_leaves_the_policys() {
        let hosts = r#"{"Nodes": [{"HostName": "a"}]}"#;
        let change = parse(&format!(r#"{{"Regions": {{"900": {hosts}}}}}"#)).unwrap();
        let all: Vec<u16> = (1..=64).collect();
        let (mut regions, mut stun) = (named(&all), vec![String::new(); 16]);
        change.apply(&mut regions, &mut stun);
        assert_eq!(regions.len(), MAX_REGIONS);
        assert!(regions.contains_key(&RegionId(900)) && !regions.contains_key(&RegionId(64)));
        assert_eq!(stun.len(), MAX_STUN_SERVERS);
    }
}
