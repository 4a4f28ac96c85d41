mod server;

use super::*;
use crate::identity::Identity;
use proto::control::{ProofContext, check_node_key};
use proto::filter::Filter;
use proto::id::{NetworkId, NodeId};
use proto::key::{ChallengeKey, NodeSecret};
use proto::netmap::{Delta, Me, Netmap, Network, Owner};
use server::Server;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

/// One conversation with a [`Server`].
struct Talk {
    server: Server,
    identity: Arc<Identity>,
    commands: mpsc::Sender<Command>,
    events: mpsc::Receiver<Event>,
    _folder: tempfile::TempDir,
}

impl Talk {
    async fn start() -> Self {
        Self::with_pin(|fingerprint| fingerprint).await
    }

    async fn with_pin(pin: impl Fn(Fingerprint) -> Fingerprint) -> Self {
        Self::with(Server::start().await, pin, None, Arc::new(|_| None))
    }

    /// `name` is what the coordinator is called where the agent is.
    fn with(
        server: Server,
        pin: impl Fn(Fingerprint) -> Fingerprint,
        name: Option<&str>,
        detour: Detour,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identity = Arc::new(Identity::load_or_create(folder.path()).unwrap());
        let prover = Arc::clone(&identity);
        let credentials = Credentials {
            node_key: identity.node_key(),
            certificate: identity.client_certificate(),
            prove: Arc::new(move |challenge, exporter| prover.prove(challenge, exporter)),
        };
        let config = ControlConfig {
            address: name.unwrap_or(&server.address).to_owned(),
            fingerprint: pin(server.fingerprint),
            detour,
            seed: [7; 32],
        };
        let (commands, receiver) = mpsc::channel(8);
        let (sender, events) = mpsc::channel(8);
        tokio::spawn(run(config, credentials, receiver, sender));
        Self {
            server,
            identity,
            commands,
            events,
            _folder: folder,
        }
    }

    async fn command(&self, command: Command) {
        assert!(self.commands.send(command).await.is_ok());
    }

    async fn event(&mut self) -> Event {
        self.events.recv().await.unwrap()
    }

    /// The next event that is not about a broken connection.
    async fn event_after_all(&mut self) -> Event {
        loop {
            match self.event().await {
                Event::Disconnected { .. } => {}
                event => return event,
            }
        }
    }

    async fn say_hello(&mut self) -> NodeSecret {
        let challenge = NodeSecret::from_bytes([3; 32]);
        let hello = Hello {
            version: wire::VERSION,
            challenge: ChallengeKey(challenge.public().0),
            known: None,
        };
        self.server.expect("/v1/hello").await.answer(200, &hello);
        challenge
    }
}

fn register() -> Command {
    Command::Register(Box::new(Register {
        token: Some(TokenSecret::from_bytes([5; 20])),
        hostname: "web-1".to_owned(),
        about: report(51820),
    }))
}

fn report(listen_port: u16) -> Report {
    Report {
        routes: BTreeSet::new(),
        endpoints: Vec::new(),
        listen_port,
        disco: None,
        home: None,
    }
}

fn refusal(code: RefusalCode) -> Refusal {
    Refusal {
        code,
        message: "no".to_owned(),
    }
}

fn registered() -> Registered {
    Registered {
        network: NetworkId(1),
        node: NodeId(2),
        name: "web-1".to_owned(),
        addrs: vec!["100.64.0.2".parse().unwrap()],
    }
}

fn netmap(generation: u64) -> Netmap {
    Netmap {
        generation: Generation(generation),
        network: Network {
            id: NetworkId(1),
            name: "home".to_owned(),
            v4: "100.64.0.0/10".parse().unwrap(),
            v6: "fd00::/48".parse().unwrap(),
            stun: Vec::new(),
            relays: BTreeMap::new(),
        },
        me: Me {
            id: NodeId(2),
            name: "web-1".to_owned(),
            key: proto::key::NodeKey([9; 32]),
            addrs: Vec::new(),
            routes: BTreeSet::new(),
            owner: Owner::Tags(BTreeSet::new()),
            labels: BTreeSet::new(),
        },
        peers: BTreeMap::new(),
        filter: Filter::default(),
        peers_empty_on_purpose: true,
    }
}

fn full(generation: u64) -> PollMessage {
    PollMessage::Update(Update::Full(Box::new(netmap(generation))))
}

fn delta(base: u64, next: u64) -> Delta {
    netmap(base).delta_to(&netmap(next))
}

#[tokio::test]
async fn a_machine_registers_with_a_proof_that_holds_for_its_channel() {
    let mut talk = Talk::start().await;
    talk.command(register()).await;
    let challenge = talk.say_hello().await;
    let asked = talk.server.expect("/v1/register").await;
    let request: RegisterRequest = asked.read();
    assert_eq!(asked.machine, talk.identity.machine_id());
    let context = ProofContext {
        exporter: &asked.exporter,
        machine: asked.machine,
    };
    assert!(check_node_key(
        &challenge,
        request.key,
        context,
        &request.proof
    ));
    assert_eq!(request.hostname, "web-1");
    assert!(request.token.is_some());
    asked.answer(200, &registered());
    assert!(matches!(talk.event().await, Event::Registered(answer) if answer == registered()));
}

#[tokio::test]
async fn a_stream_is_passed_on_and_resumed_where_it_broke() {
    let mut talk = Talk::start().await;
    talk.command(Command::Poll { base: None }).await;
    let asked = talk.server.expect("/v1/poll").await;
    assert_eq!(asked.read::<PollRequest>().base, None);
    let lines = asked.stream();
    lines.send(&full(4)).await;
    lines.send(&PollMessage::KeepAlive).await;
    let change = Update::Delta(Box::new(delta(4, 6)));
    lines.send(&PollMessage::Update(change.clone())).await;
    assert!(matches!(talk.event().await, Event::Connected));
    assert!(matches!(talk.event().await, Event::Update(Update::Full(map)) if *map == netmap(4)));
    assert!(matches!(talk.event().await, Event::Update(update) if update == change));

    drop(lines);
    let Event::Disconnected { why, retry_in } = talk.event().await else {
        panic!("not disconnected");
    };
    assert!(matches!(why, ControlError::Closed), "{why}");
    assert!(retry_in <= FIRST_PAUSE);
    let asked = talk.server.expect("/v1/poll").await;
    assert_eq!(asked.read::<PollRequest>().base, Some(Generation(6)));

    // Asking anew opens another stream and drops this one.
    let lines = asked.stream();
    assert!(matches!(talk.event().await, Event::Connected));
    talk.command(Command::Poll { base: None }).await;
    lines.closed().await;
    let asked = talk.server.expect("/v1/poll").await;
    assert_eq!(asked.read::<PollRequest>().base, None);
}

#[tokio::test]
async fn a_silent_stream_is_dropped_and_opened_again() {
    let mut talk = Talk::start().await;
    talk.command(Command::Poll { base: None }).await;
    let lines = talk.server.expect("/v1/poll").await.stream();
    lines.send(&full(4)).await;
    assert!(matches!(talk.event().await, Event::Connected));
    assert!(matches!(talk.event().await, Event::Update(_)));

    // The clock now leaps to the next timer whenever nothing else happens.
    tokio::time::pause();
    let begin = tokio::time::Instant::now();
    let Event::Disconnected { why, .. } = talk.event().await else {
        panic!("not disconnected");
    };
    let silence = begin.elapsed().as_secs();
    tokio::time::resume();
    assert!(matches!(why, ControlError::Silent), "{why}");
    assert_eq!(silence, wire::STREAM_DEAD_SECONDS);
    lines.closed().await;
    let asked = talk.server.expect("/v1/poll").await;
    assert_eq!(asked.read::<PollRequest>().base, Some(Generation(4)));
}

#[tokio::test]
async fn another_certificate_hears_nothing() {
    let mut talk = Talk::with_pin(|Fingerprint(mut bytes)| {
        bytes[31] ^= 1;
        Fingerprint(bytes)
    })
    .await;
    talk.command(register()).await;
    let Event::Disconnected { why, .. } = talk.event().await else {
        panic!("not disconnected");
    };
    assert!(
        matches!(why, ControlError::WrongCertificate { .. }),
        "{why}"
    );
    assert!(talk.server.is_unasked());
}

/// Nobody but the proxy knows the coordinator's name, and TLS still ends at the coordinator.
#[tokio::test]
async fn a_coordinator_behind_a_proxy_is_the_pinned_one_all_the_same() {
    const NAME: &str = "hub.weir.invalid:8443";
    for (last_bit, is_it) in [(0, true), (1, false)] {
        let server = Server::start().await;
        let at = server.address.clone();
        let detour: Detour = Arc::new(move |target| {
            assert_eq!(target, NAME);
            let at = at.clone();
            Some(Box::pin(async move { TcpStream::connect(at).await }))
        });
        let pin = |Fingerprint(mut bytes)| {
            bytes[31] ^= last_bit;
            Fingerprint(bytes)
        };
        let mut talk = Talk::with(server, pin, Some(NAME), detour);
        talk.command(register()).await;
        if is_it {
            talk.say_hello().await;
            let asked = talk.server.expect("/v1/register").await;
            asked.answer(200, &registered());
            assert!(matches!(talk.event().await, Event::Registered(_)));
            continue;
        }
        let Event::Disconnected { why, .. } = talk.event().await else {
            panic!("not disconnected");
        };
        assert!(
            why.to_string().contains("answers at hub.weir.invalid:8443"),
            "{why}"
        );
        assert!(talk.server.is_unasked());
    }
}

#[tokio::test]
async fn who_speaks_something_else_than_tls_is_named() {
    let elsewhere: Detour = Arc::new(|_| {
        Some(Box::pin(async {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let stream = TcpStream::connect(listener.local_addr()?).await?;
            let (mut other, _) = listener.accept().await?;
            other.write_all(b"SSH-2.0-Example\r\n").await?;
            tokio::spawn(async move { tokio::io::copy(&mut other, &mut tokio::io::sink()).await });
            Ok(stream)
        }))
    });
    let server = Server::start().await;
    let mut talk = Talk::with(server, |it| it, Some("ssh.weir.invalid:22"), elsewhere);
    talk.command(register()).await;
    let Event::Disconnected { why, .. } = talk.event().await else {
        panic!("not disconnected");
    };
    let said = why.to_string();
    assert!(
        said.contains("answers at ssh.weir.invalid:22 does not speak TLS"),
        "{said}"
    );
}

#[tokio::test]
async fn a_proxy_that_refuses_is_told() {
    let refuses: Detour = Arc::new(|_| {
        Some(Box::pin(async {
            Err(io::Error::other("the proxy says no"))
        }))
    });
    let server = Server::start().await;
    let mut talk = Talk::with(server, |it| it, None, refuses);
    talk.command(register()).await;
    let Event::Disconnected { why, .. } = talk.event().await else {
        panic!("not disconnected");
    };
    assert!(
        why.to_string()
            .contains("cannot be reached through a proxy"),
        "{why}"
    );
    let source = std::error::Error::source(&why).map(ToString::to_string);
    assert_eq!(source.as_deref(), Some("the proxy says no"));
}

#[tokio::test]
async fn a_refused_token_is_not_tried_again() {
    let mut talk = Talk::start().await;
    talk.command(register()).await;
    talk.say_hello().await;
    let asked = talk.server.expect("/v1/register").await;
    asked.answer(403, &refusal(RefusalCode::Token));
    assert!(matches!(talk.event().await, Event::Refused(why) if why.code == RefusalCode::Token));

    // The next thing that is asked is what comes next, not the old request.
    talk.command(Command::Report(report(1))).await;
    let asked = talk.server.expect("/v1/report").await;
    assert_eq!(asked.read::<Report>(), report(1));
}

#[tokio::test]
async fn an_unavailable_coordinator_is_asked_again() {
    let mut talk = Talk::start().await;
    talk.command(register()).await;
    talk.say_hello().await;
    let asked = talk.server.expect("/v1/register").await;
    asked.answer(503, &refusal(RefusalCode::Unavailable));
    talk.say_hello().await;
    let asked = talk.server.expect("/v1/register").await;
    asked.answer(502, &"a proxy's page");
    talk.say_hello().await;
    talk.server
        .expect("/v1/register")
        .await
        .answer(200, &registered());
    assert!(matches!(talk.event_after_all().await, Event::Registered(_)));
}

#[tokio::test]
async fn a_node_that_was_removed_is_told_and_keeps_asking_slowly() {
    let mut talk = Talk::start().await;
    talk.command(Command::Poll { base: None }).await;
    let asked = talk.server.expect("/v1/poll").await;
    asked.answer(403, &refusal(RefusalCode::UnknownNode));
    let event = talk.event().await;
    assert!(matches!(event, Event::Refused(why) if why.code == RefusalCode::UnknownNode));
    let Event::Disconnected { retry_in, .. } = talk.event().await else {
        panic!("not disconnected");
    };
    assert!(retry_in >= LONGEST_PAUSE / 4);
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    let mut talk = Talk::start().await;
    talk.command(register()).await;
    let asked = talk.server.expect("/v1/hello").await;
    asked.answer(200, &"x".repeat(1 << 20));
    let Event::Disconnected { why, .. } = talk.event().await else {
        panic!("not disconnected");
    };
    assert!(matches!(why, ControlError::TooLong), "{why}");
}

#[tokio::test]
async fn logging_out_ends_the_stream() {
    let mut talk = Talk::start().await;
    talk.command(Command::Poll { base: None }).await;
    let lines = talk.server.expect("/v1/poll").await.stream();
    assert!(matches!(talk.event().await, Event::Connected));
    talk.command(Command::Logout).await;
    let asked = talk.server.expect("/v1/logout").await;
    asked.answer(200, &serde_json::json!({}));
    assert!(matches!(talk.event().await, Event::LoggedOut));
    lines.closed().await;
}

#[test]
fn a_command_to_register_shows_no_token() {
    let secret = TokenSecret::from_bytes([5; 20]);
    let request = RegisterRequest {
        token: Some(secret.clone()),
        key: NodeSecret::from_bytes([1; 32]).public(),
        proof: serde_json::from_str("\"00\"").unwrap(),
        hostname: "web-1".to_owned(),
        routes: BTreeSet::new(),
        endpoints: Vec::new(),
        listen_port: 1,
        disco: None,
    };
    assert!(!format!("{request:?}").contains(secret.expose()));
}

#[test]
fn pauses_double_are_bounded_and_differ_between_nodes() {
    let (a, b) = ([1; 32], [2; 32]);
    for failures in 0..40 {
        let longest = FIRST_PAUSE * 2_u32.pow(failures.min(6));
        let longest = longest.min(LONGEST_PAUSE);
        let pause = pause(a, failures);
        assert!(
            pause <= longest && pause >= longest / 4,
            "{failures}: {pause:?}"
        );
    }
    assert_ne!(pause(a, 3), pause(b, 3));
    assert_eq!(pause(a, 3), pause(a, 3));
}
