//! The relay: carries sealed packets between two nodes that have no direct path. It knows keys and
//! queues and nothing else: not what is in a packet, not who a key belongs to, no database.
//!
//! ```text
//!  TCP ─► server ─► tls ─► http ─► session ──► switch ──► queue of the destination ─► its session
//!                                     │ login
//!                                     ▼
//!                                   admit (permit signed by a coordinator | open)
//!  UDP ─► stun
//! ```
//!
//! | module | what it decides |
//! |---|---|
//! | [`config`] | what `serve` is told |
//! | [`tls`] | the certificate shown, and the relay's own key |
//! | [`acme`] | when an authority is asked for another certificate |
//! | [`http`] | the request that opens a stream, and the few pages beside it |
//! | [`websocket`] | the stream inside a WebSocket, for proxies |
//! | [`admit`] | who may use the relay, for which network, how long and how fast |
//! | [`session`] | one client: login, its frames, what it is sent |
//! | [`switch`] | who is here; where a packet goes. Synchronous, no socket |
//! | [`queue`] | what waits for one client, in what order, and what is dropped |
//! | [`region`] | the other relays of the region: who is reached through them |
//! | [`stun`] | tells whoever asks which address it comes from |
//! | [`metrics`] | what is counted |
//! | [`server`] | puts the above together |
//!
//! One direction: server → session → switch; a region's connection reads and writes as a session does.
#![forbid(unsafe_code)]

pub mod acme;
pub mod admit;
pub mod config;
pub mod http;
pub mod metrics;
pub mod queue;
pub mod region;
pub mod server;
pub mod session;
pub mod stun;
pub mod switch;
pub mod tls;
pub mod websocket;
