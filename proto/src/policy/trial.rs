//! `tests` and `sshTests`: the policy's own assertions, run before it may be set.
//!
//! A case of `tests` names one source, and destinations as `host:port` with one host and one port.
//! It passes if every address of the source reaches every address of each `accept` (and none of
//! any `deny`), over TCP or UDP unless `proto` says otherwise. A case that asserts nothing, or
//! whose names stand for nothing, fails: a test that cannot fail is no test.
//!
//! A case of `sshTests` asks, of every node of its destinations, whether the source gets in as an
//! account: `accept` by any rule, `check` by a rule that checks, `deny` by none.

use super::addrset::AddrSet;
use super::check::check_network;
use super::diagnostic::{Code, Diagnostic, Diagnostics};
use super::directory::{Directory, DirectoryNode};
use super::document::{Policy, Span, Spanned, SshTest, Test};
use super::explain::{Explainer, Explanation, Flow};
use super::render::{Resolver, is_self};
use super::selector::{Autogroup, Protocols, Target, parse_ports};
use super::ssh;
use super::syntax::split_ports;
use crate::id::NodeId;
use crate::net::{Prefix, Protocol};
use crate::netmap::Owner;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Most connections that one case may ask about: sources times destinations.
const MAX_ASKED: usize = 200_000;

/// Checks what must hold before `policy` may govern the network in `directory`: names that only
/// the network knows, and every case of the policy. How many cases there were.
///
/// # Errors
/// Unknown domains and pools, and the cases that failed, each at its place; a failed case names
/// the rule that decided.
pub fn check(policy: &Policy, directory: &Directory) -> Result<usize, Diagnostics> {
    let mut faults = Diagnostics::default();
    check_network(policy, directory, &mut faults);
    let directory = populated(policy, directory);
    let trial = Trial {
        resolver: Resolver {
            policy,
            directory: &directory,
        },
        explainer: Explainer::new(policy, &directory),
    };
    for test in &policy.tests {
        trial.test(test, &mut faults);
    }
    for test in &policy.ssh_tests {
        trial.ssh_test(test, &mut faults);
    }
    faults.into_result(policy.tests.len() + policy.ssh_tests.len())
}

/// The network with a node for every user, and every tag, that has none. A case speaks of the
/// policy, not of who has joined so far: it must hold on the day the first such node joins.
fn populated(policy: &Policy, directory: &Directory) -> Directory {
    let mut out = directory.clone();
    if policy.tests.is_empty() && policy.ssh_tests.is_empty() {
        return out;
    }
    let users: BTreeSet<&str> = directory
        .nodes
        .values()
        .filter_map(DirectoryNode::login)
        .collect();
    let tags: BTreeSet<&String> = directory
        .nodes
        .values()
        .flat_map(DirectoryNode::tags)
        .collect();
    let users = directory
        .users
        .iter()
        .filter(|user| !users.contains(user.login.as_str()));
    let users = users.map(|user| Owner::User(user.login.clone()));
    let tags = policy.tag_owners.keys().filter(|tag| !tags.contains(tag));
    let tags = tags.map(|tag| Owner::Tags(BTreeSet::from([tag.clone()])));
    let mut id = u64::MAX;
    let taken = directory
        .nodes
        .values()
        .flat_map(|node| node.addrs.iter().copied());
    let mut taken: BTreeSet<IpAddr> = taken.collect();
    for owner in users.chain(tags) {
        let addrs = [
            free(directory.v4, &mut taken),
            free(directory.v6, &mut taken),
        ];
        let node = DirectoryNode {
            name: format!("a node of {}", owner_name(&owner)),
            owner,
            addrs: addrs.into_iter().flatten().collect(),
            routes: BTreeSet::new(),
            advertised: BTreeSet::new(),
        };
        out.nodes.insert(NodeId(id), node);
        id -= 1;
    }
    out
}

fn owner_name(owner: &Owner) -> String {
    match owner {
        Owner::User(login) => login.clone(),
        Owner::Tags(tags) => tags.iter().cloned().collect::<Vec<_>>().join(","),
    }
}

/// The highest address of the prefix that nobody has; it is taken from then on.
fn free(prefix: Prefix, taken: &mut BTreeSet<IpAddr>) -> Option<IpAddr> {
    let last = AddrSet::of([&prefix]).ranges().last()?.1;
    let down = |addr: IpAddr| match addr {
        IpAddr::V4(v4) => Some(IpAddr::from(v4.to_bits().checked_sub(1)?.to_be_bytes())),
        IpAddr::V6(v6) => Some(IpAddr::from(v6.to_bits().checked_sub(1)?.to_be_bytes())),
    };
    let mut candidates = std::iter::successors(Some(last), |addr| down(*addr));
    let free = candidates.find(|addr| !taken.contains(addr) || !prefix.contains(*addr))?;
    (prefix.contains(free) && taken.insert(free)).then_some(free)
}

struct Trial<'p> {
    resolver: Resolver<'p>,
    explainer: Explainer<'p>,
}

impl Trial<'_> {
    fn failed(&self, at: &Spanned<String>, code: Code, message: String) -> Diagnostic {
        let hint = "change the rules, or the test if it asks for the wrong thing";
        let message = format!("test failed: {message}");
        let source = &self.resolver.policy.source;
        source.fault(at.span, code, message, hint)
    }

    fn test(&self, test: &Test, faults: &mut Diagnostics) {
        if let Err(message) = self.shape(test) {
            let at = opening(test.span);
            faults.push(|| self.failed(&at, Code::TestFailed, message));
            return;
        }
        let src = match self.source(&test.src.value) {
            Ok(src) => src,
            Err(message) => {
                faults.push(|| self.failed(&test.src, Code::TestFailed, message));
                return;
            }
        };
        let cases = test.accept.iter().map(|dst| (dst, true));
        for (dst, wanted) in cases.chain(test.deny.iter().map(|dst| (dst, false))) {
            if let Err(message) = self.destination(test, &src, &dst.value, wanted) {
                faults.push(|| self.failed(dst, Code::TestFailed, message));
            }
        }
    }

    fn shape(&self, test: &Test) -> Result<(), String> {
        if test.src.value.trim().is_empty() {
            return Err("the case has no `src`".to_owned());
        }
        if test.accept.is_empty() && test.deny.is_empty() {
            return Err("the case asserts nothing: it has neither `accept` nor `deny`".to_owned());
        }
        if test.protocols.has_ports() {
            Ok(())
        } else {
            Err("`proto` must be tcp, udp or sctp in a test".to_owned())
        }
    }

    /// Reads a selector of a case and finds the addresses that it stands for.
    fn source(&self, text: &str) -> Result<Vec<IpAddr>, String> {
        let target = self.known(text)?;
        let addrs = self.addrs(&target, None);
        if addrs.is_empty() {
            return Err(format!("`{text}` stands for no address"));
        }
        Ok(addrs)
    }

    fn known(&self, text: &str) -> Result<Target, String> {
        let target = Target::parse(text.trim()).map_err(|error| error.message)?;
        let policy = self.resolver.policy;
        let known = match &target {
            Target::Group(name) => policy.groups.contains_key(name),
            Target::Tag(name) => policy.tag_owners.contains_key(name),
            Target::Host(name) => policy.hosts.contains_key(name),
            Target::Ipset(name) => policy.ipsets.contains_key(name),
            Target::User(login) => {
                let mut users = self.resolver.directory.users.iter();
                users.any(|user| user.login == *login)
            }
            Target::Any
            | Target::Autogroup(_)
            | Target::Domain(_)
            | Target::Service(_)
            | Target::Addrs(_) => true,
        };
        if known {
            Ok(target)
        } else {
            Err(format!("`{text}` is not defined"))
        }
    }

    /// The addresses of a selector: of nodes by owner, otherwise single addresses as written.
    /// `autogroup:self` needs the node that asks.
    fn addrs(&self, target: &Target, asking: Option<&DirectoryNode>) -> Vec<IpAddr> {
        let directory = self.resolver.directory;
        if is_self(target) {
            let login = asking.and_then(DirectoryNode::login);
            let same = directory
                .nodes
                .values()
                .filter(|node| login.is_some() && node.login() == login);
            return same.flat_map(|node| node.addrs.iter().copied()).collect();
        }
        if let Some(nodes) = self.resolver.nodes(target) {
            return nodes.flat_map(|node| node.addrs.iter().copied()).collect();
        }
        if *target == Target::Any {
            return directory
                .nodes
                .values()
                .flat_map(|node| node.addrs.iter().copied())
                .collect();
        }
        let prefixes = self.resolver.set(target).prefixes();
        prefixes.iter().map(Prefix::addr).collect()
    }

    fn destination(
        &self,
        test: &Test,
        src: &[IpAddr],
        text: &str,
        wanted: bool,
    ) -> Result<(), String> {
        let (host, port) = split_ports(text).ok_or_else(|| format!("`{text}` has no port"))?;
        let port = match parse_ports(port).as_deref() {
            Ok([ports]) if ports.first() == ports.last() => ports.first(),
            _ => return Err(format!("`{text}` must name one port")),
        };
        let target = self.single_host(&host)?;
        let dsts = if is_self(&target) {
            Vec::new()
        } else {
            self.addrs(&target, None)
        };
        if src.len().saturating_mul(dsts.len()) > MAX_ASKED {
            return Err(format!(
                "`{text}` asks about more than {MAX_ASKED} connections"
            ));
        }
        let mut asked = false;
        for src in src {
            let own = is_self(&target).then(|| self.addrs(&target, self.owner(src)));
            for dst in own.as_ref().unwrap_or(&dsts) {
                if src.is_ipv4() != dst.is_ipv4() {
                    continue;
                }
                let answer = self.ask(test, *src, *dst, port);
                if answer.allowed != wanted {
                    return Err(disagreement(*src, text, wanted, &answer));
                }
                asked = true;
            }
        }
        if !asked {
            return Err(format!(
                "`{text}` stands for no address that the source could ask for"
            ));
        }
        Ok(())
    }

    fn owner(&self, addr: &IpAddr) -> Option<&DirectoryNode> {
        let mut nodes = self.resolver.directory.nodes.values();
        nodes.find(|node| node.addrs.contains(addr))
    }

    /// A destination of a test is one host: no network, and nothing beyond exit nodes.
    fn single_host(&self, text: &str) -> Result<Target, String> {
        let target = self.known(text)?;
        let wide = match &target {
            Target::Addrs(list) => {
                text.contains('/') || list.iter().any(|prefix| !prefix.is_host())
            }
            Target::Host(name) => self
                .resolver
                .policy
                .hosts
                .get(name)
                .is_some_and(|host| !host.value.is_host()),
            Target::Autogroup(group) => *group == Autogroup::Internet,
            Target::Any
            | Target::User(_)
            | Target::Domain(_)
            | Target::Group(_)
            | Target::Tag(_)
            | Target::Ipset(_)
            | Target::Service(_) => false,
        };
        if wide {
            return Err(format!(
                "`{text}` is no single host; a test asks for one connection"
            ));
        }
        Ok(target)
    }

    /// Allowed if any of the protocols of the case is.
    fn ask(&self, test: &Test, src: IpAddr, dst: IpAddr, port: u16) -> Explanation {
        let ask = |protocol| {
            self.explainer.explain(&Flow {
                src,
                dst,
                protocol,
                port,
            })
        };
        match test.protocols {
            Protocols::One(protocol) => ask(protocol),
            Protocols::Usual => {
                let tcp = ask(Protocol::TCP);
                if tcp.allowed { tcp } else { ask(Protocol::UDP) }
            }
        }
    }

    fn ssh_test(&self, test: &SshTest, faults: &mut Diagnostics) {
        if let Err(message) = self.ssh_shape(test) {
            let at = opening(test.span);
            faults.push(|| self.failed(&at, Code::SshTestFailed, message));
            return;
        }
        let src = match self.source(&test.src.value) {
            Ok(src) => src,
            Err(message) => {
                faults.push(|| self.failed(&test.src, Code::SshTestFailed, message));
                return;
            }
        };
        for dst in &test.dsts {
            let result = self.ssh_nodes(&src, &dst.value);
            let outcome = result.map(|nodes| {
                for node in nodes {
                    self.ssh_accounts(test, &src, node, faults);
                }
            });
            if let Err(message) = outcome {
                faults.push(|| self.failed(dst, Code::SshTestFailed, message));
            }
        }
    }

    fn ssh_shape(&self, test: &SshTest) -> Result<(), String> {
        if test.src.value.trim().is_empty() {
            return Err("the case has no `src`".to_owned());
        }
        if test.dsts.is_empty() {
            return Err("the case has no `dst`".to_owned());
        }
        if test.accept.is_empty() && test.deny.is_empty() && test.check.is_empty() {
            return Err("the case asserts nothing: add `accept`, `check` or `deny`".to_owned());
        }
        Ok(())
    }

    /// The nodes of an ssh destination.
    fn ssh_nodes(&self, src: &[IpAddr], text: &str) -> Result<Vec<&DirectoryNode>, String> {
        let target = self.single_host(text)?;
        let directory = self.resolver.directory;
        let asking = src.first().and_then(|addr| self.owner(addr));
        let addrs = self.addrs(&target, asking);
        let nodes = directory.nodes.values();
        let named = nodes.filter(|node| node.addrs.iter().any(|addr| addrs.contains(addr)));
        let named: Vec<&DirectoryNode> = named.collect();
        if named.is_empty() {
            return Err(format!("`{text}` stands for no node"));
        }
        Ok(named)
    }

    fn ssh_accounts(
        &self,
        test: &SshTest,
        src: &[IpAddr],
        node: &DirectoryNode,
        faults: &mut Diagnostics,
    ) {
        let entries = ssh::entries(self.resolver, node);
        let lets_in = |addr: &IpAddr, account: &str, check: bool| {
            let mut fitting = entries.iter().filter(|entry| !check || entry.is_check());
            fitting.any(|entry| entry.lets_in(addr, account))
        };
        let all = |account: &str, check| src.iter().all(|addr| lets_in(addr, account, check));
        let any = |account: &str| src.iter().any(|addr| lets_in(addr, account, false));
        let mut fail = |at: &Spanned<String>, what: &str| {
            let message = format!(
                "{} as `{}` on {}: {what}",
                test.src.value, at.value, node.name
            );
            faults.push(|| self.failed(at, Code::SshTestFailed, message));
        };
        for account in test
            .accept
            .iter()
            .filter(|account| !all(account.value.trim(), false))
        {
            fail(account, "should be let in, but no rule does");
        }
        for account in test
            .check
            .iter()
            .filter(|account| !all(account.value.trim(), true))
        {
            fail(
                account,
                "should be let in after a check, but no such rule does",
            );
        }
        for account in test.deny.iter().filter(|account| any(account.value.trim())) {
            fail(account, "should be refused, but a rule lets it in");
        }
    }
}

/// The opening brace of a case, for faults of the whole of it.
fn opening(span: Span) -> Spanned<String> {
    Spanned {
        value: String::new(),
        span: Span {
            start: span.start,
            end: span.start + 1,
        },
    }
}

fn disagreement(src: IpAddr, text: &str, wanted: bool, answer: &Explanation) -> String {
    let name = answer.src_node.as_deref().unwrap_or("an address");
    let verdict = if wanted { "allowed" } else { "denied" };
    format!(
        "{name} ({src}) to {text} should be {verdict}, but is {}",
        answer.sentences()
    )
}
