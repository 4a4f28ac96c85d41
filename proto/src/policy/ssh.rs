//! `ssh` rules as each node is told them.
//!
//! A rule says who may log in as which accounts. A node that is a destination gets one entry with
//! every address that the sources have. Where the accounts contain `localpart:*@domain`, what a
//! user may become depends on the user, so each user gets entries of their own; and nodes of the
//! sources that are no destinations get those of their own user. Entries that ask for a check come
//! before those that accept.
//!
//! Accounts are a map from what is asked for to what is used: `*` to `=` (as asked) stands for
//! `autogroup:nonroot`, and root, unless named, is mapped to nothing.

use super::directory::DirectoryNode;
use super::document::{SshAction, SshRule, SshUser};
use super::render::{Resolver, is_self};
use super::selector::Target;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// One entry of a node's ssh policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SshEntry {
    check: bool,
    principals: BTreeSet<IpAddr>,
    accounts: BTreeMap<String, String>,
    accept_env: Vec<String>,
}

/// The entries of one node.
pub(super) fn entries(resolver: Resolver<'_>, node: &DirectoryNode) -> Vec<SshEntry> {
    let mut out = Vec::new();
    for rule in resolver
        .policy
        .ssh
        .iter()
        .filter(|rule| rule.postures.is_empty())
    {
        rule_entries(resolver, rule, node, &mut out);
    }
    out.sort_by_key(|entry| !entry.check);
    out
}

fn rule_entries(
    resolver: Resolver<'_>,
    rule: &SshRule,
    node: &DirectoryNode,
    out: &mut Vec<SshEntry>,
) {
    let sources = Sources::of(resolver, rule);
    let with_self = rule.dsts.iter().any(|dst| is_self(&dst.value));
    if with_self && let Some(login) = node.login() {
        sources.of_user(rule, login, out);
    }
    let mut others = rule
        .dsts
        .iter()
        .filter(|dst| !is_self(&dst.value))
        .peekable();
    if others.peek().is_none() {
        return;
    }
    let localparts = rule
        .users
        .iter()
        .any(|user| matches!(user.value, SshUser::LocalPart(_)));
    if others.any(|dst| is_destination(resolver, &dst.value, node)) {
        if localparts {
            for login in sources.users.keys() {
                sources.of_user(rule, login, out);
            }
            push(rule, &sources.tagged, accounts(rule), out);
        } else {
            push(rule, &sources.all(), accounts(rule), out);
        }
    } else if localparts && node.addrs.iter().any(|addr| sources.all().contains(addr)) {
        match node.login() {
            Some(login) => sources.of_user(rule, login, out),
            None => push(
                rule,
                &node.addrs.iter().copied().collect(),
                accounts(rule),
                out,
            ),
        }
    }
}

fn is_destination(resolver: Resolver<'_>, target: &Target, node: &DirectoryNode) -> bool {
    if *target == Target::Any || resolver.names(target, node) {
        return true;
    }
    let set = resolver.set(target);
    node.addrs.iter().any(|addr| set.contains(*addr))
}

/// The nodes that a rule's sources name.
struct Sources {
    /// Addresses of each user's nodes.
    users: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Addresses of tagged nodes.
    tagged: BTreeSet<IpAddr>,
}

impl Sources {
    fn of(resolver: Resolver<'_>, rule: &SshRule) -> Self {
        let mut out = Self {
            users: BTreeMap::new(),
            tagged: BTreeSet::new(),
        };
        for node in resolver.directory.nodes.values() {
            if rule
                .srcs
                .iter()
                .any(|src| is_destination(resolver, &src.value, node))
            {
                let list = match node.login() {
                    Some(login) => out.users.entry(login.to_owned()).or_default(),
                    None => &mut out.tagged,
                };
                list.extend(&node.addrs);
            }
        }
        out
    }

    fn all(&self) -> BTreeSet<IpAddr> {
        let users = self.users.values().flatten();
        users.chain(&self.tagged).copied().collect()
    }

    /// The entries for one user's nodes: the common accounts, then the user's own.
    fn of_user(&self, rule: &SshRule, login: &str, out: &mut Vec<SshEntry>) {
        let Some(principals) = self.users.get(login) else {
            return;
        };
        push(rule, principals, accounts(rule), out);
        if let Some(own) = own_account(rule, login) {
            let map = BTreeMap::from([(own.to_owned(), own.to_owned())]);
            push(rule, principals, map, out);
        }
    }
}

fn push(
    rule: &SshRule,
    principals: &BTreeSet<IpAddr>,
    accounts: BTreeMap<String, String>,
    out: &mut Vec<SshEntry>,
) {
    if !principals.is_empty() {
        out.push(SshEntry {
            check: rule.action == SshAction::Check,
            principals: principals.clone(),
            accounts,
            accept_env: rule.accept_env.clone(),
        });
    }
}

/// The accounts that every source of the rule may use.
fn accounts(rule: &SshRule) -> BTreeMap<String, String> {
    let mut out = BTreeMap::from([("root".to_owned(), String::new())]);
    for user in &rule.users {
        match &user.value {
            SshUser::NonRoot => out.insert("*".to_owned(), "=".to_owned()),
            SshUser::Name(name) => out.insert(name.clone(), name.clone()),
            SshUser::LocalPart(_) => None,
        };
    }
    out
}

/// The account that `localpart:*@domain` gives a user: the login's part before the `@`.
pub(super) fn own_account<'l>(rule: &SshRule, login: &'l str) -> Option<&'l str> {
    let (local, domain) = login.rsplit_once('@')?;
    let fits = |user: &SshUser| match user {
        SshUser::LocalPart(wanted) => wanted.eq_ignore_ascii_case(domain),
        SshUser::NonRoot | SshUser::Name(_) => false,
    };
    rule.users
        .iter()
        .any(|user| fits(&user.value))
        .then_some(local)
}

impl SshEntry {
    /// Whether an address may log in as `account` by this entry.
    pub(super) fn lets_in(&self, addr: &IpAddr, account: &str) -> bool {
        let own = self
            .accounts
            .get(account)
            .or_else(|| self.accounts.get("*"));
        self.principals.contains(addr) && own.is_some_and(|mapped| !mapped.is_empty())
    }

    /// Whether it asks for a check first.
    pub(super) fn is_check(&self) -> bool {
        self.check
    }

    /// The entry in the hosted control plane's JSON.
    pub(super) fn to_json(&self) -> Value {
        let action = if self.check {
            json!({
                "holdAndDelegate": "https://unused/machine/ssh/action/$SRC_NODE_ID/to/\
                                    $DST_NODE_ID?local_user=$LOCAL_USER"
            })
        } else {
            json!({
                "accept": true,
                "allowAgentForwarding": true,
                "allowLocalPortForwarding": true,
                "allowRemotePortForwarding": true,
            })
        };
        let principals = self.principals.iter().map(|addr| json!({"nodeIP": addr}));
        let mut out = json!({
            "action": action,
            "principals": principals.collect::<Vec<_>>(),
            "sshUsers": self.accounts,
        });
        if !self.accept_env.is_empty() {
            out["acceptEnv"] = self.accept_env.iter().cloned().collect();
        }
        out
    }
}
