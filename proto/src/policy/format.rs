//! The one way to write a policy: same words, same comments, same order, other whitespace.
//!
//! Formatting works on tokens, not on meaning: every string and number is copied as it stands, so
//! that nothing can change but whitespace, the comma behind a last item, and where a comment stands
//! between the same two values. The rules:
//!
//! - two spaces a level, one line an item, a comma behind each;
//! - a list or an object stays on one line if it was written on one, holds no comment and ends
//!   before column 100; the outermost one never does;
//! - a comment keeps its line: behind a value, or on its own above the next; one between a name and
//!   its value moves above both;
//! - at most one empty line, and none at the edges of a list or object.

use super::diagnostic::{Code, Diagnostics};
use super::document::{Source, Span};
use super::syntax::{MAX_TEXT_BYTES, read};
use jsonc_parser::tokens::{Token, TokenAndRange};
use jsonc_parser::{CollectOptions, CommentCollectionStrategy};

/// Last column of what is put on one line.
const MAX_COLUMNS: usize = 100;
/// Columns of one level.
const INDENT: usize = 2;

/// `text` in its one form. It must be HuJSON; whether it is a good policy is not asked.
///
/// # Errors
/// Where it is no HuJSON.
pub fn format(text: &str) -> Result<String, Diagnostics> {
    let source = Source::new(text.get(..MAX_TEXT_BYTES).unwrap_or(text));
    let collect = CollectOptions {
        comments: CommentCollectionStrategy::AsTokens,
        tokens: true,
    };
    let read = read(&source, text, &collect)?;
    let tokens = read.tokens.unwrap_or_default();
    if read.value.is_none() {
        let hint = "write at least `{\"acls\": []}`, which denies everything";
        let fault = source.fault(Span::default(), Code::Syntax, "the policy is empty", hint);
        return Err(fault.into());
    }
    let mut reader = Reader {
        tokens: pieces(text, &tokens),
        at: 0,
    };
    let (root, end) = reader.root();
    let mut writer = Writer {
        out: String::with_capacity(text.len()),
    };
    writer.item(&root, 0, true, "");
    writer.comments(&end, 0, &mut false);
    Ok(writer.out)
}

/// A token as it was written, and how many lines it stands below the end of the one before.
struct Piece<'t> {
    text: &'t str,
    kind: Kind,
    newlines: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Open,
    Close,
    Comma,
    Colon,
    Value,
    Comment,
}

fn pieces<'t>(text: &'t str, tokens: &[TokenAndRange<'_>]) -> Vec<Piece<'t>> {
    let mut end = 0;
    let piece = |token: &TokenAndRange<'_>| {
        let between = text.get(end..token.range.start).unwrap_or_default();
        end = token.range.end;
        Piece {
            text: text
                .get(token.range.start..token.range.end)
                .unwrap_or_default(),
            newlines: between.matches('\n').count(),
            kind: match token.token {
                Token::OpenBrace | Token::OpenBracket => Kind::Open,
                Token::CloseBrace | Token::CloseBracket => Kind::Close,
                Token::Comma => Kind::Comma,
                Token::Colon => Kind::Colon,
                Token::CommentLine(_) | Token::CommentBlock(_) => Kind::Comment,
                Token::String(_)
                | Token::Word(_)
                | Token::Boolean(_)
                | Token::Number(_)
                | Token::Null => Kind::Value,
            },
        }
    };
    tokens.iter().map(piece).collect()
}

/// A comment, with an empty line above it or not.
struct Comment {
    text: String,
    spaced: bool,
}

impl Comment {
    /// Whether nothing can stand behind it on its line.
    fn ends_line(&self) -> bool {
        self.text.starts_with("//") || self.text.contains('\n')
    }
}

/// A value, with its name if it is a field, and the comments that belong to it.
struct Item<'t> {
    above: Vec<Comment>,
    /// Whether an empty line stands before it, below the comments.
    spaced: bool,
    name: Option<&'t str>,
    value: Value<'t>,
    behind: Vec<Comment>,
}

enum Value<'t> {
    Plain(&'t str),
    Group(Group<'t>),
}

/// A list or an object.
struct Group<'t> {
    open: &'t str,
    close: &'t str,
    /// Written on more than one line.
    broken: bool,
    items: Vec<Item<'t>>,
    /// Comments below the last item.
    below: Vec<Comment>,
}

/// Tokens → items. The text was parsed before, so that the order of tokens is legal.
struct Reader<'t> {
    tokens: Vec<Piece<'t>>,
    at: usize,
}

impl<'t> Reader<'t> {
    /// The whole file, and the comments behind it.
    fn root(&mut self) -> (Item<'t>, Vec<Comment>) {
        let above = self.comments();
        let (mut item, mut below) = self.item(above);
        // There is nothing that an outermost comma could stand behind.
        below.extend(self.comments());
        if let Value::Group(group) = &mut item.value {
            group.broken = true;
        }
        (item, below)
    }

    /// One item and the comma behind it, if there is one; and comments that belong below it.
    fn item(&mut self, mut above: Vec<Comment>) -> (Item<'t>, Vec<Comment>) {
        let mut spaced = self.newlines() > 1;
        let mut name = None;
        if self.is_name() {
            name = self.next();
            let mut moved = self.comments();
            self.skip(Kind::Colon);
            moved.extend(self.comments());
            if let Some(first) = moved.first_mut() {
                first.spaced = std::mem::take(&mut spaced);
            }
            above.extend(moved);
        }
        let value = self.value();
        let mut behind = Vec::new();
        while self.kind(0) == Some(Kind::Comment) && self.newlines() == 0 {
            behind.extend(self.comment());
        }
        let mut below = self.comments();
        if self.skip(Kind::Comma) && self.rest_of_line_is_comments() {
            while self.kind(0) == Some(Kind::Comment) && self.newlines() == 0 {
                let comment = self.comment();
                if below.is_empty() {
                    behind.extend(comment);
                } else {
                    below.extend(comment);
                }
            }
        }
        let last = behind.iter().position(Comment::ends_line);
        let over = behind.split_off(last.map_or(behind.len(), |last| last + 1));
        below.splice(0..0, over);
        let item = Item {
            above,
            spaced,
            name,
            value,
            behind,
        };
        (item, below)
    }

    fn value(&mut self) -> Value<'t> {
        let opens = self.kind(0) == Some(Kind::Open);
        let Some(open) = self.next() else {
            return Value::Plain("");
        };
        if !opens {
            return Value::Plain(open);
        }
        let broken = self.newlines() > 0 && self.kind(0) != Some(Kind::Close);
        let (mut items, mut below) = (Vec::new(), Vec::new());
        loop {
            below.extend(self.comments());
            if matches!(self.kind(0), None | Some(Kind::Close)) {
                break;
            }
            let (item, rest) = self.item(below);
            items.push(item);
            below = rest;
        }
        let close = self.next().unwrap_or_default();
        Value::Group(Group {
            open,
            close,
            broken,
            items,
            below,
        })
    }

    fn comments(&mut self) -> Vec<Comment> {
        std::iter::from_fn(|| self.comment()).collect()
    }

    fn comment(&mut self) -> Option<Comment> {
        let spaced = self.newlines() > 1;
        (self.kind(0) == Some(Kind::Comment)).then_some(())?;
        let text = self.next()?.replace("\r\n", "\n");
        Some(Comment {
            text: text.trim_end().to_owned(),
            spaced,
        })
    }

    /// Whether the next token names a field.
    fn is_name(&self) -> bool {
        let mut kinds = (1..).map_while(|ahead| self.kind(ahead));
        self.kind(0) == Some(Kind::Value)
            && kinds.find(|kind| *kind != Kind::Comment) == Some(Kind::Colon)
    }

    /// Whether no value follows on this line.
    fn rest_of_line_is_comments(&self) -> bool {
        let rest = self.tokens.get(self.at..).unwrap_or_default();
        let next = rest
            .iter()
            .find(|piece| piece.kind != Kind::Comment || piece.newlines > 0);
        next.is_none_or(|piece| piece.newlines > 0 || piece.kind == Kind::Close)
    }

    fn kind(&self, ahead: usize) -> Option<Kind> {
        self.tokens.get(self.at + ahead).map(|piece| piece.kind)
    }

    fn newlines(&self) -> usize {
        self.tokens.get(self.at).map_or(0, |piece| piece.newlines)
    }

    fn skip(&mut self, kind: Kind) -> bool {
        let found = self.kind(0) == Some(kind);
        self.at += usize::from(found);
        found
    }

    fn next(&mut self) -> Option<&'t str> {
        let text = self.tokens.get(self.at).map(|piece| piece.text);
        self.at += 1;
        text
    }
}

/// Items → text.
struct Writer {
    out: String,
}

impl Writer {
    /// One item on lines of its own, with `comma` behind it. `edge`: nothing stands before it in
    /// its group.
    fn item(&mut self, item: &Item<'_>, level: usize, edge: bool, comma: &str) {
        let mut edge = edge;
        self.comments(&item.above, level, &mut edge);
        self.gap(item.spaced, &mut edge);
        self.indent(level);
        let mut column = level * INDENT;
        if let Some(name) = item.name {
            self.out.push_str(name);
            self.out.push_str(": ");
            column += name.chars().count() + 2;
        }
        match &item.value {
            Value::Plain(text) => self.out.push_str(text),
            Value::Group(group) => {
                let room = MAX_COLUMNS.saturating_sub(column + comma.len());
                let mut line = String::new();
                if group.on_one_line(room, &mut line) {
                    self.out.push_str(&line);
                } else {
                    self.group(group, level);
                }
            }
        }
        self.out.push_str(comma);
        for comment in &item.behind {
            self.out.push(' ');
            self.out.push_str(&comment.text);
        }
        self.out.push('\n');
    }

    fn group(&mut self, group: &Group<'_>, level: usize) {
        self.out.push_str(group.open);
        self.out.push('\n');
        let mut edge = true;
        for item in &group.items {
            self.item(item, level + 1, edge, ",");
            edge = false;
        }
        self.comments(&group.below, level + 1, &mut edge);
        self.indent(level);
        self.out.push_str(group.close);
    }

    /// Comments on lines of their own.
    fn comments(&mut self, comments: &[Comment], level: usize, edge: &mut bool) {
        for comment in comments {
            self.gap(comment.spaced, edge);
            self.indent(level);
            self.out.push_str(&comment.text);
            self.out.push('\n');
        }
    }

    fn gap(&mut self, spaced: bool, edge: &mut bool) {
        if spaced && !*edge {
            self.out.push('\n');
        }
        *edge = false;
    }

    fn indent(&mut self, level: usize) {
        self.out.extend(std::iter::repeat_n(' ', level * INDENT));
    }
}

impl Group<'_> {
    /// Writes it into `out` on one line of at most `room` columns; `false` if it needs more, or
    /// lines. What is in `out` then means nothing.
    fn on_one_line(&self, room: usize, out: &mut String) -> bool {
        if (self.broken && !self.items.is_empty()) || !self.below.is_empty() {
            return false;
        }
        out.push_str(self.open);
        for (number, item) in self.items.iter().enumerate() {
            if !item.above.is_empty() || !item.behind.is_empty() {
                return false;
            }
            out.push_str(if number == 0 { "" } else { ", " });
            if let Some(name) = item.name {
                out.push_str(name);
                out.push_str(": ");
            }
            let fits = match &item.value {
                Value::Plain(text) => {
                    out.push_str(text);
                    true
                }
                Value::Group(group) => group.on_one_line(room, out),
            };
            // Counted in characters only near the end: the text may be as long as a file.
            if !fits || (out.len() > room && out.chars().count() > room) {
                return false;
            }
        }
        out.push_str(self.close);
        out.chars().count() <= room
    }
}

#[cfg(test)]
mod tests;
