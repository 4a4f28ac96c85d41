//! The other relays of our region: whoever is connected to one of them is reached from here.
//!
//! Each relay connects to each other one as a client does, and its key is its admission: every relay
//! of a region holds the keys of all of them. On that connection it is told who is connected there,
//! and sends packets for them; what comes the other way comes on the other's own connection. A packet
//! takes one such hop at most.
//!
//! ```text
//! node ─► us ═ our connection: ForwardPacket ►══◄ PeerPresent, PeerGone ═ the other relay ─► node
//! node ◄─ us ═ its connection: ◄ ForwardPacket ═ …
//! ```
//!
//! While a connection is lost, nodes there are not here: nodes are told so and look elsewhere, as they
//! would without it.

use crate::config::RegionRelay;
use crate::metrics::Metrics;
use crate::session::{End, MAX_RELAY_BODY_BYTES, Reader, Shared, write};
use crate::switch::{Link, Tenant, frame};
use crate::tls;
use bytes::BytesMut;
use proto::derp::login::NONCE_BYTES;
use proto::derp::{
    ClientInfo, FAST_START_HEADER, Frame, FrameError, LOGIN_TIMEOUT, LoginBox, Sealed, UPGRADE,
    VERSION,
};
use proto::key::NodeKey;
use rustls::pki_types::ServerName;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

/// The pause after a connection ended, doubled with each failure in a row, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// Between two questions whether the other relay is there.
const PULSE: Duration = Duration::from_secs(2);
/// It has gone without a word when it answers nothing for so long.
const SILENCE: Duration = Duration::from_secs(5);
/// A connection on which nothing is acknowledged for so long is dead.
const UNACKNOWLEDGED_MILLIS: u32 = 15_000;

/// Why there is no connection to another relay.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("it cannot be reached")]
    Unreachable(#[source] io::Error),
    #[error("it took too long")]
    Late,
    #[error("its name is no name")]
    Name(#[from] rustls::pki_types::InvalidDnsNameError),
    #[error("another relay answers there: correct its key in [region]")]
    Key,
    #[error("it takes us for a node ({0}): name this relay, too, in its [region]")]
    Stranger(String),
    #[error("the connection ended")]
    End(#[from] End),
}

/// Connects to each of these relays for as long as the tasks live. Our own key is skipped.
pub(crate) fn join(relays: Vec<RegionRelay>, shared: &Arc<Shared>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for relay in relays {
        if relay.key != shared.key() {
            tasks.spawn(keep(relay, Arc::clone(shared)));
        }
    }
    tasks
}

async fn keep(relay: RegionRelay, shared: Arc<Shared>) {
    let (mut failures, mut last) = (0_u32, String::new());
    loop {
        let link = Arc::new(Link::default());
        let mut up = false;
        let why = match connect(&relay, &shared, &link, &mut up).await {
            Ok(end) => Lost::End(end),
            Err(lost) => lost,
        };
        if up {
            Metrics::take(&shared.metrics.links, 1);
            shared.switch.forget(&link);
            failures = 0;
        }
        // Said once, however often it is tried.
        let text = why.to_string();
        if up || text != last {
            let reason = &why as &dyn std::error::Error;
            tracing::warn!(relay = %relay.key, reason, "no connection to a relay of our region");
            last = text;
        }
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures.min(16)));
        failures = failures.saturating_add(1);
        sleep(pause.min(LONGEST_PAUSE)).await;
    }
}

/// Connects, and returns why that ended. `up` is set once it stands.
async fn connect(
    relay: &RegionRelay,
    shared: &Arc<Shared>,
    link: &Arc<Link>,
    up: &mut bool,
) -> Result<End, Lost> {
    let dial = TcpStream::connect(&relay.addr);
    let tcp = timeout(LOGIN_TIMEOUT, dial).await.map_err(|_| Lost::Late)?;
    let tcp = tcp.map_err(Lost::Unreachable)?;
    // Without these a dead relay is only noticed later.
    let _ = tcp.set_nodelay(true);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&tcp, UNACKNOWLEDGED_MILLIS);
    if relay.plain {
        return carry(tcp, relay, shared, link, up).await;
    }
    let host = relay.addr.rsplit_once(':').map_or("", |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned())?;
    let tls = TlsConnector::from(Arc::new(tls::client_config(relay.certificate)));
    let stream = timeout(LOGIN_TIMEOUT, tls.connect(name, tcp)).await;
    let stream = stream.map_err(|_| Lost::Late)?.map_err(Lost::Unreachable)?;
    carry(stream, relay, shared, link, up).await
}

async fn carry<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    relay: &RegionRelay,
    shared: &Arc<Shared>,
    link: &Arc<Link>,
    up: &mut bool,
) -> Result<End, Lost> {
    let (stream, mut writer) = tokio::io::split(stream);
    let mut reader = Reader::new(stream, BytesMut::new());
    let login = login(&mut reader, &mut writer, relay, shared);
    timeout(LOGIN_TIMEOUT, login)
        .await
        .map_err(|_| Lost::Late)??;
    *up = true;
    Metrics::add(&shared.metrics.links, 1);
    tracing::info!(relay = %relay.key, "connected to a relay of our region");
    link.queue.push_control(frame(&Frame::WatchConns));
    let end = tokio::select! {
        end = listen(&mut reader, shared, link) => end,
        end = write(&link.queue, writer) => end,
        () = ask(link) => End::Silent,
    };
    Ok(end)
}

async fn login<R, W>(
    reader: &mut Reader<R>,
    writer: &mut W,
    relay: &RegionRelay,
    shared: &Shared,
) -> Result<(), Lost>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let hello = format!(
        "GET /derp HTTP/1.1\r\nHost: {}\r\nUpgrade: {UPGRADE}\r\nConnection: Upgrade\r\n\
         {FAST_START_HEADER}: 1\r\n\r\n",
        relay.addr
    );
    // It names its key all the same; the box shows that it holds the one we mean.
    let seal = LoginBox::new(&*shared.secret.agree(relay.key.0).ok_or(Lost::Key)?);
    let info = ClientInfo {
        version: VERSION,
        can_ack_pings: true,
        ..ClientInfo::default()
    };
    let json = serde_json::to_vec(&info).map_err(|error| End::Closed(error.into()))?;
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce)
        .map_err(|error| End::Closed(io::Error::other(error.to_string())))?;
    let bytes = &seal.seal(nonce, &json);
    let (key, sealed) = (NodeKey(shared.key().0), Sealed { nonce, bytes });
    let mut first = hello.into_bytes();
    Frame::ClientInfo { key, sealed }.encode(&mut first);
    let said = async {
        writer.write_all(&first).await?;
        writer.flush().await
    };
    said.await.map_err(End::Closed)?;
    loop {
        let bytes = reader.frame(MAX_RELAY_BODY_BYTES).await?;
        match split(&bytes).map_err(End::from)? {
            Frame::ServerKey(key) if key != relay.key => return Err(Lost::Key),
            Frame::ServerInfo(sealed) => {
                return match seal.open(sealed) {
                    Some(_) => Ok(()),
                    None => Err(Lost::Key),
                };
            }
            Frame::Health(why) => return Err(Lost::Stranger(why.to_owned())),
            _ => {}
        }
    }
}

/// Hears who comes and goes at the other relay.
async fn listen<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    shared: &Shared,
    link: &Arc<Link>,
) -> End {
    loop {
        let bytes = match timeout(SILENCE, reader.frame(MAX_RELAY_BODY_BYTES)).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(end)) => return end,
            Err(_) => return End::Silent,
        };
        let news = split(&bytes).and_then(|frame| match frame {
            Frame::Within {
                network,
                kind,
                body,
            } => Ok((Some(network), Frame::decode(kind, body)?)),
            frame => Ok((None, frame)),
        });
        match news {
            Ok((tenant, frame)) => hear(tenant, &frame, shared, link),
            Err(error) => return error.into(),
        }
    }
}

fn hear(tenant: Tenant, frame: &Frame<'_>, shared: &Shared, link: &Arc<Link>) {
    match frame {
        Frame::PeerPresent { peer, .. } => shared.switch.present(link, tenant, *peer),
        Frame::PeerGone { peer, .. } => shared.switch.gone(link, tenant, *peer),
        // What else a relay says to its clients.
        _ => {}
    }
}

/// Asks again and again, so that something comes while it is there.
async fn ask(link: &Link) {
    for number in 0_u64.. {
        link.queue
            .push_control(frame(&Frame::Ping(number.to_be_bytes())));
        sleep(PULSE).await;
    }
}

fn split(bytes: &[u8]) -> Result<Frame<'_>, FrameError> {
    // What the reader returns is whole.
    Ok(Frame::split(bytes)?.map_or(Frame::Unknown(0), |(frame, _)| frame))
}
