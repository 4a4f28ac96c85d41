//! Connections to real relays, without a kernel: what comes through, and what a lost one costs.

use agent::control::tls_to;
use agent::proxy::Proxy;
use agent::relay::{Config, Event, Outboxes, Packet, Relays, Transport};
use bytes::Bytes;
use engine::RelayEvent;
use proto::derp::{DISCO_MAGIC, DISCO_MIN_BYTES, LoginBox};
use proto::id::{NetworkId, RegionId};
use proto::key::{NodeKey, NodeSecret};
use proto::netmap::{Region, RelayHost};
use proto::permit::PermitSecret;
use relay::admit::Admission;
use relay::config::Certificate;
use relay::server::Server;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;

const HERE: RegionId = RegionId(7);
/// Longest wait for what must come, on slow machines.
const PATIENCE: Duration = Duration::from_secs(20);
const NETWORK: NetworkId = NetworkId(3);
/// Far in the future, in seconds since 1970.
const LATER: u64 = 40_000_000_000;

fn any() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn signer() -> PermitSecret {
    PermitSecret::from_seed(&[9; 32]).expect("32 bytes")
}

/// A relay of this process that lets in nodes of one network.
fn start(certificate: Certificate, listen: SocketAddr) -> (Server, TempDir) {
    let dir = tempfile::tempdir().expect("a folder");
    let config = relay::config::Config {
        state_dir: dir.path().to_owned(),
        listen,
        stun_listen: any(),
        status_listen: any(),
        certificate,
        admission: Admission::Permit(BTreeMap::from([(NETWORK, vec![signer().public()])])),
        rate: 0,
        region: Vec::new(),
    };
    (Server::start(config).expect("a relay"), dir)
}

fn region(server: &Server, plain: bool) -> Region {
    Region {
        name: "here".to_owned(),
        hosts: vec![RelayHost {
            addr: server.addr.to_string(),
            stun: None,
            plain,
            certificate: server.fingerprint,
        }],
    }
}

/// A node's connections, and what comes by them.
struct Node {
    key: NodeKey,
    relays: Relays,
    outboxes: Outboxes,
    events: mpsc::Receiver<(RegionId, Event)>,
    data: mpsc::UnboundedReceiver<Packet>,
}

impl Node {
    fn new(seed: u8) -> Self {
        Self::by(seed, &Arc::new(Proxy::new(None, "", None)))
    }

    fn by(seed: u8, proxy: &Arc<Proxy>) -> Self {
        let proxy = Arc::clone(proxy);
        let secret = NodeSecret::from_bytes([seed; 32]);
        let key = secret.public();
        let (events_in, events) = mpsc::channel(64);
        let (data_in, data) = mpsc::unbounded_channel();
        let outboxes = Outboxes::default();
        let config = Config {
            me: key,
            login: Arc::new(move |relay| Some(LoginBox::new(&*secret.agree(relay.0)?))),
            pinned: Arc::new(tls_to),
            detour: Arc::new(move |target| proxy.open(target)),
            deliver: Arc::new(move |packets| {
                for packet in packets {
                    data_in.send(packet.clone()).expect("an open channel");
                }
                packets.iter().map(|(from, _)| *from).collect()
            }),
            events: events_in,
        };
        let relays = Relays::new(config, outboxes.clone());
        relays.set_permit(Some(signer().permit(NETWORK, key, LATER)));
        Self {
            key,
            relays,
            outboxes,
            events,
            data,
        }
    }

    fn go(&mut self, region: &Region) {
        let regions = BTreeMap::from([(HERE, region.clone())]);
        self.relays.set(Some(HERE), &regions);
    }

    /// The next event that is no latency.
    async fn event(&mut self) -> RelayEvent {
        match self.any_event().await {
            Event::Said(event) => event,
            other => panic!("{other:?}"),
        }
    }

    async fn any_event(&mut self) -> Event {
        loop {
            let event = timeout(PATIENCE, self.events.recv()).await;
            match event.expect("an event").expect("an open channel") {
                (HERE, Event::Said(RelayEvent::Latency(latency))) => assert!(latency < PATIENCE),
                (HERE, event) => return event,
                other => panic!("{other:?}"),
            }
        }
    }

    async fn down(&mut self) -> String {
        match self.event().await {
            RelayEvent::Down(why) => why,
            other => panic!("{other:?}"),
        }
    }
}

async fn pair(region: &Region) -> [Node; 2] {
    connected([Node::new(1), Node::new(2)], region).await
}

async fn connected(mut nodes: [Node; 2], region: &Region) -> [Node; 2] {
    for node in &mut nodes {
        node.go(region);
        assert_eq!(node.event().await, RelayEvent::Up);
    }
    nodes
}

/// So many packets that `from` sends come to `to`, in order.
async fn passes(from: &Node, to: &mut Node, packets: u8) {
    let sent: Vec<Packet> = (0..packets)
        .map(|number| (to.key, Bytes::from(vec![number; 1_400])))
        .collect();
    from.outboxes.push(HERE, &sent);
    for (_, packet) in sent {
        let got = timeout(PATIENCE, to.data.recv()).await;
        let got = got.expect("a packet").expect("an open channel");
        assert_eq!(got, (from.key, packet));
    }
}

#[tokio::test]
async fn data_and_discovery_pass_with_tls_and_without() {
    for (certificate, plain) in [(Certificate::Own, false), (Certificate::Off, true)] {
        let (server, _dir) = start(certificate, any());
        let [mut a, mut b] = pair(&region(&server, plain)).await;
        assert_eq!(a.relays.transport(HERE), Some(Transport::Derp));
        passes(&a, &mut b, 20).await;
        let from = a.key;
        assert_eq!(b.event().await, RelayEvent::Data { from });
        let mut disco = DISCO_MAGIC.to_vec();
        disco.resize(DISCO_MIN_BYTES + 5, 3);
        a.relays.send(HERE, b.key, disco.clone());
        loop {
            match b.any_event().await {
                Event::Said(RelayEvent::Data { .. }) => {}
                event => {
                    let bytes = disco;
                    break assert_eq!(event, Event::Disco { from, bytes });
                }
            }
        }
        let stranger = NodeKey([5; 32]);
        a.outboxes
            .push(HERE, &[(stranger, Bytes::from_static(b"x"))]);
        assert_eq!(a.event().await, RelayEvent::PeerGone(stranger));
    }
}

#[tokio::test]
async fn a_relay_with_another_certificate_is_no_relay() {
    let (server, _dir) = start(Certificate::Own, any());
    let mut region = region(&server, false);
    region.hosts[0].certificate = Some(proto::key::Fingerprint([1; 32]));
    let mut node = Node::new(1);
    node.go(&region);
    let why = node.down().await;
    assert!(why.contains("another certificate"), "{why}");
}

#[tokio::test]
async fn a_permit_is_needed_and_a_new_one_is_tried_at_once() {
    let (server, _dir) = start(Certificate::Own, any());
    let mut node = Node::new(1);
    let good = signer().permit(NETWORK, node.key, LATER);
    let expired = signer().permit(NETWORK, node.key, 1);
    node.relays.set_permit(Some(expired));
    node.go(&region(&server, false));
    let why = node.down().await;
    assert!(why.contains("expired"), "{why}");
    node.relays.set_permit(Some(good));
    while node.event().await != RelayEvent::Up {}
}

#[tokio::test]
async fn a_relay_that_ends_is_told_at_once_and_found_again_when_it_is_back() {
    let (server, _dir) = start(Certificate::Off, any());
    let (region, addr) = (region(&server, true), server.addr);
    let [mut a, mut b] = pair(&region).await;
    let begin = std::time::Instant::now();
    let stop = tokio::spawn(server.stop());
    for node in [&mut a, &mut b] {
        let why = node.down().await;
        assert!(why.contains("restarts"), "{why}");
    }
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    stop.await.unwrap();
    let (_server, _dir) = start(Certificate::Off, addr);
    for node in [&mut a, &mut b] {
        while node.event().await != RelayEvent::Up {}
    }
    passes(&a, &mut b, 1).await;
}

/// What stands between a node and a relay, reads along, and lets only WebSockets through.
async fn middlebox(relay: SocketAddr, refusal: &'static [u8]) -> SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
    let door = tokio::net::TcpListener::bind(any()).await;
    let door = door.expect("a free port");
    let addr = door.local_addr().expect("an address");
    tokio::spawn(async move {
        loop {
            let (mut near, _) = door.accept().await.expect("a connection");
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(near.read_u8().await?);
                }
                let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
                if !text.contains("\r\nupgrade: websocket\r\n") {
                    return near.write_all(refusal).await;
                }
                let mut far = tokio::net::TcpStream::connect(relay).await?;
                far.write_all(&head).await?;
                copy_bidirectional(&mut near, &mut far).await?;
                Ok(())
            });
        }
    });
    addr
}

#[tokio::test]
async fn what_lets_only_websockets_through_is_passed_in_one() {
    let (server, _dir) = start(Certificate::Off, any());
    let refusals: [&[u8]; 2] = [b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", b""];
    for refusal in refusals {
        let mut region = region(&server, true);
        region.hosts[0].addr = middlebox(server.addr, refusal).await.to_string();
        let [a, mut b] = pair(&region).await;
        assert_eq!(a.relays.transport(HERE), Some(Transport::WebSocket));
        passes(&a, &mut b, 50).await;
        // Why a relay refuses a node is heard through it, too.
        let mut late = Node::new(3);
        late.relays.set_permit(None);
        late.go(&region);
        let why = late.down().await;
        assert!(why.contains("permit of their coordinator"), "{why}");
    }
}

/// Where nothing lets us through, the first refusal is what is told.
#[tokio::test]
async fn what_is_no_relay_is_told_as_it_answers() {
    let door = tokio::net::TcpListener::bind(any()).await.unwrap();
    let mut region = region(&start(Certificate::Off, any()).0, true);
    region.hosts[0].addr = door.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        loop {
            let (mut stream, _) = door.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4_096]).await;
            let answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
            let _ = stream.write_all(answer).await;
        }
    });
    let mut node = Node::new(1);
    node.go(&region);
    let why = node.down().await;
    assert!(why.contains("HTTP/1.1 404 Not Found"), "{why}");
    assert_eq!(node.relays.transport(HERE), None);
}

/// A relay whose network went away: TCP stays as it is, and nothing comes any more.
#[tokio::test]
async fn a_relay_that_falls_silent_is_given_up_soon() {
    let (server, _dir) = start(Certificate::Off, any());
    let door = tokio::net::TcpListener::bind(any()).await.unwrap();
    let mut region = region(&server, true);
    region.hosts[0].addr = door.local_addr().unwrap().to_string();
    let (closes, mut closed) = tokio::sync::watch::channel(false);
    let target = server.addr;
    tokio::spawn(async move {
        let (mut near, _) = door.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            _ = closed.wait_for(|closed| *closed) => {}
        }
        // Both connections stay open.
        std::future::pending::<()>().await;
    });
    let mut node = Node::new(1);
    node.go(&region);
    assert_eq!(node.event().await, RelayEvent::Up);
    closes.send(true).unwrap();
    let start = std::time::Instant::now();
    let why = node.down().await;
    assert!(why.contains("silent"), "{why}");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(6), "{took:?}");
}

/// A proxy that wants this in each request, takes one name for the relay, and opens a tunnel or
/// says no. Everything that it was asked goes into the channel.
async fn proxy(
    relay: SocketAddr,
    wanted: &'static str,
) -> (String, mpsc::UnboundedReceiver<String>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
    let door = tokio::net::TcpListener::bind(any()).await;
    let door = door.expect("a free port");
    let url = format!("http://{}", door.local_addr().expect("an address"));
    let (asks, asked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut near, _) = door.accept().await.expect("a connection");
            let asks = asks.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(near.read_u8().await?);
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                // Once the test is over nobody listens.
                let _ = asks.send(head.lines().next().unwrap_or_default().to_owned());
                if !head.contains(wanted) {
                    let refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n";
                    return near.write_all(refusal).await;
                }
                let mut far = tokio::net::TcpStream::connect(relay).await?;
                near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                copy_bidirectional(&mut near, &mut far).await?;
                Ok(())
            });
        }
    });
    (url, asked)
}

/// The relay's name is known to the proxy alone.
#[tokio::test]
async fn a_relay_is_reached_through_a_proxy_that_wants_a_password() {
    const WANTED: &str = "\r\nProxy-Authorization: Basic YW5hOnNlc2FtZQ==\r\n";
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("proxy"), "ana:sesame\n").unwrap();
    for (certificate, plain) in [(Certificate::Own, false), (Certificate::Off, true)] {
        let (server, _dir) = start(certificate, any());
        let (url, mut asked) = proxy(server.addr, WANTED).await;
        let mut region = region(&server, plain);
        region.hosts[0].addr = "relay.weir.invalid:443".to_owned();
        let through = Arc::new(Proxy::new(Some(&url), "", Some(folder.path())));
        let nodes = [Node::by(1, &through), Node::by(2, &through)];
        let [a, mut b] = connected(nodes, &region).await;
        assert_eq!(a.relays.transport(HERE), Some(Transport::Derp));
        let packet = Bytes::from(vec![7; 1_400]);
        a.outboxes.push(HERE, &[(b.key, packet.clone())]);
        let got = timeout(PATIENCE, b.data.recv()).await.unwrap().unwrap();
        assert_eq!(got, (a.key, packet));
        let line = asked.recv().await.unwrap();
        assert_eq!(line, "CONNECT relay.weir.invalid:443 HTTP/1.1");

        let mut nobody = Node::by(3, &Arc::new(Proxy::new(Some(&url), "", None)));
        nobody.go(&region);
        let why = nobody.down().await;
        assert!(
            why.contains("relay.weir.invalid:443 cannot be reached"),
            "{why}"
        );
        assert!(why.contains("wants a user and password"), "{why}");
    }
}

/// `127.1` is an address to the resolver alone, so the proxy would be for it.
#[tokio::test]
async fn a_relay_that_the_proxy_is_not_for_is_reached_directly() {
    let (server, _dir) = start(Certificate::Off, any());
    let (url, mut asked) = proxy(server.addr, "").await;
    let mut region = region(&server, true);
    region.hosts[0].addr = format!("127.1:{}", server.addr.port());
    for (exempt, tunnels) in [("127.1", false), ("other.example", true)] {
        let through = Arc::new(Proxy::new(Some(&url), exempt, None));
        let nodes = [Node::by(1, &through), Node::by(2, &through)];
        let _connected = connected(nodes, &region).await;
        assert_eq!(asked.try_recv().is_ok(), tunnels, "NO_PROXY={exempt}");
    }
}
