//! What is wrong with a policy, said as a good compiler says it.
//!
//! A [`Diagnostic`] has a place in the text, what is wrong, and what to write instead. All
//! diagnostics of one file are collected in one pass ([`Diagnostics`]); [`Diagnostics::render`]
//! prints them with the offending line and a caret. Near-miss names come from [`nearest`].

use serde::Serialize;
use std::fmt;

/// Most diagnostics that are kept for one file; the rest are only counted.
pub const MAX_DIAGNOSTICS: usize = 20;
/// Most names that a misspelt one is compared with: each comparison is quadratic in its length.
const MAX_COMPARED: usize = 10_000;
/// A source line longer than this is shown in part.
const MAX_SHOWN_BYTES: usize = 160;

/// What kind of fault it is. Stable: part of the command line's JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The text is no HuJSON, or too large.
    Syntax,
    /// A section or field that the language does not have.
    UnknownField,
    /// The same field twice.
    DuplicateField,
    /// A value of the wrong JSON type.
    WrongType,
    /// A field that must be there is not.
    MissingField,
    /// A value that the field cannot have.
    BadValue,
    /// A text that selects nothing that the language knows.
    BadSelector,
    /// A selector that exists but may not stand here.
    MisplacedSelector,
    /// A port, port list or port range that is none.
    BadPort,
    /// An unknown protocol, or ports for a protocol that has none.
    BadProtocol,
    /// A group, tag, host, ipset, posture or user that is not defined.
    UnknownName,
    /// A group that contains a group.
    NestedGroup,
    /// The policy says nothing about access.
    NoAccess,
    /// A case of `tests` failed.
    TestFailed,
    /// A case of `sshTests` failed.
    SshTestFailed,
    /// The network's description, not the policy, is wrong.
    BadNetwork,
}

impl Code {
    /// The stable name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Syntax => "syntax",
            Self::UnknownField => "unknown_field",
            Self::DuplicateField => "duplicate_field",
            Self::WrongType => "wrong_type",
            Self::MissingField => "missing_field",
            Self::BadValue => "bad_value",
            Self::BadSelector => "bad_selector",
            Self::MisplacedSelector => "misplaced_selector",
            Self::BadPort => "bad_port",
            Self::BadProtocol => "bad_protocol",
            Self::UnknownName => "unknown_name",
            Self::NestedGroup => "nested_group",
            Self::NoAccess => "no_access",
            Self::TestFailed => "test_failed",
            Self::SshTestFailed => "ssh_test_failed",
            Self::BadNetwork => "bad_network",
        }
    }
}

/// One fault and its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// What kind of fault.
    pub code: Code,
    /// What is wrong.
    pub message: String,
    /// Line, from 1; 0 when the fault has no place.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// What to write instead; empty if there is nothing better to say.
    pub hint: String,
    /// The line of the text; of a long line the part around the fault.
    #[serde(skip)]
    pub shown: String,
    /// Where in `shown` the caret starts, and how many characters it underlines.
    #[serde(skip)]
    pub caret: (u32, u32),
}

impl Diagnostic {
    /// The fault with its line and a caret; `file` is what the text is called.
    #[must_use]
    pub fn render(&self, file: &str) -> String {
        let mut out = format!("error[{}]: {}\n", self.code.as_str(), self.message);
        if self.line > 0 {
            let margin = " ".repeat(self.line.to_string().len());
            let (offset, width) = self.caret;
            let caret = " ".repeat(offset as usize) + &"^".repeat(width.max(1) as usize);
            out += &format!("{margin}--> {file}:{}:{}\n", self.line, self.column);
            out += &format!("{margin} |\n{} | {}\n", self.line, self.shown);
            out += &format!("{margin} | {caret}\n");
        }
        if !self.hint.is_empty() {
            out += &format!("  help: {}\n", self.hint);
        }
        out
    }
}

/// The part of `line` around the bytes `from..to` that is worth showing, and the caret under it.
pub(super) fn window(line: &str, from: usize, to: usize) -> (String, (u32, u32)) {
    let start = floor_char(line, from.saturating_sub(MAX_SHOWN_BYTES / 2));
    let start = if line.len() <= MAX_SHOWN_BYTES {
        0
    } else {
        start
    };
    let end = floor_char(line, (start + MAX_SHOWN_BYTES).min(line.len()));
    let chars = |from: usize, to: usize| {
        let part = line.get(floor_char(line, from)..floor_char(line, to));
        part.unwrap_or_default().chars().count() as u32
    };
    let shown = line.get(start..end).unwrap_or_default().chars();
    let shown = shown
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    (shown, (chars(start, from), chars(from, to.min(end)).max(1)))
}

/// The last boundary between characters at or before `at`.
fn floor_char(text: &str, at: usize) -> usize {
    (0..=at.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(0)
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}: ", self.line, self.column)?;
        }
        f.write_str(&self.message)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

/// All faults of one policy, in the order of the text; never empty when used as an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Diagnostics {
    /// The faults, at most [`MAX_DIAGNOSTICS`].
    pub items: Vec<Diagnostic>,
    /// How many more there are.
    pub more: usize,
}

impl Diagnostics {
    /// Adds a fault. It is made only if there is room for it: making one costs the length of its
    /// line, and a hostile text can have as many faults as bytes.
    pub(super) fn push(&mut self, make: impl FnOnce() -> Diagnostic) {
        if self.items.len() < MAX_DIAGNOSTICS {
            self.items.push(make());
        } else {
            self.more += 1;
        }
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// All faults with their lines and carets; `file` is what the text is called.
    #[must_use]
    pub fn render(&self, file: &str) -> String {
        let mut out: Vec<String> = self.items.iter().map(|item| item.render(file)).collect();
        if self.more > 0 {
            out.push(format!("and {} more\n", self.more));
        }
        out.join("\n")
    }

    /// `value` if nothing is wrong, otherwise the faults in the order of the text.
    pub(super) fn into_result<T>(mut self, value: T) -> Result<T, Self> {
        if self.is_empty() {
            return Ok(value);
        }
        self.items.sort_by_key(|item| (item.line, item.column));
        Err(self)
    }
}

impl From<Diagnostic> for Diagnostics {
    fn from(item: Diagnostic) -> Self {
        Self {
            items: vec![item],
            more: 0,
        }
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render("policy"))
    }
}

impl std::error::Error for Diagnostics {}

/// The known name that `name` was probably meant to be.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (name.chars().count() / 3).clamp(1, 3);
    let near_length = |candidate: &&str| candidate.len().abs_diff(name.len()) <= 4 * limit;
    known
        .into_iter()
        .take(MAX_COMPARED)
        .filter(near_length)
        .map(|candidate| (distance(name, candidate), candidate))
        .filter(|(edits, _)| *edits <= limit)
        .min()
        .map(|(_, candidate)| candidate)
}

/// How many insertions, deletions and replacements lead from one text to the other
/// (Levenshtein). Only for names: quadratic, so texts beyond 64 characters count as far apart.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.to_lowercase().chars().collect();
    let b: Vec<char> = b.to_lowercase().chars().collect();
    if a.len().max(b.len()) > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_miss_is_found_and_a_stranger_is_not() {
        let known = ["group:dev", "group:ops", "tag:web"];
        assert_eq!(nearest("group:dve", known), Some("group:dev"));
        assert_eq!(nearest("tag:wbe", known), Some("tag:web"));
        assert_eq!(nearest("host:printer", known), None);
    }

    #[test]
    fn the_caret_stands_under_the_fault() {
        let fault = Diagnostic {
            code: Code::UnknownName,
            message: "tag `tag:wbe` is not defined".to_owned(),
            line: 12,
            column: 4,
            hint: "write `tag:web`".to_owned(),
            shown: "  [\"tag:wbe\"]".to_owned(),
            caret: (3, 9),
        };
        assert_eq!(
            fault.render("p.hujson"),
            "error[unknown_name]: tag `tag:wbe` is not defined\n  --> p.hujson:12:4\n   |\n\
             12 |   [\"tag:wbe\"]\n   |    ^^^^^^^^^\n  help: write `tag:web`\n"
        );
    }
}
