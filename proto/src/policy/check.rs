//! Whether the names that a policy uses exist, and stand where they may.
//!
//! Works on the document alone; what depends on the network's users (unknown domains) is checked
//! when the policy is compiled against a directory.

use super::diagnostic::{Code, Diagnostics, nearest};
use super::directory::Directory;
use super::document::{Access, IpsetItem, Policy, Section, Span, Spanned, SshRule, SshUser};
use super::selector::{Autogroup, Target};
use crate::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};

/// Where a selector stands; decides what it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    AccessSrc,
    AccessDst,
    Via,
    GroupMember,
    Owner,
    Approver,
    NodeAttr,
    SshSrc,
    SshDst,
    Recorder,
    Ipset,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::AccessSrc => "a source",
            Self::AccessDst => "a destination",
            Self::Via => "`via`",
            Self::GroupMember => "a group",
            Self::Owner => "`tagOwners`",
            Self::Approver => "`autoApprovers`",
            Self::NodeAttr => "`nodeAttrs`",
            Self::SshSrc => "the source of an ssh rule",
            Self::SshDst => "the destination of an ssh rule",
            Self::Recorder => "`recorder`",
            Self::Ipset => "an ipset",
        }
    }

    /// What may stand here, for the hint.
    fn wants(self) -> &'static str {
        match self {
            Self::AccessSrc | Self::AccessDst => {
                "name users, groups, tags, hosts, ipsets, addresses, autogroups or `*`"
            }
            Self::Via | Self::Recorder => "name tags only (`tag:router`)",
            Self::GroupMember => "name users only (`ana@example.com`)",
            Self::Owner => {
                "name users, groups, tags, autogroup:member or a role such as \
                            autogroup:admin"
            }
            Self::Approver => "name users, groups, tags or a role such as autogroup:admin",
            Self::NodeAttr => {
                "name users, groups, tags, hosts, addresses, autogroup:member, \
                               autogroup:tagged or `*`"
            }
            Self::SshSrc => "name users, groups, tags, autogroup:member or autogroup:tagged",
            Self::SshDst => "name tags, one user, or autogroup:self",
            Self::Ipset => "name addresses, prefixes, hosts or other ipsets",
        }
    }

    fn allows(self, target: &Target) -> bool {
        use Autogroup as A;
        use Target as T;
        match (self, target) {
            (Self::Via | Self::Recorder, target) => matches!(target, T::Tag(_)),
            (Self::GroupMember, target) => matches!(target, T::User(_) | T::Domain(_)),
            (Self::Ipset, target) => matches!(target, T::Addrs(_) | T::Host(_) | T::Ipset(_)),
            (Self::AccessSrc, T::Autogroup(group)) => {
                !matches!(group, A::SelfNodes | A::Internet | A::NonRoot)
            }
            (Self::AccessDst, T::Autogroup(group)) => !matches!(group, A::DangerAll | A::NonRoot),
            (Self::AccessSrc, T::Service(_)) => false,
            (Self::AccessSrc | Self::AccessDst, _) => true,
            (Self::Owner, T::Autogroup(group)) => matches!(group, A::Member | A::Role(_)),
            (Self::Approver, T::Autogroup(group)) => {
                matches!(group, A::Member | A::Role(_) | A::Tagged)
            }
            (Self::Owner | Self::Approver, target) => {
                matches!(target, T::User(_) | T::Domain(_) | T::Group(_) | T::Tag(_))
            }
            (Self::NodeAttr, T::Autogroup(group)) => {
                matches!(group, A::Member | A::Tagged | A::Role(_))
            }
            (Self::NodeAttr, _) => true,
            (Self::SshSrc, T::Autogroup(group)) => {
                matches!(group, A::Member | A::Tagged | A::Shared | A::Role(_))
            }
            (Self::SshSrc, target) => {
                matches!(target, T::User(_) | T::Domain(_) | T::Group(_) | T::Tag(_))
            }
            (Self::SshDst, T::Autogroup(group)) => {
                matches!(group, A::SelfNodes | A::Member | A::Tagged)
            }
            (Self::SshDst, target) => matches!(target, T::User(_) | T::Tag(_)),
        }
    }
}

/// Capabilities of this domain are made by the control plane itself …
const RESERVED_CAPABILITIES: &str = "tailscale.com/";
/// … except these, which a policy may grant.
const GRANTABLE_CAPABILITIES: [&str; 6] = [
    "tailscale.com/cap/drive",
    "tailscale.com/cap/kubernetes",
    "tailscale.com/cap/relay",
    "tailscale.com/cap/secrets",
    "tailscale.com/cap/tsidp",
    "tailscale.com/cap/webui",
];

/// Adds every fault of `policy` to `faults`.
pub(super) fn check(policy: &Policy, faults: &mut Diagnostics) {
    let mut checker = Checker { policy, faults };
    for access in policy.access() {
        checker.access(access);
    }
    for (name, members) in &policy.groups {
        checker.group(name, &members.value);
    }
    for owners in policy.tag_owners.values() {
        checker.targets(&owners.value, Place::Owner);
    }
    for items in policy.ipsets.values() {
        checker.ipset(&items.value);
    }
    let approvers = &policy.auto_approvers;
    let routes = approvers.routes.values().chain(approvers.services.values());
    for list in routes.map(|list| &list.value).chain([&approvers.exit_node]) {
        checker.targets(list, Place::Approver);
    }
    for entry in &policy.node_attrs {
        checker.targets(&entry.targets, Place::NodeAttr);
    }
    for rule in &policy.ssh {
        checker.ssh(rule);
    }
    checker.postures(&policy.default_src_posture);
}

struct Checker<'p, 'f> {
    policy: &'p Policy,
    faults: &'f mut Diagnostics,
}

impl Checker<'_, '_> {
    fn fault(
        &mut self,
        span: Span,
        code: Code,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        let source = &self.policy.source;
        self.faults.push(|| source.fault(span, code, message, hint));
    }

    fn targets(&mut self, targets: &[Spanned<Target>], place: Place) {
        for target in targets {
            self.target(target, place);
        }
    }

    fn target(&mut self, target: &Spanned<Target>, place: Place) {
        if place.allows(&target.value) {
            self.exists(target);
        } else {
            let message = format!("this selector may not stand in {}", place.name());
            self.fault(target.span, Code::MisplacedSelector, message, place.wants());
        }
    }

    fn exists(&mut self, target: &Spanned<Target>) {
        let policy = self.policy;
        let span = target.span;
        match &target.value {
            Target::Group(name) => self.known("group", name, span, "groups", &policy.groups),
            Target::Tag(name) => self.known("tag", name, span, "tagOwners", &policy.tag_owners),
            Target::Host(name) => self.known("host", name, span, "hosts", &policy.hosts),
            Target::Ipset(name) => self.known("ipset", name, span, "ipsets", &policy.ipsets),
            Target::Any
            | Target::Autogroup(_)
            | Target::User(_)
            | Target::Domain(_)
            | Target::Service(_)
            | Target::Addrs(_) => {}
        }
    }

    fn known<V>(
        &mut self,
        what: &str,
        name: &str,
        span: Span,
        section: &str,
        known: &BTreeMap<String, V>,
    ) {
        if known.contains_key(name) {
            return;
        }
        let source = &self.policy.source;
        self.faults.push(|| {
            let near = nearest(name, known.keys().map(String::as_str));
            let hint = near.map_or_else(
                || format!("define it in `{section}`"),
                |near| format!("write `{near}`, or define it in `{section}`"),
            );
            let message = format!("{what} not found: `{name}`");
            source.fault(span, Code::UnknownName, message, hint)
        });
    }

    fn access(&mut self, access: &Access) {
        self.targets(&access.srcs, Place::AccessSrc);
        for dst in &access.dsts {
            self.target(&dst.target, Place::AccessDst);
            self.not_everything(&dst.target);
        }
        self.targets(&access.via, Place::Via);
        self.postures(&access.postures);
        self.self_sources(access);
        self.capabilities(access);
        for service in &access.services {
            let all = |ports: &[_]| ports.iter().all(|p| *p == crate::net::PortRange::ALL);
            let open = all(&service.ports) && access.dsts.iter().all(|dst| all(&dst.ports));
            if !service.protocols.has_ports() && !open {
                let message = "this protocol has no ports";
                self.fault(
                    access.span,
                    Code::BadProtocol,
                    message,
                    "write `*` for the ports",
                );
            }
        }
    }

    fn capabilities(&mut self, access: &Access) {
        let internet = Target::Autogroup(Autogroup::Internet);
        let beyond = access.dsts.iter().find(|dst| dst.target.value == internet);
        if let Some(dst) = beyond.filter(|_| !access.app.is_empty()) {
            let message = "cannot use app grants with autogroup:internet";
            let hint = "a capability is granted at nodes: name them";
            self.fault(dst.target.span, Code::MisplacedSelector, message, hint);
        }
        let reserved = |name: &&String| {
            name.starts_with(RESERVED_CAPABILITIES)
                && !GRANTABLE_CAPABILITIES.contains(&name.as_str())
        };
        for name in access.app.keys().filter(reserved) {
            let message = format!("capability `{name}` is reserved: no policy grants it");
            let hint = format!("these are grantable: {}", GRANTABLE_CAPABILITIES.join(", "));
            self.fault(access.span, Code::BadValue, message, hint);
        }
    }

    /// `0.0.0.0/0` as a destination is refused: it may mean two things.
    fn not_everything(&mut self, target: &Spanned<Target>) {
        let whole = [Prefix::ALL_V4, Prefix::ALL_V6];
        if let Target::Addrs(list) = &target.value
            && list.iter().any(|prefix| whole.contains(prefix))
        {
            let message = "this destination means all addresses";
            let hint = "write \"*\" for the whole network, or \"autogroup:internet\" for what lies \
                        beyond exit nodes";
            self.fault(target.span, Code::BadSelector, message, hint);
        }
    }

    /// `autogroup:self` means something only for sources that are users.
    fn self_sources(&mut self, access: &Access) {
        let is_self = |target: &Target| *target == Target::Autogroup(Autogroup::SelfNodes);
        let Some(dst) = access.dsts.iter().find(|dst| is_self(&dst.target.value)) else {
            return;
        };
        let fits = |target: &Target| match target {
            Target::User(_) | Target::Domain(_) | Target::Group(_) => true,
            Target::Autogroup(group) => matches!(group, Autogroup::Member | Autogroup::Role(_)),
            Target::Any => access.section == Section::Acls,
            Target::Tag(_)
            | Target::Host(_)
            | Target::Ipset(_)
            | Target::Service(_)
            | Target::Addrs(_) => false,
        };
        if !access.srcs.iter().all(|src| fits(&src.value)) {
            let message =
                "autogroup:self can only be used with users, groups, or supported autogroups";
            let hint = "a tag, host or address has no user whose nodes could be meant: name the \
                        sources with autogroup:member, users or groups";
            self.fault(dst.target.span, Code::MisplacedSelector, message, hint);
        }
    }

    fn group(&mut self, name: &str, members: &[Spanned<Target>]) {
        for member in members {
            if let Target::Group(inner) = &member.value {
                let message = format!("`{name}` contains `{inner}`: groups do not nest");
                let hint = format!("list the users of `{inner}` here");
                self.fault(member.span, Code::NestedGroup, message, hint);
            } else {
                self.target(member, Place::GroupMember);
            }
        }
    }

    fn ipset(&mut self, items: &[Spanned<IpsetItem>]) {
        for item in items {
            let (IpsetItem::Add(target) | IpsetItem::Remove(target)) = &item.value;
            let target = Spanned {
                value: target.clone(),
                span: item.span,
            };
            self.target(&target, Place::Ipset);
        }
    }

    fn ssh(&mut self, rule: &SshRule) {
        self.targets(&rule.srcs, Place::SshSrc);
        self.targets(&rule.dsts, Place::SshDst);
        self.targets(&rule.recorder, Place::Recorder);
        self.postures(&rule.postures);
        let tagged = |target: &Target| {
            matches!(
                target,
                Target::Tag(_) | Target::Autogroup(Autogroup::Tagged)
            )
        };
        let tagged = rule.srcs.iter().any(|src| tagged(&src.value));
        for dst in &rule.dsts {
            let (message, hint) = match &dst.value {
                Target::User(_) | Target::Autogroup(Autogroup::SelfNodes | Autogroup::Member)
                    if tagged =>
                {
                    let message = "tagged sources may not log in to users' nodes";
                    (message, "name tags or autogroup:tagged as the destination")
                }
                Target::User(_)
                    if rule.srcs.is_empty()
                        || rule.srcs.iter().any(|src| src.value != dst.value) =>
                {
                    let message = "a user as the destination needs the same user as only source";
                    (message, "write autogroup:self for everyone's own nodes")
                }
                _ => continue,
            };
            self.fault(dst.span, Code::MisplacedSelector, message, hint);
        }
    }

    fn postures(&mut self, names: &[Spanned<String>]) {
        let policy = self.policy;
        for name in names {
            self.known(
                "posture",
                &name.value,
                name.span,
                "postures",
                &policy.postures,
            );
        }
    }
}

/// Adds every fault that shows only against the network: domains without users, address pools
/// outside its prefix.
pub(super) fn check_network(policy: &Policy, directory: &Directory, faults: &mut Diagnostics) {
    let domains: BTreeSet<&str> = directory
        .users
        .iter()
        .filter_map(|user| Some(user.login.rsplit_once('@')?.1))
        .collect();
    let mut checker = Checker { policy, faults };
    let access = policy.access();
    let access = access.flat_map(|access| {
        access
            .srcs
            .iter()
            .chain(access.dsts.iter().map(|dst| &dst.target))
    });
    let ssh = policy
        .ssh
        .iter()
        .flat_map(|rule| rule.srcs.iter().chain(&rule.dsts));
    for target in access.chain(ssh) {
        if let Target::Domain(domain) = &target.value {
            checker.domain(domain, &domains, target.span);
        }
    }
    for user in policy.ssh.iter().flat_map(|rule| &rule.users) {
        if let SshUser::LocalPart(domain) = &user.value {
            checker.domain(domain, &domains, user.span);
        }
    }
    for pool in policy.node_attrs.iter().flat_map(|entry| &entry.ip_pool) {
        if !directory.v4.covers(&pool.value) {
            let message = format!("the pool {} lies outside {}", pool.value, directory.v4);
            let hint = "addresses of nodes come from the network's own prefix";
            checker.fault(pool.span, Code::BadValue, message, hint);
        }
    }
}

impl Checker<'_, '_> {
    fn domain(&mut self, domain: &str, known: &BTreeSet<&str>, span: Span) {
        let lower = domain.to_ascii_lowercase();
        if known
            .iter()
            .any(|known| known.to_ascii_lowercase() == lower)
        {
            return;
        }
        let near = nearest(domain, known.iter().copied());
        let hint = near.map_or_else(
            || "no user of this network has a login in it".to_owned(),
            |near| format!("write `{near}`"),
        );
        let message = format!("domain `{domain}` is not associated with this network");
        self.fault(span, Code::UnknownName, message, hint);
    }
}
