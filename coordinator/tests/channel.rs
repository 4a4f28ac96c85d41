//! Who is at the other end: certificates, signatures, proofs, and calls that act for the channel's
//! machine alone.

use crate::client::{At, Client, Machine, Stream, names, random_secret};
use crate::place::Place;
use proto::control::{PollRequest, Refusal, RefusalCode, RegisterRequest, Report};
use rustls::sign::{Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

/// Connects and says hello: with TLS 1.3 a client learns only from the first answer whether its
/// certificate was taken.
async fn greet(connected: io::Result<Client>) -> Result<(), String> {
    let mut client = connected.map_err(|error| error.to_string())?;
    client
        .hello()
        .await
        .map(|_| ())
        .map_err(|refusal| refusal.message)
}

#[tokio::test]
async fn the_certificate_of_one_machine_with_the_key_of_another_is_refused() {
    let place = Place::start(None).await;
    let (a, b) = (Machine::new(), Machine::new());
    greet(a.try_connect(place.at()).await).await.unwrap();
    let mixed = Machine {
        signer: Arc::clone(&b.signer),
        ..a
    };
    assert!(greet(mixed.try_connect(place.at()).await).await.is_err());
}

/// Signs once; afterwards gives the same signature again, as one would who recorded it.
#[derive(Debug)]
struct Recorder {
    real: Arc<dyn SigningKey>,
    recorded: Arc<Mutex<Option<Vec<u8>>>>,
}

impl SigningKey for Recorder {
    fn choose_scheme(&self, _offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let (real, recorded) = (Arc::clone(&self.real), Arc::clone(&self.recorded));
        Some(Box::new(Self { real, recorded }))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        self.real.algorithm()
    }
}

impl Signer for Recorder {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let mut recorded = self.recorded.lock().unwrap();
        if let Some(signature) = recorded.as_ref() {
            return Ok(signature.clone());
        }
        let real = self.real.choose_scheme(&[self.scheme()]).unwrap();
        let signature = real.sign(message)?;
        *recorded = Some(signature.clone());
        Ok(signature)
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP256_SHA256
    }
}

#[tokio::test]
async fn a_replayed_certificate_and_signature_are_refused() {
    let place = Place::start(None).await;
    let machine = Machine::new();
    let recorder = Recorder {
        real: Arc::clone(&machine.signer),
        recorded: Arc::new(Mutex::new(None)),
    };
    let machine = Machine {
        signer: Arc::new(recorder),
        ..machine
    };
    greet(machine.try_connect(place.at()).await).await.unwrap();
    assert!(greet(machine.try_connect(place.at()).await).await.is_err());
}

#[tokio::test]
async fn no_certificate_a_chain_or_another_kind_of_key_is_no_machine() {
    let place = Place::start(None).await;
    let machine = Machine::new();
    let leaf = machine.certificate.clone();
    for shown in [vec![], vec![leaf.clone(), leaf.clone()]] {
        let count = shown.len();
        let refused = greet(machine.connect_showing(place.at(), shown).await).await;
        assert!(refused.is_err(), "{count} certificates");
    }
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        let other = Machine::with_pair(&rcgen::KeyPair::generate_for(algorithm).unwrap());
        assert!(
            greet(other.try_connect(place.at()).await).await.is_err(),
            "{algorithm:?}"
        );
    }
}

#[tokio::test]
async fn a_node_does_not_talk_to_another_certificate_than_the_tokens() {
    let (place, other) = (Place::start(None).await, Place::start(None).await);
    let at = (place.at().0, other.at().1);
    assert!(Machine::new().try_connect(at).await.is_err());
}

#[tokio::test]
async fn a_proof_holds_on_its_own_connection_only() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let machine = Machine::new();
    let (mut here, mut there) = (
        machine.connect(token.at()).await,
        machine.connect(token.at()).await,
    );
    let request = |proof, key| RegisterRequest {
        token: Some(token.secret.clone()),
        key,
        proof,
        hostname: "web".to_owned(),
        routes: BTreeSet::new(),
        endpoints: vec![],
        listen_port: 1,
        disco: None,
    };
    let key = machine.secret.public();
    let elsewhere = request(there.proof(&machine.secret).await.unwrap(), key);
    let refused = here
        .call::<serde_json::Value>("/v1/register", &elsewhere)
        .await
        .unwrap_err();
    assert_eq!(refused.code, RefusalCode::Proof);
    let other_key = request(
        here.proof(&machine.secret).await.unwrap(),
        random_secret().public(),
    );
    let refused = here
        .call::<serde_json::Value>("/v1/register", &other_key)
        .await
        .unwrap_err();
    assert_eq!(refused.code, RefusalCode::Proof);
    assert_eq!(place.nodes("home").await.len(), 0);

    let good = request(here.proof(&machine.secret).await.unwrap(), key);
    here.call::<serde_json::Value>("/v1/register", &good)
        .await
        .unwrap();
}

/// What a call says of the machine that makes it.
async fn every_call(client: &mut Client, machine: &Machine) -> Vec<(&'static str, Refusal)> {
    let report = Report {
        routes: BTreeSet::new(),
        endpoints: vec![],
        listen_port: 1,
        disco: None,
        home: None,
    };
    let mut refusals = vec![
        ("report", client.report(&report).await.unwrap_err()),
        ("logout", client.logout().await.unwrap_err()),
        (
            "register",
            client.register(machine, None, "x").await.unwrap_err(),
        ),
    ];
    let from_nothing = PollRequest { base: None };
    let poll = client
        .call::<serde_json::Value>("/v1/poll", &from_nothing)
        .await;
    refusals.push(("poll", poll.unwrap_err()));
    refusals
}

#[tokio::test]
async fn a_machine_that_is_no_node_gets_nothing_from_any_call() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (stranger, removed) = (Machine::new(), Machine::new());
    let (mut removed_client, _) = removed.join(&token, "removed").await;
    let verb = coordinator::http::admin::Verb::NodeRemove {
        node: "removed".to_owned(),
    };
    place.ask("home", verb).await.unwrap();
    let mut stranger_client = stranger.connect(token.at()).await;
    for (client, machine) in [
        (&mut stranger_client, &stranger),
        (&mut removed_client, &removed),
    ] {
        assert_eq!(client.hello().await.unwrap().known, None);
        for (call, refusal) in every_call(client, machine).await {
            let expected = if call == "register" {
                RefusalCode::Token
            } else {
                RefusalCode::UnknownNode
            };
            assert_eq!(refusal.code, expected, "{call}");
        }
    }
}

#[tokio::test]
async fn each_call_acts_for_the_node_of_its_channel_and_no_other() {
    let place = Place::with_network(None).await;
    let token = place.token("home", "tag:web").await;
    let (a, b) = (Machine::new(), Machine::new());
    let (mut a_client, a_is) = a.join(&token, "a").await;
    let (mut b_client, b_is) = b.join(&token, "b").await;

    assert_eq!(a_client.hello().await.unwrap().known, Some(a_is.node));
    assert_eq!(b_client.hello().await.unwrap().known, Some(b_is.node));

    let report = Report {
        routes: BTreeSet::new(),
        endpoints: vec!["198.51.100.1:1".parse().unwrap()],
        listen_port: 9,
        disco: None,
        home: None,
    };
    b_client.report(&report).await.unwrap();
    let nodes = place.nodes("home").await;
    assert_eq!(
        nodes[0].endpoints,
        ["192.0.2.7:51820".parse().unwrap()],
        "a is as it was"
    );
    assert_eq!(nodes[1].endpoints, report.endpoints);

    let view = async |machine: &Machine| {
        let mut stream: Stream = machine.connect(token.at()).await.poll(None).await.unwrap();
        stream.full().await
    };
    let (a_view, b_view) = (view(&a).await, view(&b).await);
    assert_eq!((a_view.me.id, names(&a_view)), (a_is.node, vec!["b"]));
    assert_eq!((b_view.me.id, names(&b_view)), (b_is.node, vec!["a"]));

    // With a's WireGuard key proven on b's channel, b still is b, and the key stays a's.
    let thief = Machine {
        secret: proto::key::NodeSecret::from_bytes(*a.secret.expose()),
        ..b
    };
    let refused = b_client.register(&thief, None, "a").await.unwrap_err();
    assert_eq!(refused.code, RefusalCode::KeyTaken);

    b_client.logout().await.unwrap();
    let nodes = place.nodes("home").await;
    assert_eq!(
        nodes.iter().map(|node| node.id).collect::<Vec<_>>(),
        [a_is.node]
    );
}

#[tokio::test]
async fn a_request_that_cannot_be_read_is_refused_with_what_is_wrong() {
    let place = Place::start(None).await;
    let mut client = Machine::new().connect(place.at()).await;
    for (path, body, word) in [
        ("/v1/hello", "", "EOF"),
        ("/v1/hello", r#"{"version": 1, "node": 7}"#, "unknown field"),
        (
            "/v1/report",
            r#"{"routes": ["10.0.0.1/8"], "endpoints": [], "listen_port": 1}"#,
            "10.0.0.0/8",
        ),
        ("/v1/elsewhere", "{}", "no such call"),
    ] {
        let refusal = client
            .call_raw::<serde_json::Value>(path, body.into())
            .await
            .unwrap_err();
        assert_eq!(refusal.code, RefusalCode::BadRequest);
        assert!(refusal.message.contains(word), "{}", refusal.message);
    }
    let newer = proto::control::HelloRequest { version: 2 };
    let refusal = client
        .call::<serde_json::Value>("/v1/hello", &newer)
        .await
        .unwrap_err();
    assert_eq!(refusal.code, RefusalCode::Version);
}
