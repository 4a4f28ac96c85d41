//! The request that opens a stream, and the few pages beside it.
//!
//! One request a connection, its head alone, read by hand: a client in a hurry gets no answer to
//! its upgrade but the first frame (`Derp-Fast-Start`), which no HTTP server offers.

use crate::websocket::PROTOCOL;
use bytes::BytesMut;
use proto::derp::{FAST_START_HEADER, UPGRADE, VERSION};
use proto::key::RelayKey;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// Longest head of a request.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Most headers that are looked at.
const MAX_HEADERS: usize = 64;
/// What is read at once.
const READ_BYTES: usize = 1 << 10;
/// Longest challenge that a search for captive portals may give.
const MAX_CHALLENGE: usize = 64;
const CHALLENGE_HEADER: &str = "X-Tailscale-Challenge";
const RESPONSE_HEADER: &str = "X-Tailscale-Response";

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The stream; `fast`: without an answer before the first frame.
    Derp {
        /// Whether the client waits for no answer.
        fast: bool,
    },
    /// The stream inside a WebSocket.
    WebSocket {
        /// Proves to the client that the request was understood (RFC 6455 4.2.2).
        accept: String,
    },
    /// The stream's path, without asking for the stream.
    NotUpgraded,
    /// To measure how far the relay is.
    Probe,
    /// To know whether something in between answers in our name.
    Portal {
        /// Sent back, if it is a plain word.
        challenge: Option<String>,
    },
    /// Whether the relay is well.
    Health,
    /// The counters.
    Metrics,
    /// Anything else.
    NotFound,
    /// What is no request.
    Bad,
}

/// Reads a request's head. `buffer` keeps what follows it.
///
/// # Errors
/// If the connection ends or breaks before the head is whole.
pub async fn read<S>(stream: &mut S, buffer: &mut BytesMut) -> io::Result<Request>
where
    S: AsyncRead + Unpin,
{
    loop {
        buffer.reserve(READ_BYTES);
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some((request, length)) = parse(buffer) {
            let _ = buffer.split_to(length);
            return Ok(request);
        }
        if buffer.len() >= MAX_HEAD_BYTES {
            return Ok(Request::Bad);
        }
    }
}

/// The request and the length of its head; `None` when more must come first.
fn parse(bytes: &[u8]) -> Option<(Request, usize)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return None,
        Err(_) => return Some((Request::Bad, bytes.len())),
    };
    let header = |name: &str| {
        let mut headers = request.headers.iter();
        let header = headers.find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    let path = path(request.path.unwrap_or_default());
    let method = request.method.unwrap_or_default();
    // Some clients open the stream with POST.
    if !matches!(method, "GET" | "HEAD") && (method, path) != ("POST", "/derp") {
        return Some((Request::Bad, length));
    }
    let wanted = match path {
        "/derp" => {
            let upgrade = header("Upgrade").unwrap_or_default();
            let offers = |list: &str| list.split(',').any(|one| one.trim() == PROTOCOL);
            if upgrade.eq_ignore_ascii_case(UPGRADE) {
                let fast = header(FAST_START_HEADER) == Some("1");
                Request::Derp { fast }
            } else if upgrade.eq_ignore_ascii_case("websocket")
                && header("Sec-WebSocket-Version") == Some("13")
                && header("Sec-WebSocket-Protocol").is_some_and(offers)
                && let Some(key) = header("Sec-WebSocket-Key")
            {
                let accept = derive_accept_key(key.as_bytes());
                Request::WebSocket { accept }
            } else {
                Request::NotUpgraded
            }
        }
        "/derp/probe" | "/derp/latency-check" => Request::Probe,
        "/generate_204" => Request::Portal {
            challenge: header(CHALLENGE_HEADER)
                .filter(|word| is_plain(word))
                .map(str::to_owned),
        },
        "/health" => Request::Health,
        "/metrics" => Request::Metrics,
        _ => Request::NotFound,
    };
    Some((wanted, length))
}

/// The path of a request's target, which may be a whole URL (RFC 9112 3.2.2: "A server MUST accept
/// the absolute-form in requests").
fn path(target: &str) -> &str {
    let url = ["http://", "https://"]
        .iter()
        .find_map(|scheme| target.strip_prefix(scheme));
    let path = match url {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => target,
    };
    path.split('?').next().unwrap_or_default()
}

/// Nothing that could end a header or a page.
fn is_plain(word: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !word.is_empty() && word.len() <= MAX_CHALLENGE && word.bytes().all(plain)
}

/// The answer that opens the stream.
#[must_use]
pub fn switching(key: RelayKey) -> String {
    let key = data_encoding::HEXLOWER.encode(&key.0);
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: {UPGRADE}\r\nConnection: Upgrade\r\n\
         Derp-Version: {VERSION}\r\nDerp-Public-Key: {key}\r\n\r\n"
    )
}

/// The answer that opens a WebSocket.
#[must_use]
pub fn switching_to_websocket(accept: &str) -> String {
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n"
    )
}

/// A page, after which the connection ends.
#[must_use]
pub fn page(status: &str, kind: &str, text: &str) -> String {
    let length = text.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n{text}"
    )
}

/// The answer to a measurement, from whatever page it was started.
#[must_use]
pub fn probed() -> String {
    "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nContent-Length: 0\r\n\
     Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        .to_owned()
}

/// The answer to a search for captive portals.
#[must_use]
pub fn no_content(challenge: Option<&str>) -> String {
    let proof = challenge
        .map(|word| format!("{RESPONSE_HEADER}: response {word}\r\n"))
        .unwrap_or_default();
    format!(
        "HTTP/1.1 204 No Content\r\n{proof}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(head: &str, expected: Option<Request>) {
        let bytes = head.as_bytes();
        assert_eq!(parse(bytes).map(|(request, _)| request), expected, "{head}");
    }

    #[test]
    fn requests_are_told_apart() {
        let derp = |fast| Some(Request::Derp { fast });
        check("GET /derp HTTP/1.1\r\nUpgrade: derp\r\n\r\n", derp(false));
        let fast = "GET /derp HTTP/1.1\r\nupgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n";
        check(fast, derp(true));
        check("GET /derp HTTP/1.1\r\nUpgrade: derp\r\n", None);
        check("GET /derp HTTP/1.1\r\n\r\n", Some(Request::NotUpgraded));
        check("GET /derp/probe?x=1 HTTP/1.1\r\n\r\n", Some(Request::Probe));
        check("GET / HTTP/1.1\r\n\r\n", Some(Request::NotFound));
        let by_url = "POST https://relay:443/derp HTTP/1.1\r\nupgrade: DERP\r\n\r\n";
        check(by_url, derp(false));
        // The example of RFC 6455 1.3.
        let socket = |protocol: &str| {
            format!(
                "GET /derp HTTP/1.1\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                 Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
            )
        };
        let accept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_owned();
        check(&socket("chat, derp"), Some(Request::WebSocket { accept }));
        check(&socket("chat"), Some(Request::NotUpgraded));
        check("GET http://relay HTTP/1.1\r\n\r\n", Some(Request::NotFound));
        check("POST /health HTTP/1.1\r\n\r\n", Some(Request::Bad));
        check("\x16\x03\x01 no text at all", Some(Request::Bad));
    }

    #[test]
    fn a_challenge_is_sent_back_only_if_it_is_a_plain_word() {
        let portal = |challenge: Option<&str>| {
            Some(Request::Portal {
                challenge: challenge.map(str::to_owned),
            })
        };
        let ask = |word: &str| {
            format!("GET /generate_204 HTTP/1.1\r\nX-Tailscale-Challenge: {word}\r\n\r\n")
        };
        check(&ask("ts_1.example"), portal(Some("ts_1.example")));
        check(&ask("<b>"), portal(None));
        check(&ask(&"a".repeat(65)), portal(None));
        assert!(no_content(Some("x")).contains("X-Tailscale-Response: response x\r\n"));
    }

    #[tokio::test]
    async fn what_follows_the_head_is_kept_and_an_endless_head_is_not() {
        let mut buffer = BytesMut::new();
        let mut stream = &b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\n\r\nframes"[..];
        let request = read(&mut stream, &mut buffer).await.unwrap();
        assert_eq!(request, Request::Derp { fast: false });
        assert_eq!(&buffer[..], b"frames");
        let endless = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(2 * MAX_HEAD_BYTES));
        let request = read(&mut endless.as_bytes(), &mut BytesMut::new()).await;
        assert_eq!(request.unwrap(), Request::Bad);
    }
}
