//! UPnP: a router of homes is searched for ([`search`]), says in a document where its service is
//! ([`document`]), and opens and closes ports by calls of that (UPnP IGD, WANIPConnection:1).
//!
//! A LAN is full of machines that nobody watches, and UPnP believes whoever answers. So one machine
//! is believed, the gateway of our own default route: answers of others are left unread, every URL
//! must lead to its address, and a redirection is not followed. What it says is bounded in bytes,
//! elements and time, XML is read without document types and entities, and nothing of it but a
//! path, an address and a number is used.

mod document;
mod search;

pub(super) use document::UpnpError;

use bytes::Bytes;
use document::Said;
use engine::Router;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::NonZeroU16;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest answer, in bytes: descriptions of routers have 2 to 20 kB.
const MAX_BYTES: usize = 64 << 10;
/// Longest head of an answer, in bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Longest wait for one answer: routers think slowly.
const ANSWER: Duration = Duration::from_secs(5);
/// Other ports outside that are asked for where ours is another machine's.
const OTHER_PORTS: usize = 3;

/// The router leaves no port open for a time, only for ever.
const ONLY_PERMANENT: u16 = 725;
/// The port outside is another machine's.
const CONFLICT: u16 = 718;

/// A place on the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    at: SocketAddrV4,
    path: String,
}

/// The service of a router that opens ports.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Service {
    control: Place,
    /// Its whole name, as the router says it.
    kind: String,
}

/// A port that the router holds open for us.
#[derive(Clone, Debug)]
pub(super) struct Mapping {
    service: Service,
    router: Router,
    inside: NonZeroU16,
    outside: NonZeroU16,
    /// For how long, in seconds; 0 for ever.
    lease: u32,
}

impl Mapping {
    /// Opens a port: the same as ours if it is free.
    ///
    /// # Errors
    /// If the router does not speak UPnP, or does not open it.
    pub(super) async fn new(
        router: Router,
        port: NonZeroU16,
        lease: Duration,
    ) -> Result<(Self, SocketAddr), UpnpError> {
        let service = find(router, search::PORT).await?;
        Self::of(service, router, port, lease).await
    }

    async fn of(
        service: Service,
        router: Router,
        port: NonZeroU16,
        lease: Duration,
    ) -> Result<(Self, SocketAddr), UpnpError> {
        let mut mapping = Self {
            service,
            router,
            inside: port,
            outside: port,
            lease: u32::try_from(lease.as_secs()).unwrap_or(u32::MAX),
        };
        let mut others = OTHER_PORTS;
        let outside = loop {
            match mapping.renew().await {
                Ok(outside) => break outside,
                Err(UpnpError::Refused(ONLY_PERMANENT)) if mapping.lease > 0 => mapping.lease = 0,
                Err(UpnpError::Refused(CONFLICT)) if others > 0 => {
                    others -= 1;
                    mapping.outside = any_port()?;
                }
                Err(error) => return Err(error),
            }
        };
        Ok((mapping, outside))
    }

    /// Opens it again, and asks under which address. Returns that and the port.
    ///
    /// # Errors
    /// If the router does not say so.
    pub(super) async fn renew(&self) -> Result<SocketAddr, UpnpError> {
        let arguments = format!(
            "<NewRemoteHost></NewRemoteHost><NewExternalPort>{}</NewExternalPort>\
             <NewProtocol>UDP</NewProtocol><NewInternalPort>{}</NewInternalPort>\
             <NewInternalClient>{}</NewInternalClient><NewEnabled>1</NewEnabled>\
             <NewPortMappingDescription>weir</NewPortMappingDescription>\
             <NewLeaseDuration>{}</NewLeaseDuration>",
            self.outside, self.inside, self.router.own, self.lease
        );
        self.call("AddPortMapping", &arguments).await?;
        let said = self.call("GetExternalIPAddress", "").await?;
        let outside: Ipv4Addr = said.text("NewExternalIPAddress")?;
        if outside.is_unspecified() || outside.is_loopback() || outside.is_multicast() {
            return Err(UpnpError::Nonsense);
        }
        Ok(SocketAddr::from((outside, self.outside.get())))
    }

    /// Closes it.
    ///
    /// # Errors
    /// If the router does not say so.
    pub(super) async fn close(self) -> Result<(), UpnpError> {
        let arguments = format!(
            "<NewRemoteHost></NewRemoteHost><NewExternalPort>{}</NewExternalPort>\
             <NewProtocol>UDP</NewProtocol>",
            self.outside
        );
        self.call("DeletePortMapping", &arguments).await.map(drop)
    }

    /// The router that was asked.
    pub(super) fn gateway(&self) -> Ipv4Addr {
        self.router.gateway
    }

    async fn call(&self, action: &str, arguments: &str) -> Result<Said, UpnpError> {
        let Service { control, kind } = &self.service;
        let body = format!(
            "<?xml version=\"1.0\"?>\r\n<s:Envelope \
             xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
             s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body>\
             <u:{action} xmlns:u=\"{kind}\">{arguments}</u:{action}></s:Body></s:Envelope>\r\n"
        );
        let request = Request::builder()
            .method(Method::POST)
            .header(header::CONTENT_TYPE, "text/xml; charset=\"utf-8\"")
            .header("SOAPAction", format!("\"{kind}#{action}\""));
        let (status, text) = exchange(request, control, body).await?;
        let said = Said::read(&text)?;
        match status {
            StatusCode::OK => Ok(said),
            _ => Err(said
                .text("errorCode")
                .map_or(UpnpError::Nonsense, UpnpError::Refused)),
        }
    }
}

/// Asks the gateway where its service is. `port`: where it listens for searches.
async fn find(router: Router, port: u16) -> Result<Service, UpnpError> {
    let location = search::location(router, port).await?;
    let (status, text) = exchange(Request::get("/"), &location, String::new()).await?;
    if status != StatusCode::OK {
        return Err(UpnpError::Nonsense);
    }
    document::service(&text, &location)
}

/// One question and its answer, on a connection of its own.
async fn exchange(
    request: hyper::http::request::Builder,
    place: &Place,
    body: String,
) -> Result<(StatusCode, String), UpnpError> {
    let request = request
        .uri(&place.path)
        .header(header::HOST, place.at.to_string())
        .header(header::CONNECTION, "close")
        .body(Full::new(Bytes::from(body)))
        .map_err(|_| UpnpError::Nonsense)?;
    let answer = async {
        let stream = TcpStream::connect(place.at).await?;
        let mut http = http1::Builder::new();
        http.max_buf_size(MAX_HEAD_BYTES);
        let (mut send, connection) = http.handshake(TokioIo::new(stream)).await?;
        let reply = async {
            let reply = send.send_request(request).await?;
            let status = reply.status();
            let body = Limited::new(reply.into_body(), MAX_BYTES).collect().await;
            let bytes = body.map_err(|_| UpnpError::Nonsense)?.to_bytes();
            let text = std::str::from_utf8(&bytes).map_err(|_| UpnpError::Nonsense)?;
            Ok((status, text.to_owned()))
        };
        tokio::pin!(reply);
        tokio::select! {
            answered = &mut reply => answered,
            ended = connection => {
                ended?;
                // All that came is with the one who reads.
                reply.await
            }
        }
    };
    let answered = timeout(ANSWER, answer).await;
    answered.map_err(|_| UpnpError::Silent)?
}

/// A port above those that services have, below those that systems give out.
fn any_port() -> Result<NonZeroU16, UpnpError> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(|_| UpnpError::Nonsense)?;
    let port = 20_000 + u16::from_be_bytes(bytes) % 10_000;
    NonZeroU16::new(port).ok_or(UpnpError::Nonsense)
}

#[cfg(test)]
mod tests;
