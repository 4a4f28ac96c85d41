//! The policy: the document that people write, and what it means.
//!
//! A policy is HuJSON in the language that Tailscale and Headscale users write; `proto/docs/policy.md`
//! has the whole of it. Its way through this module:
//!
//! ```text
//! text ──parse──► Policy ──Compiled::new(directory)──► Compiled ──► filter, labels, peers of a node
//!        syntax   (checked,                            compile      (what the kernel enforces)
//!        check     no implicit rule)                ──render──► the hosted control plane's form
//! ```
//!
//! Rules only allow and their order means nothing. There is no default: a policy without rules,
//! like no policy at all, denies everything, and what `*` stands for is written into the compiled
//! filter as explicit prefixes. A file that says nothing about access is read as the hosted
//! control plane reads it by `render`, and refused by [`check_write`].
//!
//! Nodes are named by label wherever the policy names users, groups, tags or autogroups, so a node
//! that joins changes no other node's filter. What is no node (hosts, prefixes, ranges, ipsets) is
//! named by prefix. Nothing is ever expanded into addresses: a /8 costs as much as a /32.
//!
//! | module | what it decides |
//! |---|---|
//! | `diagnostic` | how faults are said |
//! | `document` | what a policy consists of |
//! | `selector` | whom a policy can name |
//! | `syntax` | text → document, all faults in one pass |
//! | `check` | names exist and stand where they may |
//! | `ipset` | what each ipset stands for |
//! | `directory` | the network's users and nodes, as policy sees them |
//! | `compile` | document + directory → filters, labels, visibility |
//! | `compile::diff` | who may reach more or less after a change |
//! | `explain` | which rule allows a connection, or which came closest |
//! | `format` | the one way to write a policy |
//! | `trial` | the policy's own `tests` and `sshTests` |
//! | `render`, `ssh`, `attrs`, `offline` | the hosted control plane's form of all that |

mod addrset;
mod attrs;
mod check;
mod compile;
mod diagnostic;
mod directory;
mod document;
mod explain;
mod format;
mod ipset;
mod offline;
mod render;
mod selector;
mod ssh;
mod syntax;
mod trial;

pub use compile::{Change, Compiled, Diff, Effect, Endpoint, Pairs, TooLarge, diff};
pub use diagnostic::{Code, Diagnostic, Diagnostics, MAX_DIAGNOSTICS};
pub use directory::{Directory, DirectoryNode, DirectoryUser};
pub use document::{
    Access, AutoApprovers, Destination, IpService, IpsetItem, NodeAttr, Options, Policy,
    RelayChange, Section, Span, Spanned, SshAction, SshRule, SshTest, SshUser, Test,
};
pub use explain::{Explainer, Explanation, Flow, NearMiss, RuleMatch, RulePlace, explain};
pub use format::format;
pub use offline::{OfflineError, check_settings, compile_offline, read_topology};
pub use selector::{Autogroup, Protocols, Role, Target};
pub use syntax::{MAX_TEXT_BYTES, parse};
pub use trial::check as run_tests;

/// Whether a policy may become a network's policy.
///
/// # Errors
/// A policy with neither `acls` nor `grants` says nothing about access. Elsewhere that means
/// "allow everything"; here nobody gets everything by leaving something out.
pub fn check_write(policy: &Policy) -> Result<(), Diagnostic> {
    if policy.says_access() {
        return Ok(());
    }
    let hint = "write `\"acls\": []` to deny everything, or \
                `\"acls\": [{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]}]` to \
                allow everything";
    let message = "the policy says nothing about access: it has neither `acls` nor `grants`";
    Err(policy
        .source
        .fault(Span::default(), Code::NoAccess, message, hint))
}
