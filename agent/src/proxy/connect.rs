//! CONNECT (RFC 9110, section 9.3.6): from a proxy's name to a stream that ends at somebody else.

use super::{LoginSecret, Server};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use zeroize::Zeroizing;

/// Longest wait for the addresses of the proxy's name; those of the last time are used instead.
const RESOLVE: Duration = Duration::from_secs(2);
/// Longest wait for one of its addresses to take a connection.
const DIAL: Duration = Duration::from_millis(1_500);
/// Longest wait for its answer, for which it connects to the target. With the two above it is less
/// than what callers wait for the whole way, so that it is the proxy that is named.
const ANSWER: Duration = Duration::from_secs(4);
/// Most addresses of its name that are tried.
const MAX_ADDRESSES: usize = 2;
/// Longest head of its answer.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Most headers in it.
const MAX_HEADERS: usize = 64;
/// So much of what it says is repeated to people.
const MAX_QUOTED_CHARS: usize = 80;
/// Its answers to whoever should have said who he is: the one that RFC 9110 has for proxies, and
/// the one for servers, which tinyproxy gives to a wrong password.
const UNAUTHENTICATED: [u16; 2] = [407, 401];

/// Why there is no stream through a proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The settings name none that could be used; this is why.
    #[error("{0}")]
    Setting(String),
    /// No address.
    #[error("no address is known for the proxy {0}")]
    Resolve(String),
    /// No connection to it; this is the last address tried.
    #[error("the proxy {proxy} cannot be reached: {why}")]
    Connect {
        /// `HOST:PORT`
        proxy: String,
        /// What the system said.
        why: io::Error,
    },
    /// It broke off before it answered.
    #[error("the proxy {proxy} ends the connection when asked for {target}: {why}")]
    Broken {
        /// `HOST:PORT`
        proxy: String,
        /// `HOST:PORT`
        target: String,
        /// What the system said.
        why: io::Error,
    },
    /// No answer in time.
    #[error("the proxy {proxy} does not answer when asked for {target}: can it reach it?")]
    Silent {
        /// `HOST:PORT`
        proxy: String,
        /// `HOST:PORT`
        target: String,
    },
    /// It wants to know who asks, and was not told.
    #[error(
        "the proxy {0} wants a user and password: write them into a file, and name it with \
         `LoadCredential=proxy:FILE` in the service"
    )]
    NoCredential(String),
    /// It was told, and does not take it.
    #[error(
        "the proxy {0} does not take the user and password of the service's credential `proxy`"
    )]
    WrongCredential(String),
    /// It says no.
    #[error("the proxy {proxy} refuses to connect to {target}: it answers `{answer}`")]
    Refused {
        /// `HOST:PORT`
        proxy: String,
        /// `HOST:PORT`
        target: String,
        /// Status and reason.
        answer: String,
    },
    /// What it says is no answer.
    #[error("{proxy} is no HTTP proxy: it answers `{answer}`")]
    Garbage {
        /// `HOST:PORT`
        proxy: String,
        /// How that begins.
        answer: String,
    },
    /// The head of its answer has no end.
    #[error("the proxy {0} answers without an end")]
    Endless(String),
    /// The target cannot stand in a request.
    #[error("`{0}` is no host and port")]
    Target(String),
}

impl Server {
    /// A stream to `target`.
    pub(super) async fn reach(&self, target: &str) -> Result<TcpStream, ProxyError> {
        let request = request(target, self.login.as_ref())?;
        let mut stream = self.dial().await?;
        let asked = self.ask(&mut stream, target, &request);
        timeout(ANSWER, asked)
            .await
            .map_err(|_| ProxyError::Silent {
                proxy: self.address.clone(),
                target: target.to_owned(),
            })??;
        Ok(stream)
    }

    /// A connection to the first of the proxy's addresses that gives one.
    async fn dial(&self) -> Result<TcpStream, ProxyError> {
        let mut failure = ProxyError::Resolve(self.address.clone());
        for addr in self.resolve().await {
            let connected = timeout(DIAL, TcpStream::connect(addr)).await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            let prepared = connected.and_then(|it| it.set_nodelay(true).map(|()| it));
            match prepared {
                Ok(stream) => return Ok(stream),
                Err(why) => {
                    let proxy = self.address.clone();
                    failure = ProxyError::Connect { proxy, why };
                }
            }
        }
        Err(failure)
    }

    async fn resolve(&self) -> Vec<SocketAddr> {
        if let Ok(Ok(found)) = timeout(RESOLVE, lookup_host(&self.address)).await {
            let found: Vec<SocketAddr> = found.collect();
            // One of each family first: a network may have a way out by one alone.
            let of = |v4| found.iter().filter(move |it| it.is_ipv4() == v4);
            let first = of(false).take(1).chain(of(true).take(1));
            let rest = of(false).skip(1).chain(of(true).skip(1));
            let addrs: Vec<_> = first.chain(rest).take(MAX_ADDRESSES).copied().collect();
            if !addrs.is_empty() {
                self.known.send_replace(addrs);
            }
        }
        self.known.borrow().clone()
    }

    /// Sends the request and reads the answer, and nothing of what follows it.
    async fn ask(
        &self,
        stream: &mut TcpStream,
        target: &str,
        request: &[u8],
    ) -> Result<(), ProxyError> {
        let broken = |why| ProxyError::Broken {
            proxy: self.address.clone(),
            target: target.to_owned(),
            why,
        };
        stream.write_all(request).await.map_err(broken)?;
        let mut head = Vec::with_capacity(MAX_HEAD_BYTES);
        loop {
            if head.len() >= MAX_HEAD_BYTES {
                return Err(ProxyError::Endless(self.address.clone()));
            }
            if stream.read_buf(&mut head).await.map_err(broken)? == 0 {
                return Err(broken(io::ErrorKind::UnexpectedEof.into()));
            }
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut answer = httparse::Response::new(&mut headers);
            match answer.parse(&head) {
                Ok(httparse::Status::Partial) => {}
                Ok(httparse::Status::Complete(length)) => {
                    let code = answer.code.unwrap_or_default();
                    return self.judge(target, code, &head, head.len() > length);
                }
                Err(_) => return Err(self.garbage(&head)),
            }
        }
    }

    /// What an answer means; `more` tells whether something follows it.
    fn judge(&self, target: &str, code: u16, head: &[u8], more: bool) -> Result<(), ProxyError> {
        let proxy = self.address.clone();
        match code {
            // Nobody but us may speak first in what is tunnelled.
            200..300 if more => Err(self.garbage(head)),
            200..300 => Ok(()),
            _ if UNAUTHENTICATED.contains(&code) => Err(match &self.login {
                None => ProxyError::NoCredential(proxy),
                Some(_) => ProxyError::WrongCredential(proxy),
            }),
            _ => Err(ProxyError::Refused {
                proxy,
                target: target.to_owned(),
                answer: quoted(head),
            }),
        }
    }

    fn garbage(&self, head: &[u8]) -> ProxyError {
        ProxyError::Garbage {
            proxy: self.address.clone(),
            answer: quoted(head),
        }
    }
}

fn request(target: &str, login: Option<&LoginSecret>) -> Result<Zeroizing<Vec<u8>>, ProxyError> {
    // It was read from a token or a netmap, and could say more than one line.
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ProxyError::Target(target.escape_default().to_string()));
    }
    let login = login.map(|LoginSecret(value)| ["Proxy-Authorization: Basic ", value, "\r\n"]);
    let parts = ["CONNECT ", target, " HTTP/1.1\r\nHost: ", target];
    let agent = ["\r\nUser-Agent: weir\r\n"];
    let all = || {
        let login = login.iter().flatten();
        parts.iter().chain(&agent).chain(login).chain(&["\r\n"])
    };
    // Made at its length: what it would be moved from could not be wiped.
    let length = all().map(|part| part.len()).sum();
    let mut request = Zeroizing::new(Vec::with_capacity(length));
    for part in all() {
        request.extend_from_slice(part.as_bytes());
    }
    Ok(request)
}

/// The first line of what a proxy said, as it can be shown.
fn quoted(head: &[u8]) -> String {
    let line = head.split(|byte| matches!(byte, b'\r' | b'\n')).next();
    let line = String::from_utf8_lossy(line.unwrap_or_default());
    let shown = |it: char| if it.is_control() { '?' } else { it };
    line.chars().take(MAX_QUOTED_CHARS).map(shown).collect()
}
