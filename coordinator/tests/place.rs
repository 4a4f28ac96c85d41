//! A coordinator for a test: in this process, or in one of its own.

use crate::postgres::Postgres;
use coordinator::cli::{self, CallError};
use coordinator::config::{Config, Relays};
use coordinator::http::admin::{Answer, NodeDocument, Request, Verb};
use coordinator::server::Server;
use proto::control::JoinToken;
use proto::key::Fingerprint;
use proto::netmap::Owner;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Everybody may talk with everybody.
pub const ALLOW_ALL: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
pub const BINARY: &str = env!("CARGO_BIN_EXE_weir-coordinator");

/// A coordinator and its state folder.
pub struct Place {
    pub dir: TempDir,
    pub server: Option<Server>,
    /// What nodes are told of relays from the next start on.
    pub relays: Relays,
    database: Option<String>,
}

impl Place {
    /// With SQLite, or with the database at this URL.
    pub async fn start(database: Option<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut this = Self {
            dir,
            server: None,
            relays: Relays::default(),
            database,
        };
        this.resume(([127, 0, 0, 1], 0).into()).await;
        this
    }

    /// As [`Self::start`], with a network `home` in which everybody may talk with everybody.
    pub async fn with_network(database: Option<String>) -> Self {
        let this = Self::start(database).await;
        this.network("home").await;
        this.policy("home", ALLOW_ALL).await.unwrap();
        this
    }

    /// Starts the coordinator (again) on its state folder.
    pub async fn resume(&mut self, listen: SocketAddr) {
        let config = Config {
            state_dir: self.dir.path().to_owned(),
            listen,
            advertise: None,
            database: self.database.clone(),
            certificate: None,
            ephemeral_offline: Duration::from_secs(1),
            relays: self.relays.clone(),
        };
        self.server = Some(Server::start(config).await.unwrap());
    }

    pub async fn stop(&mut self) {
        self.server.take().unwrap().stop().await;
    }

    pub fn at(&self) -> (SocketAddr, Fingerprint) {
        let server = self.server.as_ref().unwrap();
        (server.addr, server.fingerprint)
    }

    pub async fn ask(&self, network: &str, verb: Verb) -> Result<Answer, CallError> {
        ask(self.dir.path(), network, verb).await
    }

    pub async fn network(&self, name: &str) {
        let name = name.to_owned();
        self.ask(
            "",
            Verb::NetworkCreate {
                name,
                v4: None,
                v6: None,
            },
        )
        .await
        .unwrap();
    }

    pub async fn policy(&self, network: &str, text: &str) -> Result<Answer, CallError> {
        let (text, file) = (text.to_owned(), "policy.hujson".to_owned());
        let compare = false;
        let verb = Verb::PolicySet {
            text,
            file,
            compare,
        };
        self.ask(network, verb).await
    }

    /// A token that admits any number of nodes as `tag`.
    pub async fn token(&self, network: &str, tag: &str) -> JoinToken {
        token(
            self.dir.path(),
            network,
            Owner::Tags(BTreeSet::from([tag.to_owned()])),
            true,
        )
        .await
    }

    pub async fn nodes(&self, network: &str) -> Vec<NodeDocument> {
        match self.ask(network, Verb::NodeList).await.unwrap() {
            Answer::Nodes(nodes) => nodes,
            _ => panic!("not a list of nodes"),
        }
    }
}

pub async fn ask(dir: &Path, network: &str, verb: Verb) -> Result<Answer, CallError> {
    let network = (!network.is_empty()).then(|| network.to_owned());
    cli::call(dir, &Request { network, verb }).await
}

pub async fn token(dir: &Path, network: &str, owner: Owner, reusable: bool) -> JoinToken {
    let verb = Verb::TokenCreate {
        owner,
        reusable,
        ephemeral: false,
        valid_ms: 3_600_000,
    };
    match ask(dir, network, verb).await.unwrap() {
        Answer::Token { token, .. } => token.parse().unwrap(),
        _ => panic!("not a token"),
    }
}

/// A coordinator in a process of its own.
pub struct Process {
    pub child: Child,
    pub addr: SocketAddr,
}

impl Process {
    /// Starts it and waits until it says that it listens.
    pub fn start(state_dir: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(BINARY)
            .arg("serve")
            .arg("--state-dir")
            .arg(state_dir)
            .args(args)
            .env("WEIR_LOG", "error")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let addr = line
            .split_whitespace()
            .find_map(|word| word.trim_end_matches(',').parse().ok());
        Self {
            child,
            addr: addr.expect("it says where it listens"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two coordinators in processes of their own, on one database and behind one name: they show the
/// same certificate. They serve a network `home`. With their state folders.
pub async fn replicas(postgres: &Postgres) -> ([Process; 2], [TempDir; 2]) {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let args = ["--listen", "127.0.0.1:0", "--database", &postgres.url()];
    let first = Process::start(dirs[0].path(), &args);
    for file in ["certificate.pem", "certificate-key.pem"] {
        fs::copy(dirs[0].path().join(file), dirs[1].path().join(file)).unwrap();
    }
    let second = Process::start(dirs[1].path(), &args);
    let home = Verb::NetworkCreate {
        name: "home".to_owned(),
        v4: None,
        v6: None,
    };
    ask(dirs[0].path(), "", home).await.unwrap();
    ([first, second], dirs)
}
