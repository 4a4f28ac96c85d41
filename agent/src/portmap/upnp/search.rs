//! SSDP (UPnP Device Architecture 1.1, 1.3): asking who is a router here, and believing the gateway.
//!
//! The question goes to the group of the LAN that the gateway is in, by the interface that has our
//! address there, and to the gateway alone: a firewall of this host that lets in only answers takes
//! the answer to that.

use super::document::UpnpError;
use super::{MAX_HEAD_BYTES, Place};
use engine::Router;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::timeout;

/// Where devices listen.
pub(super) const PORT: u16 = 1900;
/// The group that they listen to.
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 255, 250);
/// How often it is asked: datagrams get lost.
const QUESTIONS: usize = 2;
/// How long answers are waited for each time; devices may take the second that `MX` gives them.
const WAIT: Duration = Duration::from_millis(1_500);
/// Answers that are looked at each time: a LAN may be full of those who answer.
const MAX_ANSWERS: usize = 64;
/// Longest path of a document.
const MAX_PATH_BYTES: usize = 512;

/// Where the gateway has its description.
///
/// # Errors
/// If it does not answer.
pub(super) async fn location(router: Router, port: u16) -> Result<Place, UpnpError> {
    let socket = open(router.own)?;
    for _ in 0..QUESTIONS {
        ask(&socket, router.gateway, port).await?;
        if let Ok(found) = timeout(WAIT, listen(&socket, router.gateway)).await {
            return found;
        }
    }
    Err(UpnpError::Silent)
}

/// A socket whose packets leave by the interface that has this address.
fn open(own: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.set_multicast_if_v4(&own)?;
    // The gateway is one hop away, and it is nobody else's business.
    socket.set_multicast_ttl_v4(1)?;
    socket.set_multicast_loop_v4(false)?;
    socket.bind(&SocketAddr::from((own, 0)).into())?;
    UdpSocket::from_std(socket.into())
}

async fn ask(socket: &UdpSocket, gateway: Ipv4Addr, port: u16) -> Result<(), UpnpError> {
    let mut sent = Err(UpnpError::Silent);
    for to in [gateway, GROUP] {
        let question = format!(
            "M-SEARCH * HTTP/1.1\r\nHOST: {to}:{port}\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\n\
             ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n"
        );
        // One of the two ways is enough; a host may have no route for groups.
        match socket.send_to(question.as_bytes(), (to, port)).await {
            Ok(_) => sent = Ok(()),
            Err(error) if sent.is_err() => sent = Err(error.into()),
            Err(_) => {}
        }
    }
    sent
}

/// The first answer of the gateway that makes sense.
async fn listen(socket: &UdpSocket, gateway: Ipv4Addr) -> Result<Place, UpnpError> {
    let mut buffer = [0; 1_500];
    for _ in 0..MAX_ANSWERS {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // Nobody listens there: the group may answer all the same.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error.into()),
        };
        if from.ip() != IpAddr::V4(gateway) {
            continue;
        }
        if let Some(place) = parse(&buffer[..length], gateway) {
            return Ok(place);
        }
    }
    Err(UpnpError::Nonsense)
}

/// Where an answer says that the description is: on the gateway itself.
fn parse(answer: &[u8], gateway: Ipv4Addr) -> Option<Place> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut reply = httparse::Response::new(&mut headers);
    let parsed = reply.parse(answer).ok()?;
    if parsed.is_partial() || reply.code != Some(200) || answer.len() > MAX_HEAD_BYTES {
        return None;
    }
    let is_location = |it: &&httparse::Header| it.name.eq_ignore_ascii_case("location");
    let location = reply.headers.iter().find(is_location)?.value;
    place(std::str::from_utf8(location).ok()?.trim(), gateway)
}

/// Reads a URL, which must lead to the gateway by its number.
pub(super) fn place(url: &str, gateway: Ipv4Addr) -> Option<Place> {
    let rest = url.strip_prefix("http://")?;
    let (host, path) = match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, "/"),
    };
    let at: SocketAddrV4 = match host.contains(':') {
        true => host.parse().ok()?,
        false => SocketAddrV4::new(host.parse().ok()?, 80),
    };
    (*at.ip() == gateway && at.port() != 0 && is_path(path)).then(|| Place {
        at,
        path: path.to_owned(),
    })
}

/// Whether this may stand in a request as it is.
pub(super) fn is_path(path: &str) -> bool {
    let visible = |byte: u8| byte.is_ascii_graphic() && byte != b'#';
    path.starts_with('/') && path.len() <= MAX_PATH_BYTES && path.bytes().all(visible)
}
