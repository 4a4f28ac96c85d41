//! What `serve` is told: flags over a TOML file over defaults, parsed once into checked types.

use crate::admit::Admission;
use clap::{Args, Parser, Subcommand, ValueEnum};
use proto::id::NetworkId;
use proto::key::{Fingerprint, PermitKey, RelayKey};
use rustls::pki_types::DnsName;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// The authority that is asked for certificates if no other is named.
pub const DEFAULT_DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";
/// What a client may send in a second if nothing else is said: 400 Mbit/s.
pub const DEFAULT_RATE: u64 = 50_000_000;

/// weir's relay: carries sealed packets between nodes that have no direct path, and tells nodes
/// their own address (STUN).
#[derive(Debug, Parser)]
#[command(name = "weir-relay", version, propagate_version = true)]
pub struct Cli {
    /// Folder of the relay's state: its key and its certificate
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/var/lib/weir-relay"
    )]
    pub state_dir: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the relay
    Serve(Flags),
}

/// Flags of `serve`; each wins over the file.
#[derive(Clone, Debug, Default, Args)]
pub struct Flags {
    /// Where nodes connect to; [::] is IPv4 and IPv6 [default: [::]:443]
    #[arg(long, value_name = "ADDR:PORT", value_parser = addr)]
    pub listen: Option<SocketAddr>,
    /// Where STUN is answered, by UDP; [::] is IPv4 and IPv6 [default: [::]:3478]
    #[arg(long, value_name = "ADDR:PORT", value_parser = addr)]
    pub stun_listen: Option<SocketAddr>,
    /// Where /health and /metrics are shown, without TLS [default: 127.0.0.1:9180]
    #[arg(long, value_name = "ADDR:PORT", value_parser = addr)]
    pub status_listen: Option<SocketAddr>,
    /// The certificate: the relay's own, one that the configuration names, one that an authority
    /// gives by ACME, or none: plain HTTP [default: what the configuration has a section for, else
    /// own]
    #[arg(long, value_name = "WHICH")]
    pub tls: Option<Tls>,
    /// Who may use the relay: nodes with a permit of their coordinator, or, for tests, anybody
    /// [default: permit]
    #[arg(long, value_name = "WHO")]
    pub admit: Option<Admit>,
    /// A TOML file; flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Which certificate is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tls {
    /// The relay's own, made once.
    Own,
    /// The one in `[certificate]`.
    Given,
    /// One that the authority in `[acme]` gives.
    Acme,
    /// None: plain HTTP. What passes is sealed all the same; keys of who talks to whom are not.
    Off,
}

/// Who may use the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Admit {
    /// Nodes with a permit.
    Permit,
    /// Anybody.
    Open,
}

/// All that the relay is told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Holds the relay's key and its own certificate.
    pub state_dir: PathBuf,
    /// Where nodes connect to.
    pub listen: SocketAddr,
    /// Where STUN is answered.
    pub stun_listen: SocketAddr,
    /// Where health and metrics are shown.
    pub status_listen: SocketAddr,
    /// The certificate.
    pub certificate: Certificate,
    /// Who is let in.
    pub admission: Admission,
    /// What a client may send in a second, in bytes; 0: no limit.
    pub rate: u64,
    /// The relays of our region; this one may be among them.
    pub region: Vec<RegionRelay>,
}

/// A relay of our region.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionRelay {
    /// Name or address, and port.
    pub addr: String,
    /// Its key, as it prints it at its start.
    pub key: RelayKey,
    /// Its certificate; without it, one that the system's authorities vouch for.
    pub certificate: Option<Fingerprint>,
    /// It speaks no TLS.
    #[serde(default)]
    pub plain: bool,
}

/// Where the certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// The state folder.
    Own,
    /// These files.
    Given {
        /// The chain, in PEM.
        certificate: PathBuf,
        /// Its key, in PEM.
        key: PathBuf,
    },
    /// An authority, asked whenever one is needed.
    Acme(Acme),
    /// None: plain HTTP.
    Off,
}

/// An authority that gives certificates by ACME, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acme {
    /// The relay's names, in small letters; at least one.
    pub domains: Vec<String>,
    /// Whom the authority may tell about trouble, as URLs.
    pub contact: Vec<String>,
    /// Where the authority is asked.
    pub directory: String,
    /// Who vouches for that place, in PEM, if the system's authorities do not.
    pub directory_roots: Option<PathBuf>,
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
    /// `given` without files.
    #[error(
        "`--tls given` needs a [certificate] section with `chain` and `key` in the configuration"
    )]
    NoCertificate,
    /// `acme` without a section.
    #[error("`--tls acme` needs an [acme] section with `domains` in the configuration")]
    NoAcme,
    /// Two sections, and nothing says which is meant.
    #[error(
        "there is a [certificate] section and an [acme] section: take one away, or say with \
         `tls = \"given\"` or `tls = \"acme\"` which one is meant"
    )]
    TwoCertificates,
    /// A certificate for nothing.
    #[error("[acme] needs `domains`: the names under which nodes know this relay")]
    NoDomains,
    /// Only names are certified in this way (RFC 8737; wildcards need DNS, RFC 8555 7.1.3).
    #[error(
        "`{0}` in [acme] is no name that can be certified: give names as fra1.example.com, no \
         address, no wildcard and no port"
    )]
    Domain(String),
    /// The authority wants a URL.
    #[error("`{0}` in [acme] is no contact: write mailto:ops@example.com")]
    Contact(String),
    /// RFC 8555 6.1: "Use of HTTPS is REQUIRED".
    #[error("the directory `{0}` in [acme] is no https:// address")]
    Directory(String),
    /// Nobody agrees for somebody else.
    #[error(
        "the authority at {0} gives certificates to those who agree to its terms of service: read \
         them, and set `terms-of-service-agreed = true` in [acme]"
    )]
    Terms(String),
    /// Nobody could be admitted.
    #[error(
        "no network to serve: name each in a [[network]] section with its `id` and `keys` (or, for \
         tests alone, let anybody in with `--admit open`)"
    )]
    NoNetwork,
    /// A network without keys would admit nobody.
    #[error("network {0} has no keys, so nobody of it could be admitted")]
    NoKeys(NetworkId),
    /// One relay of the region, twice.
    #[error("the relay with the key {0} is named twice in the region")]
    SameRelay(RelayKey),
    /// No TLS has no certificate.
    #[error("the relay at {0} is `plain` and has a certificate: take away either")]
    PlainCertificate(String),
    /// Addresses have ports.
    #[error("the relay at `{0}` needs a port, as in fra2.example.com:443")]
    NoPort(String),
    /// One network, twice.
    #[error("network {0} is named twice; give all its keys in one section")]
    Twice(NetworkId),
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    listen: Option<SocketAddr>,
    stun_listen: Option<SocketAddr>,
    status_listen: Option<SocketAddr>,
    tls: Option<Tls>,
    admit: Option<Admit>,
    client_bytes_per_second: Option<u64>,
    certificate: Option<Files>,
    acme: Option<AcmeSection>,
    #[serde(default)]
    network: Vec<Network>,
    #[serde(default)]
    region: Region,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    relays: Vec<RegionRelay>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Files {
    chain: PathBuf,
    key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct AcmeSection {
    domains: Vec<String>,
    #[serde(default)]
    contact: Vec<String>,
    directory: Option<String>,
    directory_roots: Option<PathBuf>,
    #[serde(default)]
    terms_of_service_agreed: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    id: NetworkId,
    keys: Vec<PermitKey>,
}

impl Config {
    /// Flags over file over defaults.
    ///
    /// # Errors
    /// If the file cannot be read or understood, or what it says cannot work.
    pub fn load(state_dir: PathBuf, flags: Flags) -> Result<Self, ConfigError> {
        let file = flags
            .config
            .as_deref()
            .map(read)
            .transpose()?
            .unwrap_or_default();
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let which = flags.tls.or(file.tls);
        let certificate = certificate(which, file.certificate, file.acme)?;
        let admission = match flags.admit.or(file.admit).unwrap_or(Admit::Permit) {
            Admit::Open => Admission::Open,
            Admit::Permit => Admission::Permit(networks(file.network)?),
        };
        let status = || SocketAddr::from((Ipv4Addr::LOCALHOST, 9180));
        Ok(Self {
            state_dir,
            listen: flags.listen.or(file.listen).unwrap_or_else(|| any(443)),
            stun_listen: flags
                .stun_listen
                .or(file.stun_listen)
                .unwrap_or_else(|| any(3478)),
            status_listen: flags
                .status_listen
                .or(file.status_listen)
                .unwrap_or_else(status),
            certificate,
            admission,
            rate: file.client_bytes_per_second.unwrap_or(DEFAULT_RATE),
            region: region(file.region.relays)?,
        })
    }
}

/// An address to listen on, as it is typed.
fn addr(text: &str) -> Result<SocketAddr, &'static str> {
    let wanted = "an address and a port are needed, as in 192.0.2.1:443 or [::]:443";
    text.parse().map_err(|_| wanted)
}

/// What is shown. Whoever has a section for a certificate wants it shown, unless told otherwise.
fn certificate(
    which: Option<Tls>,
    files: Option<Files>,
    section: Option<AcmeSection>,
) -> Result<Certificate, ConfigError> {
    let which = match (which, &files, &section) {
        (Some(which), _, _) => which,
        (None, Some(_), Some(_)) => return Err(ConfigError::TwoCertificates),
        (None, Some(_), None) => Tls::Given,
        (None, None, Some(_)) => Tls::Acme,
        (None, None, None) => Tls::Own,
    };
    match which {
        Tls::Own => Ok(Certificate::Own),
        Tls::Off => Ok(Certificate::Off),
        Tls::Given => {
            let files = files.ok_or(ConfigError::NoCertificate)?;
            Ok(Certificate::Given {
                certificate: files.chain,
                key: files.key,
            })
        }
        Tls::Acme => acme(section.ok_or(ConfigError::NoAcme)?).map(Certificate::Acme),
    }
}

fn acme(section: AcmeSection) -> Result<Acme, ConfigError> {
    let directory = section.directory;
    let directory = directory.unwrap_or_else(|| DEFAULT_DIRECTORY.to_owned());
    let host = directory.strip_prefix("https://").unwrap_or_default();
    if host.is_empty() || host.starts_with('/') {
        return Err(ConfigError::Directory(directory));
    }
    if section.domains.is_empty() {
        return Err(ConfigError::NoDomains);
    }
    for name in &section.domains {
        if DnsName::try_from(name.as_str()).is_err() || name.ends_with('.') {
            return Err(ConfigError::Domain(name.clone()));
        }
    }
    if let Some(bad) = section.contact.iter().find(|url| !is_contact(url)) {
        return Err(ConfigError::Contact(bad.clone()));
    }
    if !section.terms_of_service_agreed {
        return Err(ConfigError::Terms(directory));
    }
    let mut domains = section.domains;
    for name in &mut domains {
        name.make_ascii_lowercase();
    }
    Ok(Acme {
        domains,
        contact: section.contact,
        directory,
        directory_roots: section.directory_roots,
    })
}

/// RFC 8555 7.3: authorities take `mailto` at least, with one address.
fn is_contact(url: &str) -> bool {
    let address = url.strip_prefix("mailto:").unwrap_or_default();
    let parts = address.split_once('@');
    parts.is_some_and(|(who, host)| !who.is_empty() && !host.is_empty())
}

fn networks(named: Vec<Network>) -> Result<BTreeMap<NetworkId, Vec<PermitKey>>, ConfigError> {
    let mut networks = BTreeMap::new();
    for Network { id, keys } in named {
        if keys.is_empty() {
            return Err(ConfigError::NoKeys(id));
        }
        if networks.insert(id, keys).is_some() {
            return Err(ConfigError::Twice(id));
        }
    }
    if networks.is_empty() {
        return Err(ConfigError::NoNetwork);
    }
    Ok(networks)
}

fn region(named: Vec<RegionRelay>) -> Result<Vec<RegionRelay>, ConfigError> {
    let mut keys = BTreeSet::new();
    for relay in &named {
        if !keys.insert(relay.key) {
            return Err(ConfigError::SameRelay(relay.key));
        }
        if relay.plain && relay.certificate.is_some() {
            return Err(ConfigError::PlainCertificate(relay.addr.clone()));
        }
        let port = relay.addr.rsplit_once(':').map(|(_, port)| port);
        if port.is_none_or(|port| port.parse::<u16>().is_err()) {
            return Err(ConfigError::NoPort(relay.addr.clone()));
        }
    }
    Ok(named)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, flags: Flags) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("relay.toml");
        fs::write(&path, text).unwrap();
        let flags = Flags {
            config: Some(path),
            ..flags
        };
        Config::load("/s".into(), flags)
    }

    fn network(id: u64) -> String {
        format!(
            "[[network]]\nid = {id}\nkeys = ['{}']\n",
            PermitKey([id as u8; 32])
        )
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_words_are_refused() {
        let text = format!("listen = '192.0.2.1:1'\ntls = 'off'\n{}", network(1));
        let config = load(&text, Flags::default()).unwrap();
        assert_eq!(config.listen.to_string(), "192.0.2.1:1");
        assert_eq!(config.certificate, Certificate::Off);
        let flags = Flags {
            listen: Some("192.0.2.2:2".parse().unwrap()),
            tls: Some(Tls::Own),
            ..Flags::default()
        };
        let config = load(&text, flags).unwrap();
        assert_eq!(config.listen.to_string(), "192.0.2.2:2");
        assert_eq!(config.certificate, Certificate::Own);
        let error = load("lisen = '192.0.2.1:1'\n", Flags::default()).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("lisen"), "{source}");
    }

    #[test]
    fn a_certificate_that_is_named_is_shown_unless_told_otherwise() {
        let files = "[certificate]\nchain = '/c'\nkey = '/k'\n";
        let given = load(&format!("{files}{}", network(1)), Flags::default());
        let certificate = given.unwrap().certificate;
        assert!(matches!(certificate, Certificate::Given { .. }));
        let own = Flags {
            tls: Some(Tls::Own),
            ..Flags::default()
        };
        let own = load(&format!("{files}{}", network(1)), own);
        assert_eq!(own.unwrap().certificate, Certificate::Own);
    }

    #[test]
    fn the_example_is_a_configuration_once_its_lines_are_switched_on() {
        let example = include_str!("../../packaging/examples/relay.toml");
        let line = |line: &str| match line.strip_prefix('#') {
            Some(on) if on.starts_with("  {") || !on.starts_with(' ') => on.to_owned(),
            _ => line.to_owned(),
        };
        let all: Vec<String> = example.lines().map(line).collect();
        let config = load(&all.join("\n"), Flags::default()).unwrap();
        // It shows all sections, and says which one is meant.
        assert_eq!(config.certificate, Certificate::Own);
        let asked = Flags {
            tls: Some(Tls::Acme),
            ..Flags::default()
        };
        let asked = load(&all.join("\n"), asked).unwrap().certificate;
        assert!(matches!(asked, Certificate::Acme(acme) if acme.directory == DEFAULT_DIRECTORY));
        assert_eq!((config.rate, config.region.len()), (DEFAULT_RATE, 1));
        // What it says behind `#` is the default.
        let silent = load(&network(1), Flags::default()).unwrap();
        assert_eq!(config.listen, silent.listen);
        assert_eq!(config.stun_listen, silent.stun_listen);
        assert_eq!(config.status_listen, silent.status_listen);
    }

    #[test]
    fn an_authority_is_asked_for_names_and_by_those_who_agree() {
        let check = |section: &str, expected: &str| {
            let text = format!("{}[acme]\n{section}\n", network(1));
            match load(&text, Flags::default()) {
                Ok(config) => assert_eq!(format!("{:?}", config.certificate), expected),
                Err(error) => assert!(error.to_string().contains(expected), "{section}: {error}"),
            }
        };
        let agreed = "terms-of-service-agreed = true";
        let acme = Acme {
            domains: vec!["a.example.com".to_owned(), "b.example.com".to_owned()],
            contact: vec!["mailto:ops@example.com".to_owned()],
            directory: DEFAULT_DIRECTORY.to_owned(),
            directory_roots: None,
        };
        let good = "domains = ['A.example.com', 'b.example.com']";
        let contact = "contact = ['mailto:ops@example.com']";
        let expected = format!("{:?}", Certificate::Acme(acme));
        check(&format!("{good}\n{contact}\n{agreed}"), &expected);
        check(good, "terms-of-service-agreed = true");
        check(
            &format!("{good}\nterms-of-service-agreed = false"),
            "read them",
        );
        check(&format!("domains = []\n{agreed}"), "needs `domains`");
        check(agreed, "is not right");
        for bad in [
            "192.0.2.1",
            "::1",
            "*.example.com",
            "a:443",
            "a b",
            "",
            "a.",
        ] {
            let section = format!("domains = ['{bad}']\n{agreed}");
            check(&section, &format!("`{bad}` in [acme] is no name"));
        }
        for bad in ["ops@example.com", "mailto:ops", "tel:1", "mailto:@"] {
            let section = format!("{good}\ncontact = ['{bad}']\n{agreed}");
            check(&section, "is no contact");
        }
        for bad in ["http://ca/dir", "ca/dir", "https://", "https:///dir"] {
            let section = format!("{good}\ndirectory = '{bad}'\n{agreed}");
            check(&section, "is no https:// address");
        }
        check(&format!("{good}\nagree = true"), "is not right");
    }

    #[test]
    fn of_two_certificates_one_is_meant() {
        let files = "[certificate]\nchain = '/c'\nkey = '/k'\n";
        let acme = "[acme]\ndomains = ['a']\nterms-of-service-agreed = true\n";
        let text = format!("{}{files}{acme}", network(1));
        let error = load(&text, Flags::default()).unwrap_err();
        assert!(error.to_string().contains("take one away"), "{error}");
        let given = load(&format!("tls = 'given'\n{text}"), Flags::default()).unwrap();
        assert!(matches!(given.certificate, Certificate::Given { .. }));
        let asked = load(&format!("tls = 'acme'\n{text}"), Flags::default()).unwrap();
        assert!(matches!(asked.certificate, Certificate::Acme(_)));
        let error = load(&format!("tls = 'acme'\n{}", network(1)), Flags::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("needs an [acme] section"), "{error}");
    }

    #[test]
    fn a_region_that_cannot_be_is_refused() {
        let key = RelayKey([7; 32]);
        let check = |relays: &str, expected: &str| {
            let relays = relays.replace("KEY", &format!("key = '{key}'"));
            let text = format!("{}[region]\nrelays = [{relays}]\n", network(1));
            match load(&text, Flags::default()) {
                Ok(config) => assert_eq!(config.region.len().to_string(), expected),
                Err(error) => assert!(error.to_string().contains(expected), "{error}"),
            }
        };
        let pin = format!("certificate = '{}'", Fingerprint([1; 32]));
        check("", "0");
        check(&format!("{{ addr = 'a:1', KEY, {pin} }}"), "1");
        check("{ addr = 'a:1', KEY, plain = true }", "1");
        check(
            "{ addr = 'a:1', KEY }, { addr = 'b:1', KEY }",
            "named twice",
        );
        check("{ addr = 'a', KEY }", "needs a port");
        let both = format!("{{ addr = 'a:1', KEY, plain = true, {pin} }}");
        check(&both, "take away either");
        check("{ addr = 'a:1' }", "is not right");
    }

    #[test]
    fn nobody_is_let_in_by_leaving_something_out() {
        let check = |text: &str, expected: &str| {
            let error = load(text, Flags::default()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("", "no network to serve");
        check("[[network]]\nid = 5\nkeys = []\n", "network 5 has no keys");
        check(&(network(5) + &network(5)), "network 5 is named twice");
        check("tls = 'given'\nadmit = 'open'\n", "[certificate]");
        let config = load("admit = 'open'\n", Flags::default()).unwrap();
        assert!(matches!(config.admission, Admission::Open));
    }
}
