//! From HuJSON text to a [`Policy`].
//!
//! HuJSON is JSON with `//` and `/* */` comments and trailing commas. The text is parsed into a
//! tree with ranges; [`Reader`] walks it, keeps every place, and collects every fault instead of
//! stopping at the first. Field names may be written in any case (older files say `ACLs`,
//! `Users`); an unknown one is a fault, with the near miss named.

use super::diagnostic::{Code, Diagnostics, nearest};
use super::document::{Policy, Source, Span, Spanned};
use super::selector::Target;
use jsonc_parser::ast;
use jsonc_parser::common::{Range, Ranged};
use jsonc_parser::{CollectOptions, ParseOptions, ParseResult, parse_to_ast};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

mod relays;
mod sections;

pub(super) use sections::split_ports;

/// Longest policy text, in bytes. 100,000 rules of a hundred characters fit several times.
pub const MAX_TEXT_BYTES: usize = 32 << 20;

/// Reads and checks a policy.
///
/// # Errors
/// Every fault of the file, in the order of the text.
pub fn parse(text: &str) -> Result<Policy, Diagnostics> {
    let source = Source::new(text.get(..MAX_TEXT_BYTES).unwrap_or(text));
    let root = read(&source, text, &CollectOptions::default())?.value;
    let Some(root) = root else {
        let hint = "write at least `{\"acls\": []}`, which denies everything";
        let fault = source.fault(Span::default(), Code::Syntax, "the policy is empty", hint);
        return Err(fault.into());
    };
    let mut reader = Reader {
        source: &source,
        faults: Diagnostics::default(),
    };
    let policy = sections::policy(&mut reader, &root);
    let mut faults = reader.faults;
    let Some(mut policy) = policy else {
        return Err(faults);
    };
    policy.source = source;
    super::check::check(&policy, &mut faults);
    policy.ipset_addrs = super::ipset::resolve(&policy, &mut faults);
    faults.into_result(policy)
}

/// Reads HuJSON, whatever it says.
pub(super) fn read<'t>(
    source: &Source,
    text: &'t str,
    collect: &CollectOptions,
) -> Result<ParseResult<'t>, Diagnostics> {
    if text.len() > MAX_TEXT_BYTES {
        let message = format!("the policy is longer than {MAX_TEXT_BYTES} bytes");
        return Err(source
            .fault(Span::default(), Code::Syntax, message, "")
            .into());
    }
    let options = ParseOptions {
        allow_comments: true,
        allow_trailing_commas: true,
        allow_loose_object_property_names: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    parse_to_ast(text, collect, &options).map_err(|error| {
        let message = format!(
            "this is no HuJSON: {}",
            lower_first(&error.kind().to_string())
        );
        let fault = source.fault(span(error.range()), Code::Syntax, message, "");
        fault.into()
    })
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_lowercase());
    first.into_iter().chain(chars).collect()
}

fn span(range: Range) -> Span {
    Span {
        start: range.start as u32,
        end: range.end as u32,
    }
}

/// Walks the tree and collects faults.
struct Reader<'t> {
    source: &'t Source,
    faults: Diagnostics,
}

/// The fields of one object, by canonical name.
struct Fields<'a> {
    span: Span,
    values: BTreeMap<&'static str, &'a ast::Value<'a>>,
}

impl<'a> Fields<'a> {
    /// The value of a field; `null` counts as absent.
    fn get(&self, name: &str) -> Option<&'a ast::Value<'a>> {
        let value = self.values.get(name).copied()?;
        (!matches!(value, ast::Value::NullKeyword(_))).then_some(value)
    }
}

impl Reader<'_> {
    fn fault(
        &mut self,
        span: Span,
        code: Code,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        let source = self.source;
        self.faults.push(|| source.fault(span, code, message, hint));
    }

    fn wrong_type(&mut self, value: &ast::Value<'_>, what: &str, wanted: &str) {
        let message = format!("{what} must be {wanted}, not {}", kind(value));
        self.fault(span(value.range()), Code::WrongType, message, "");
    }

    /// The fields of an object of which only `known` may occur.
    fn fields<'a>(
        &mut self,
        value: &'a ast::Value<'a>,
        what: &str,
        known: &'static [&'static str],
    ) -> Option<Fields<'a>> {
        let ast::Value::Object(object) = value else {
            self.wrong_type(value, what, "an object");
            return None;
        };
        let mut values = BTreeMap::new();
        for property in &object.properties {
            let name = property.name.as_str();
            let at = span(property.name.range());
            let Some(canonical) = known.iter().find(|known| known.eq_ignore_ascii_case(name))
            else {
                let hint = nearest(name, known.iter().copied()).map_or_else(
                    || format!("the fields are {}", known.join(", ")),
                    |near| format!("write `{near}`"),
                );
                let message = format!("{what} has no field `{name}`");
                self.fault(at, Code::UnknownField, message, hint);
                continue;
            };
            if values.insert(*canonical, &property.value).is_some() {
                let message = format!("{what} has `{name}` twice");
                self.fault(at, Code::DuplicateField, message, "keep one of them");
            }
        }
        Some(Fields {
            span: span(object.range),
            values,
        })
    }

    /// The entries of an object whose keys are free names.
    fn entries<'a>(
        &mut self,
        value: &'a ast::Value<'a>,
        what: &str,
    ) -> Vec<(Spanned<String>, &'a ast::Value<'a>)> {
        let ast::Value::Object(object) = value else {
            self.wrong_type(value, what, "an object");
            return Vec::new();
        };
        let mut seen = BTreeSet::new();
        let mut out = Vec::new();
        for property in &object.properties {
            let name = property.name.as_str().to_owned();
            let at = span(property.name.range());
            if !seen.insert(name.clone()) {
                let message = format!("{what} has `{name}` twice");
                self.fault(at, Code::DuplicateField, message, "keep one of them");
            }
            out.push((
                Spanned {
                    value: name,
                    span: at,
                },
                &property.value,
            ));
        }
        out
    }

    fn items<'a>(&mut self, value: &'a ast::Value<'a>, what: &str) -> &'a [ast::Value<'a>] {
        match value {
            ast::Value::Array(array) => &array.elements,
            _ => {
                self.wrong_type(value, what, "a list");
                &[]
            }
        }
    }

    fn string(&mut self, value: &ast::Value<'_>, what: &str) -> Option<Spanned<String>> {
        match value {
            ast::Value::StringLit(text) => Some(Spanned {
                value: text.value.clone().into_owned(),
                span: span(text.range),
            }),
            _ => {
                self.wrong_type(value, what, "a text in quotes");
                None
            }
        }
    }

    fn boolean(&mut self, value: &ast::Value<'_>, what: &str) -> bool {
        match value {
            ast::Value::BooleanLit(boolean) => boolean.value,
            _ => {
                self.wrong_type(value, what, "true or false");
                false
            }
        }
    }

    /// A list of texts.
    fn strings(&mut self, value: &ast::Value<'_>, what: &str) -> Vec<Spanned<String>> {
        let mut out = Vec::new();
        let ast::Value::Array(array) = value else {
            self.wrong_type(value, what, "a list");
            return out;
        };
        for element in &array.elements {
            out.extend(self.string(element, &format!("each item of {what}")));
        }
        out
    }

    fn optional_strings(&mut self, fields: &Fields<'_>, name: &str) -> Vec<Spanned<String>> {
        let value = fields.get(name);
        value.map_or_else(Vec::new, |value| self.strings(value, &format!("`{name}`")))
    }

    /// Reads one selector.
    fn target(&mut self, text: &Spanned<String>) -> Option<Spanned<Target>> {
        match Target::parse(text.value.trim()) {
            Ok(value) => Some(Spanned {
                value,
                span: text.span,
            }),
            Err(error) => {
                self.fault(text.span, Code::BadSelector, error.message, error.hint);
                None
            }
        }
    }

    /// A list of selectors; absent is empty.
    fn targets(&mut self, fields: &Fields<'_>, name: &str) -> Vec<Spanned<Target>> {
        let texts = self.optional_strings(fields, name);
        texts.iter().filter_map(|text| self.target(text)).collect()
    }

    fn missing(&mut self, fields: &Fields<'_>, what: &str, name: &str, example: &str) {
        let opening = Span {
            start: fields.span.start,
            end: fields.span.start + 1,
        };
        let message = format!("{what} has no `{name}`");
        self.fault(
            opening,
            Code::MissingField,
            message,
            format!("add `{example}`"),
        );
    }
}

fn kind(value: &ast::Value<'_>) -> &'static str {
    match value {
        ast::Value::StringLit(_) => "a text",
        ast::Value::NumberLit(_) => "a number",
        ast::Value::BooleanLit(_) => "true or false",
        ast::Value::Object(_) => "an object",
        ast::Value::Array(_) => "a list",
        ast::Value::NullKeyword(_) => "null",
    }
}

/// The tree as plain JSON, without places.
pub(super) fn json(value: &ast::Value<'_>) -> Value {
    match value {
        ast::Value::StringLit(text) => Value::String(text.value.clone().into_owned()),
        ast::Value::NumberLit(number) => {
            serde_json::from_str(number.value).unwrap_or_else(|_| number.value.into())
        }
        ast::Value::BooleanLit(boolean) => Value::Bool(boolean.value),
        ast::Value::NullKeyword(_) => Value::Null,
        ast::Value::Array(array) => array.elements.iter().map(json).collect(),
        ast::Value::Object(object) => {
            let property = |property: &ast::ObjectProp<'_>| {
                (property.name.as_str().to_owned(), json(&property.value))
            };
            Value::Object(object.properties.iter().map(property).collect())
        }
    }
}
