//! What a router says in XML: where its service is, and what came of a call.

use super::search::{is_path, place};
use super::{Place, Service};
use roxmltree::{Document, Node, ParsingOptions};
use std::collections::BTreeMap;
use std::io;

/// Most elements, attributes and texts of a document.
const MAX_NODES: u32 = 4_096;
/// The services that open ports, best first.
const KINDS: [&str; 3] = [
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
];

/// Why a router opened no port.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpnpError {
    /// It does not answer.
    #[error("it does not answer by UPnP")]
    Silent,
    /// It says what makes no sense, too much of it, or where somebody else is.
    #[error("its answer by UPnP makes no sense")]
    Nonsense,
    /// It does not open the port. The number is UPnP's.
    #[error("it refuses by UPnP, with error {0}")]
    Refused(u16),
    /// The connection failed.
    #[error("no connection to it for UPnP")]
    Io(#[from] io::Error),
    /// It does not speak HTTP as it should.
    #[error("no HTTP with it for UPnP")]
    Http(#[from] hyper::Error),
}

/// A document without types and entities, of a size that a router's may have.
fn parse(text: &str) -> Result<Document<'_>, UpnpError> {
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(text, options).map_err(|_| UpnpError::Nonsense)
}

fn text_of<'a>(node: &Node<'a, '_>, name: &str) -> Option<&'a str> {
    let mut children = node.children();
    let child = children.find(|child| child.tag_name().name() == name)?;
    child.text().map(str::trim)
}

/// The best of the services in a description that lies at `location`.
///
/// # Errors
/// If there is none that opens ports, on the same host.
pub(super) fn service(text: &str, location: &Place) -> Result<Service, UpnpError> {
    let document = parse(text)?;
    // UPnP 1.0 lets a description say what its paths are relative to.
    let base = text_of(&document.root_element(), "URLBase");
    let base = base.and_then(|url| place(url, *location.at.ip()));
    let base = base.as_ref().unwrap_or(location);
    let mut best: Option<(usize, Service)> = None;
    for node in document.descendants() {
        if node.tag_name().name() != "service" {
            continue;
        }
        let kind = text_of(&node, "serviceType");
        let rank = KINDS.iter().position(|it| Some(*it) == kind);
        let control = text_of(&node, "controlURL").and_then(|url| relative(url, base));
        if let (Some(rank), Some(control)) = (rank, control)
            && best.as_ref().is_none_or(|(other, _)| rank < *other)
        {
            let kind = KINDS[rank].to_owned();
            best = Some((rank, Service { control, kind }));
        }
    }
    best.map(|(_, service)| service).ok_or(UpnpError::Nonsense)
}

/// A URL as it stands in a description: whole, or beside the description itself.
fn relative(url: &str, base: &Place) -> Option<Place> {
    if url.contains("://") {
        return place(url, *base.at.ip());
    }
    let path = match url.strip_prefix('/') {
        Some(_) => url.to_owned(),
        None => {
            let (folder, _) = base.path.rsplit_once('/')?;
            format!("{folder}/{url}")
        }
    };
    is_path(&path).then_some(Place { at: base.at, path })
}

/// What a call came to: the texts of all elements, by name.
#[derive(Clone, Debug)]
pub(super) struct Said(BTreeMap<String, String>);

impl Said {
    pub(super) fn read(text: &str) -> Result<Self, UpnpError> {
        let document = parse(text)?;
        let mut texts = BTreeMap::new();
        for node in document.descendants().filter(Node::is_element) {
            let text = node.text().map(|text| text.trim().to_owned());
            texts.extend(text.map(|text| (node.tag_name().name().to_owned(), text)));
        }
        Ok(Self(texts))
    }

    /// The text of an element, as what it should be.
    pub(super) fn text<T: std::str::FromStr>(&self, name: &str) -> Result<T, UpnpError> {
        let text = self.0.get(name).ok_or(UpnpError::Nonsense)?;
        text.parse().map_err(|_| UpnpError::Nonsense)
    }
}
