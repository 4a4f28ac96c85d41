//! What `serve` is told: flags over a TOML file over defaults, parsed once into checked types.

mod relays;

pub use relays::{Relays, RelaysError};

use serde::Deserialize;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Where the node API listens if nothing else is said.
pub const DEFAULT_LISTEN: &str = "0.0.0.0:8443";
/// How long an ephemeral node may be offline before it is removed.
pub const DEFAULT_EPHEMERAL_OFFLINE: Duration = Duration::from_secs(5 * 60);
/// Shortest such time: less would remove nodes that only reconnect.
const MIN_EPHEMERAL_OFFLINE: Duration = Duration::from_secs(1);

/// All that the coordinator is told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Holds the certificate, the admin socket and, by default, the database.
    pub state_dir: PathBuf,
    /// Where the node API listens.
    pub listen: SocketAddr,
    /// What join tokens call this coordinator; `None`: the listen address, if that is concrete.
    pub advertise: Option<Advertise>,
    /// The database; SQLite in the state folder by default.
    pub database: Option<String>,
    /// Certificate and key to show instead of the own one.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// How long an ephemeral node may be offline before it is removed.
    pub ephemeral_offline: Duration,
    /// The relays that nodes are told of.
    pub relays: Relays,
}

/// `HOST:PORT` at which nodes find the coordinator; never a wildcard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertise(String);

/// Flags of `serve`; each wins over the file.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--listen`.
    pub listen: Option<SocketAddr>,
    /// `--advertise`.
    pub advertise: Option<Advertise>,
    /// `--database`.
    pub database: Option<String>,
    /// `--config`.
    pub file: Option<PathBuf>,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not what it should be; the source says where.
    #[error("the configuration {path} is not right")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Why, with line and column.
        source: Box<toml::de::Error>,
    },
    /// See [`MIN_EPHEMERAL_OFFLINE`].
    #[error("`ephemeral-offline` must be at least 1s")]
    EphemeralOffline,
    /// The relay map is wrong.
    #[error("[relays]: {0}")]
    Relays(#[from] RelaysError),
}

/// Why a text is not an [`Advertise`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdvertiseError {
    /// No `HOST:PORT`.
    #[error("write HOST:PORT, with an IPv6 address in brackets")]
    Form,
    /// A wildcard address, or port 0.
    #[error("nodes cannot connect to a wildcard address or port 0: name a real one")]
    Wildcard,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    listen: Option<SocketAddr>,
    advertise: Option<Advertise>,
    database: Option<String>,
    ephemeral_offline: Option<Text<Duration>>,
    tls: Option<Tls>,
    relays: Option<relays::Section>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tls {
    certificate: PathBuf,
    key: PathBuf,
}

/// A duration written as people do: `90s`, `5m`, `1h 30m`.
struct Text<T>(T);

impl<'de> Deserialize<'de> for Text<Duration> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

impl Config {
    /// Flags over file over defaults.
    ///
    /// # Errors
    /// If the file cannot be read or understood.
    pub fn load(state_dir: PathBuf, flags: Flags) -> Result<Self, ConfigError> {
        let file = flags
            .file
            .as_deref()
            .map(read)
            .transpose()?
            .unwrap_or_default();
        let offline = file
            .ephemeral_offline
            .map_or(DEFAULT_EPHEMERAL_OFFLINE, |text| text.0);
        if offline < MIN_EPHEMERAL_OFFLINE {
            return Err(ConfigError::EphemeralOffline);
        }
        let default = || SocketAddr::from(([0, 0, 0, 0], 8443));
        Ok(Self {
            state_dir,
            listen: flags.listen.or(file.listen).unwrap_or_else(default),
            advertise: flags.advertise.or(file.advertise),
            database: flags.database.or(file.database),
            certificate: file.tls.map(|tls| (tls.certificate, tls.key)),
            ephemeral_offline: offline,
            relays: file.relays.unwrap_or_default().try_into()?,
        })
    }
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| ConfigError::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

impl Advertise {
    /// The address itself, if it is one that nodes can connect to.
    #[must_use]
    pub fn of(addr: SocketAddr) -> Option<Self> {
        addr.to_string().parse().ok()
    }

    /// `HOST:PORT`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Advertise {
    type Err = AdvertiseError;

    fn from_str(text: &str) -> Result<Self, AdvertiseError> {
        let (host, port) = text.rsplit_once(':').ok_or(AdvertiseError::Form)?;
        let port: u16 = port.parse().map_err(|_| AdvertiseError::Form)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let addr = match bare {
            Some(v6) => Some(
                v6.parse::<std::net::Ipv6Addr>()
                    .map_err(|_| AdvertiseError::Form)?,
            ),
            None => None,
        };
        let wildcard = match addr {
            Some(v6) => v6.is_unspecified(),
            None => host
                .parse::<std::net::Ipv4Addr>()
                .is_ok_and(|v4| v4.is_unspecified()),
        };
        let name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
        let plain = !host.is_empty() && host.len() <= 253 && host.bytes().all(name);
        if addr.is_none() && !plain {
            return Err(AdvertiseError::Form);
        }
        if wildcard || port == 0 {
            return Err(AdvertiseError::Wildcard);
        }
        Ok(Self(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Advertise {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_can_connect_to_what_is_advertised() {
        for good in [
            "192.0.2.1:8443",
            "[2001:db8::1]:443",
            "weir.example.com:8443",
        ] {
            assert_eq!(good.parse::<Advertise>().unwrap().as_str(), good);
        }
        for (bad, why) in [
            ("0.0.0.0:8443", AdvertiseError::Wildcard),
            ("[::]:8443", AdvertiseError::Wildcard),
            ("192.0.2.1:0", AdvertiseError::Wildcard),
            ("2001:db8::1:443", AdvertiseError::Form),
            ("weir", AdvertiseError::Form),
            (":8443", AdvertiseError::Form),
            ("a b:1", AdvertiseError::Form),
        ] {
            assert_eq!(bad.parse::<Advertise>(), Err(why), "{bad}");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_words_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.toml");
        fs::write(&path, "listen = '192.0.2.1:1'\nephemeral-offline = '90s'\n").unwrap();
        let flags = |listen| Flags {
            listen,
            file: Some(path.clone()),
            ..Flags::default()
        };
        let config = Config::load("/s".into(), flags(None)).unwrap();
        assert_eq!(config.listen.to_string(), "192.0.2.1:1");
        assert_eq!(config.ephemeral_offline, Duration::from_secs(90));
        let flag = Some("192.0.2.2:2".parse().unwrap());
        let config = Config::load("/s".into(), flags(flag)).unwrap();
        assert_eq!(config.listen.to_string(), "192.0.2.2:2");

        assert_eq!(config.relays, Relays::default());
        let stun = "[relays]\nstun = ['stun.example.com:3478', '[2001:db8::1]:3478']\n";
        fs::write(&path, stun).unwrap();
        let config = Config::load("/s".into(), flags(None)).unwrap();
        assert_eq!(
            config.relays.stun,
            ["stun.example.com:3478", "[2001:db8::1]:3478"]
        );
        for bad in ["['stun.example.com']", "['0.0.0.0:3478']"] {
            fs::write(&path, format!("[relays]\nstun = {bad}\n")).unwrap();
            assert!(Config::load("/s".into(), flags(None)).is_err(), "{bad}");
        }

        fs::write(&path, "lisen = '192.0.2.1:1'\n").unwrap();
        let error = Config::load("/s".into(), flags(None)).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("lisen"), "{source}");
    }
}
