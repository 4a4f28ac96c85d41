//! The relays that nodes are told of: checked once, when the configuration is read.

use super::Advertise;
use proto::id::RegionId;
use proto::key::Fingerprint;
use proto::netmap::{
    MAX_HOSTS_PER_REGION, MAX_REGION_NAME_BYTES, MAX_REGIONS, MAX_STUN_SERVERS, Region, RelayHost,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::num::NonZeroU16;

/// What nodes are told of relays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relays {
    /// STUN servers that are no relays.
    pub stun: Vec<String>,
    /// The relay map.
    pub regions: BTreeMap<RegionId, Region>,
}

/// Why a relay map cannot be handed out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelaysError {
    /// See [`MAX_STUN_SERVERS`].
    #[error("`stun` names at most {MAX_STUN_SERVERS} servers")]
    StunServers,
    /// See [`MAX_REGIONS`].
    #[error("there are at most {MAX_REGIONS} regions")]
    Regions,
    /// One number, twice.
    #[error("region {0} is named twice; give all its hosts in one section")]
    Twice(RegionId),
    /// Nobody could read its name.
    #[error(
        "region {0} needs a `name` of 1 to {MAX_REGION_NAME_BYTES} bytes, without control \
         characters"
    )]
    Name(RegionId),
    /// See [`MAX_HOSTS_PER_REGION`].
    #[error("region {0} needs `hosts`, 1 to {MAX_HOSTS_PER_REGION} of them")]
    Hosts(RegionId),
    /// What is plain shows no certificate.
    #[error("in region {0}, {1} is `plain` and so shows no `certificate`: say one of the two")]
    PlainCertificate(RegionId, String),
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Section {
    #[serde(default)]
    stun: Vec<Advertise>,
    #[serde(default)]
    region: Vec<RegionSection>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RegionSection {
    id: RegionId,
    name: String,
    hosts: Vec<HostEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostEntry {
    addr: Advertise,
    stun: Option<NonZeroU16>,
    #[serde(default)]
    plain: bool,
    certificate: Option<Fingerprint>,
}

impl TryFrom<Section> for Relays {
    type Error = RelaysError;

    fn try_from(section: Section) -> Result<Self, RelaysError> {
        if section.stun.len() > MAX_STUN_SERVERS {
            return Err(RelaysError::StunServers);
        }
        if section.region.len() > MAX_REGIONS {
            return Err(RelaysError::Regions);
        }
        let mut regions = BTreeMap::new();
        for named in section.region {
            let id = named.id;
            if regions.insert(id, region(named)?).is_some() {
                return Err(RelaysError::Twice(id));
            }
        }
        let stun = section.stun.into_iter().map(|server| server.0).collect();
        Ok(Self { stun, regions })
    }
}

fn region(RegionSection { id, name, hosts }: RegionSection) -> Result<Region, RelaysError> {
    let name_fits = (1..=MAX_REGION_NAME_BYTES).contains(&name.len());
    if !name_fits || name.chars().any(char::is_control) {
        return Err(RelaysError::Name(id));
    }
    if !(1..=MAX_HOSTS_PER_REGION).contains(&hosts.len()) {
        return Err(RelaysError::Hosts(id));
    }
    let host = |entry: HostEntry| {
        let addr = entry.addr.0;
        if entry.plain && entry.certificate.is_some() {
            return Err(RelaysError::PlainCertificate(id, addr));
        }
        Ok(RelayHost {
            addr,
            stun: entry.stun.map(NonZeroU16::get),
            plain: entry.plain,
            certificate: entry.certificate,
        })
    };
    let hosts = hosts.into_iter().map(host).collect::<Result<_, _>>()?;
    Ok(Region { name, hosts })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Relays, String> {
        let section: Section = toml::from_str(text).map_err(|error| error.to_string())?;
        Relays::try_from(section).map_err(|error| error.to_string())
    }

    #[test]
    fn a_relay_map_is_read_as_it_is_written() {
        let pin = format!("sha256:{}", "ab".repeat(32));
        let relays = read(&format!(
            "stun = ['stun.example.com:3478']
             [[region]]
             id = 7
             name = 'Frankfurt'
             hosts = [
                 {{ addr = 'relay.example.com:443', stun = 3478 }},
                 {{ addr = '[2001:db8::1]:443', certificate = '{pin}' }},
                 {{ addr = '192.0.2.1:80', plain = true }},
             ]"
        ))
        .unwrap();
        assert_eq!(relays.stun, ["stun.example.com:3478"]);
        let region = &relays.regions[&RegionId(7)];
        assert_eq!(region.name, "Frankfurt");
        let host = |addr: &str| RelayHost {
            addr: addr.to_owned(),
            stun: None,
            plain: false,
            certificate: None,
        };
        let expected = [
            RelayHost {
                stun: Some(3478),
                ..host("relay.example.com:443")
            },
            RelayHost {
                certificate: Some(Fingerprint([0xab; 32])),
                ..host("[2001:db8::1]:443")
            },
            RelayHost {
                plain: true,
                ..host("192.0.2.1:80")
            },
        ];
        assert_eq!(region.hosts, expected);
        assert_eq!(read("").unwrap(), Relays::default());
    }

    #[test]
    fn what_no_node_could_use_is_refused_with_what_to_do() {
        let host = "{ addr = '192.0.2.1:443' }";
        let pin = format!("certificate = 'sha256:{}'", "ab".repeat(32));
        let region = |id: u32, name: &str, hosts: &str| {
            format!("[[region]]\nid = {id}\nname = '{name}'\nhosts = [{hosts}]\n")
        };
        let many = |count: u32| {
            (0..count)
                .map(|id| region(id, "x", host))
                .collect::<String>()
        };
        for (text, why) in [
            (region(1, "", host), "needs a `name`"),
            (region(1, &"x".repeat(64), host), "needs a `name`"),
            (region(1, "x", ""), "needs `hosts`"),
            (region(1, "x", &[host; 9].join(",")), "needs `hosts`"),
            (region(1, "x", host).repeat(2), "twice"),
            (many(65), "at most 64"),
            (region(65_536, "x", host), "u16"),
            (region(1, "x", "{ addr = '0.0.0.0:443' }"), "wildcard"),
            (
                region(1, "x", "{ addr = '192.0.2.1:443', stun = 0 }"),
                "nonzero",
            ),
            (
                region(1, "x", &format!("{{ addr = 'a:1', plain = true, {pin} }}")),
                "is `plain`",
            ),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert_eq!(read(&many(64)).unwrap().regions.len(), 64);
    }
}
