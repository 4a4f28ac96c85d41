//! The policy as a document: sections, rules and where each stands in the text.
//!
//! Every name that may be wrong carries its [`Span`], so that any later stage can point at it.
//! The document holds what was written; what it means is decided by `compile` and its siblings.

use super::addrset::AddrSet;
use super::diagnostic::{Code, Diagnostic, window};
use super::selector::{Protocols, Target};
use crate::id::RegionId;
use crate::net::{PortRange, Prefix};
use crate::netmap::Region;
use serde_json::Value;
use std::collections::BTreeMap;

/// A stretch of the policy's text, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spanned<T> {
    /// The value.
    pub value: T,
    /// Where.
    pub span: Span,
}

/// The text of a policy, with its lines found once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    text: String,
    line_starts: Vec<u32>,
}

impl Source {
    pub(super) fn new(text: &str) -> Self {
        let after_newline = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let line_starts = [0]
            .into_iter()
            .chain(after_newline.map(|(at, _)| at as u32 + 1));
        Self {
            text: text.to_owned(),
            line_starts: line_starts.collect(),
        }
    }

    /// The line of a byte, from 1.
    pub(super) fn line(&self, span: Span) -> u32 {
        self.line_starts
            .partition_point(|start| *start <= span.start) as u32
    }

    /// The text as written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// A fault at `span`.
    pub(super) fn fault(
        &self,
        span: Span,
        code: Code,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Diagnostic {
        let line = self.line(span);
        let start = self.line_starts[(line - 1) as usize] as usize;
        let next = self
            .line_starts
            .get(line as usize)
            .map_or(self.text.len(), |next| *next as usize);
        let text = self.text.get(start..next).unwrap_or_default();
        let text = text.trim_end_matches(['\n', '\r']);
        let from = (span.start as usize - start).min(text.len());
        let to = (span.end as usize)
            .saturating_sub(start)
            .clamp(from, text.len());
        let (shown, caret) = window(text, from, to);
        let before = text.as_bytes().get(..from).unwrap_or_default();
        let chars_before = before.iter().filter(|byte| **byte & 0xc0 != 0x80).count();
        Diagnostic {
            code,
            message: message.into(),
            line,
            column: chars_before as u32 + 1,
            hint: hint.into(),
            shown,
            caret,
        }
    }
}

/// A policy, read and checked. It has no implicit rule: what no entry allows is denied.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub(super) source: Source,
    /// `acls`; `None` if the file has no such section.
    pub acls: Option<Vec<Access>>,
    /// `grants`; `None` if the file has no such section.
    pub grants: Option<Vec<Access>>,
    /// `groups` by full name (`group:dev`).
    pub groups: BTreeMap<String, Spanned<Vec<Spanned<Target>>>>,
    /// `hosts` by name.
    pub hosts: BTreeMap<String, Spanned<Prefix>>,
    /// `ipsets` by full name (`ipset:lab`), `add` and `remove` not yet applied.
    pub ipsets: BTreeMap<String, Spanned<Vec<Spanned<IpsetItem>>>>,
    /// What each ipset stands for.
    pub(super) ipset_addrs: BTreeMap<String, AddrSet>,
    /// `tagOwners` by full name (`tag:web`).
    pub tag_owners: BTreeMap<String, Spanned<Vec<Spanned<Target>>>>,
    /// `autoApprovers`.
    pub auto_approvers: AutoApprovers,
    /// `nodeAttrs`.
    pub node_attrs: Vec<NodeAttr>,
    /// `postures` by full name (`posture:baseline`): the conditions as written.
    pub postures: BTreeMap<String, Spanned<Vec<Spanned<String>>>>,
    /// `defaultSrcPosture`.
    pub default_src_posture: Vec<Spanned<String>>,
    /// `ssh`.
    pub ssh: Vec<SshRule>,
    /// `tests`.
    pub tests: Vec<Test>,
    /// `sshTests`.
    pub ssh_tests: Vec<SshTest>,
    /// The network-wide options, as written.
    pub options: Options,
    /// `derpMap`: what is other than in the coordinator's configuration.
    pub relays: RelayChange,
}

/// Where an access rule was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// In `acls`.
    Acls,
    /// In `grants`.
    Grants,
}

/// One entry of `acls` or `grants`.
#[derive(Clone, Debug, PartialEq)]
pub struct Access {
    /// Which section.
    pub section: Section,
    /// Place in its section, from 0.
    pub index: u32,
    /// Line where it starts, from 1.
    pub line: u32,
    /// Where it stands.
    pub span: Span,
    /// Who.
    pub srcs: Vec<Spanned<Target>>,
    /// To whom; in `acls` with ports.
    pub dsts: Vec<Destination>,
    /// What: in `acls` the one `proto`, in `grants` the list `ip`.
    pub services: Vec<IpService>,
    /// Application capabilities that the source gets at the destination.
    pub app: BTreeMap<String, Vec<Value>>,
    /// Only through subnet routers or exit nodes with these tags.
    pub via: Vec<Spanned<Target>>,
    /// Postures that the source must have.
    pub postures: Vec<Spanned<String>>,
}

/// A destination of an access rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// To whom.
    pub target: Spanned<Target>,
    /// Ports, in `acls`; empty in `grants`, where [`Access::services`] has them.
    pub ports: Vec<PortRange>,
}

/// One item of a grant's `ip`, or an acl's `proto`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpService {
    /// Which protocols.
    pub protocols: Protocols,
    /// Which ports; empty in `acls`, where the destination has them.
    pub ports: Vec<PortRange>,
}

/// An item of an ipset.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpsetItem {
    /// These addresses too.
    Add(Target),
    /// But not these; applied after everything was added.
    Remove(Target),
}

/// `autoApprovers`: whose routes need no one's approval.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AutoApprovers {
    /// By prefix.
    pub routes: BTreeMap<Prefix, Spanned<Vec<Spanned<Target>>>>,
    /// Who may be an exit node.
    pub exit_node: Vec<Spanned<Target>>,
    /// By service name.
    pub services: BTreeMap<String, Spanned<Vec<Spanned<Target>>>>,
}

/// One entry of `nodeAttrs`.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeAttr {
    /// Where it stands.
    pub span: Span,
    /// Which nodes.
    pub targets: Vec<Spanned<Target>>,
    /// Attributes to set.
    pub attrs: Vec<Spanned<String>>,
    /// Application connectors and the like.
    pub app: BTreeMap<String, Vec<Value>>,
    /// Where addresses of these nodes are taken from.
    pub ip_pool: Vec<Spanned<Prefix>>,
}

/// What an `ssh` rule does with a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SshAction {
    /// Lets it in.
    Accept,
    /// Asks the user to log in again, at most every so often.
    Check,
}

/// One entry of `ssh`.
#[derive(Clone, Debug, PartialEq)]
pub struct SshRule {
    /// Place in its section, from 0.
    pub index: u32,
    /// Line where it starts, from 1.
    pub line: u32,
    /// Where it stands.
    pub span: Span,
    /// What to do.
    pub action: SshAction,
    /// Who.
    pub srcs: Vec<Spanned<Target>>,
    /// To whom.
    pub dsts: Vec<Spanned<Target>>,
    /// As which accounts.
    pub users: Vec<Spanned<SshUser>>,
    /// `checkPeriod` as written.
    pub check_period: Option<Spanned<String>>,
    /// Environment variables that may be set (`acceptEnv`).
    pub accept_env: Vec<String>,
    /// Where sessions are recorded.
    pub recorder: Vec<Spanned<Target>>,
    /// Whether a session without a recorder is refused.
    pub enforce_recorder: bool,
    /// Postures that the source must have.
    pub postures: Vec<Spanned<String>>,
}

/// An account of an `ssh` rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SshUser {
    /// `autogroup:nonroot`.
    NonRoot,
    /// `localpart:*@example.com`: the part of the login before the `@`, for logins of the domain.
    LocalPart(String),
    /// An account by name.
    Name(String),
}

/// One entry of `tests`.
#[derive(Clone, Debug, PartialEq)]
pub struct Test {
    /// Where it stands.
    pub span: Span,
    /// Who.
    pub src: Spanned<String>,
    /// Over which protocols.
    pub protocols: Protocols,
    /// `host:port` that must be reached.
    pub accept: Vec<Spanned<String>>,
    /// `host:port` that must not.
    pub deny: Vec<Spanned<String>>,
}

/// One entry of `sshTests`.
#[derive(Clone, Debug, PartialEq)]
pub struct SshTest {
    /// Where it stands.
    pub span: Span,
    /// Who.
    pub src: Spanned<String>,
    /// To whom.
    pub dsts: Vec<Spanned<String>>,
    /// Accounts that must be let in at once.
    pub accept: Vec<Spanned<String>>,
    /// Accounts that must be refused.
    pub deny: Vec<Spanned<String>>,
    /// Accounts that must be let in after a check.
    pub check: Vec<Spanned<String>>,
}

/// The network-wide options, as written; nothing here is enforced by the filter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Every option that the file sets, by its written name.
    pub values: BTreeMap<String, Value>,
}

/// How a network's relays differ from those that the coordinator's configuration names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayChange {
    /// Whether those of the configuration are left out.
    pub replaces: bool,
    /// Regions that are added or replaced; `None`: left out.
    pub regions: BTreeMap<RegionId, Option<Region>>,
    /// STUN servers beside the relays.
    pub stun: Vec<String>,
}

impl Policy {
    /// The text as it was written, comments and all.
    #[must_use]
    pub fn text(&self) -> &str {
        self.source.text()
    }

    /// All access rules in the order of their sections.
    pub fn access(&self) -> impl Iterator<Item = &Access> {
        let acls = self.acls.iter().flatten();
        acls.chain(self.grants.iter().flatten())
    }

    /// Whether the file says anything about access; if not, the hosted control plane would allow
    /// everything.
    #[must_use]
    pub fn says_access(&self) -> bool {
        self.acls.is_some() || self.grants.is_some()
    }

    /// What a group's members are written as.
    pub(super) fn members(&self, group: &str) -> impl Iterator<Item = &Target> {
        let members = self.groups.get(group).map(|members| &members.value);
        members.into_iter().flatten().map(|member| &member.value)
    }
}
