//! The network as policy sees it: its prefixes, users and nodes.

use super::selector::Role;
use crate::id::NodeId;
use crate::net::Prefix;
use crate::netmap::Owner;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Users and nodes of one network.
#[derive(Clone, Debug)]
pub struct Directory {
    /// Nodes' IPv4 addresses come from here; `*` as a source covers it.
    pub v4: Prefix,
    /// Nodes' IPv6 addresses come from here; `*` as a source covers it.
    pub v6: Prefix,
    /// The users, oldest first, so that labels keep their numbers when one is added.
    pub users: Vec<DirectoryUser>,
    /// The nodes.
    pub nodes: BTreeMap<NodeId, DirectoryNode>,
}

/// A user, as policy sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryUser {
    /// Login, `name@domain`.
    pub login: String,
    /// Roles in the network.
    pub roles: BTreeSet<Role>,
}

/// A node, as policy sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryNode {
    /// Its name in the network.
    pub name: String,
    /// Whose it is.
    pub owner: Owner,
    /// Its addresses, at most one of each family.
    pub addrs: Vec<IpAddr>,
    /// Routes that it advertised and that were approved, exit routes included.
    pub routes: BTreeSet<Prefix>,
    /// All routes that it advertised.
    pub advertised: BTreeSet<Prefix>,
}

impl DirectoryNode {
    /// Approved routes other than the default routes of an exit node.
    pub(super) fn subnet_routes(&self) -> impl Iterator<Item = &Prefix> {
        self.routes.iter().filter(|route| route.len() > 0)
    }

    /// Whether it may carry traffic to the internet.
    pub(super) fn is_exit(&self) -> bool {
        self.routes.iter().any(|route| route.len() == 0)
    }

    /// The login of its user; a tagged node has none.
    pub(super) fn login(&self) -> Option<&str> {
        match &self.owner {
            Owner::User(login) => Some(login),
            Owner::Tags(_) => None,
        }
    }

    /// Its tags.
    pub(super) fn tags(&self) -> impl Iterator<Item = &String> {
        let tags = match &self.owner {
            Owner::User(_) => None,
            Owner::Tags(tags) => Some(tags),
        };
        tags.into_iter().flatten()
    }
}
