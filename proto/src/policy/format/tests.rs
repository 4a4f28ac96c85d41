use super::*;
use proptest::prelude::*;

#[track_caller]
fn check(text: &str, formatted: &str) {
    let once = format(text).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(once, formatted);
    assert_eq!(format(&once).unwrap(), formatted, "a second time");
}

#[test]
fn the_example_is_already_in_the_one_form() {
    let example = include_str!("../../../../packaging/examples/small-office.hujson");
    check(example, example);
}

#[test]
fn whitespace_commas_and_lines() {
    check(
        "{\"acls\":[{\"action\":\"accept\" , \"src\":[ \"*\" ],\"dst\":[\"*:*\",],},],\r\n\r\n\r\n\r\n\
         \"hosts\": {},\n\"groups\":{\n\n\"group:dev\":[\"ana@example.com\"]\n\n}}",
        "{\n\
        \x20 \"acls\": [{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]}],\n\
         \n\
        \x20 \"hosts\": {},\n\
        \x20 \"groups\": {\n\
        \x20   \"group:dev\": [\"ana@example.com\"],\n\
        \x20 },\n\
         }\n",
    );
}

#[test]
fn what_does_not_fit_on_a_line_gets_more() {
    let users: Vec<String> = (0..8)
        .map(|number| format!("\"user-{number}@example.com\""))
        .collect();
    let lines: String = users
        .iter()
        .map(|user| format!("      {user},\n"))
        .collect();
    check(
        &format!("{{\"groups\": {{\"group:dev\": [{}]}}}}", users.join(",")),
        &format!("{{\n  \"groups\": {{\n    \"group:dev\": [\n{lines}    ],\n  }},\n}}\n"),
    );
}

#[test]
fn comments_keep_their_line_and_their_order() {
    check(
        "// file\n\n/* of\n   mine */ {// first\n\
         \"a\" /* name */ : // value\n 1 // one\n, // comma\n\n\n\
         // above\n\"b\": [1, /* two */ 2 /* behind */, 3],\n\
         \"c\": [ // opens\n], \"d\": 4 // four\n// below\n} // end\n\n// last",
        "// file\n\n\
         /* of\n   mine */\n\
         {\n\
        \x20 // first\n\
        \x20 /* name */\n\
        \x20 // value\n\
        \x20 \"a\": 1, // one\n\
        \x20 // comma\n\
         \n\
        \x20 // above\n\
        \x20 \"b\": [\n\
        \x20   1,\n\
        \x20   /* two */\n\
        \x20   2, /* behind */\n\
        \x20   3,\n\
        \x20 ],\n\
        \x20 \"c\": [\n\
        \x20   // opens\n\
        \x20 ],\n\
        \x20 \"d\": 4, // four\n\
        \x20 // below\n\
         } // end\n\
         \n\
         // last\n",
    );
}

#[test]
fn what_is_no_hujson_is_refused_at_its_place() {
    let faults = format("{\n  \"acls\": [,]\n}").unwrap_err();
    assert_eq!(faults.items[0].line, 2);
    assert!(format("// nothing\n").is_err());
}

/// Tokens of a random value, in order.
fn value() -> impl Strategy<Value = Vec<String>> {
    let plain = prop::sample::select(vec![
        "1",
        "-2.5e3",
        "true",
        "null",
        "\"a\"",
        "\"é // no comment\"",
        "\"/* \\\" */\"",
        "\"\"",
        "\"a rather long text that does not leave much room for others on its line\"",
    ]);
    let leaf = plain.prop_map(|text| vec![text.to_owned()]);
    leaf.prop_recursive(4, 40, 5, |inner| {
        let list = (
            prop::collection::vec(inner, 0..5),
            any::<bool>(),
            any::<bool>(),
        );
        list.prop_map(|(items, object, comma)| {
            let mut out = vec![if object { "{" } else { "[" }.to_owned()];
            let last = items.len().saturating_sub(1);
            for (number, item) in items.into_iter().enumerate() {
                if object {
                    out.extend([format!("\"k{number}\""), ":".to_owned()]);
                }
                out.extend(item);
                if number != last || comma {
                    out.push(",".to_owned());
                }
            }
            out.push(if object { "}" } else { "]" }.to_owned());
            out
        })
    })
}

/// Between two tokens: spaces, lines and comments. Each comment differs from all others.
const BETWEEN: [&str; 14] = [
    "",
    "",
    "",
    "",
    " ",
    " ",
    "\n",
    "\n",
    "\r\n\n\t\n",
    "// #\n",
    " /* # */ ",
    "\n// #\n\n\n",
    "/* #\n  # */",
    "// # \r\n/*#*/",
];

/// What a formatter must keep: everything but whitespace and commas; and the comments.
fn kept(text: &str) -> (Vec<String>, Vec<String>) {
    let collect = CollectOptions {
        comments: CommentCollectionStrategy::AsTokens,
        tokens: true,
    };
    let read = read(&Source::new(text), text, &collect).unwrap();
    let tokens = read.tokens.unwrap();
    let (mut words, mut comments) = (Vec::new(), Vec::new());
    for piece in pieces(text, &tokens) {
        match piece.kind {
            Kind::Comment => comments.push(piece.text.replace("\r\n", "\n").trim_end().to_owned()),
            Kind::Comma => {}
            Kind::Open | Kind::Close | Kind::Colon | Kind::Value => {
                words.push(piece.text.to_owned())
            }
        }
    }
    (words, comments)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn nothing_but_whitespace_and_last_commas_changes_and_twice_is_once(
        tokens in value(),
        between in prop::collection::vec(0..BETWEEN.len(), 1..60),
    ) {
        let mut text = String::new();
        for (number, token) in tokens.iter().chain([&String::new()]).enumerate() {
            let trivia = BETWEEN[between[number % between.len()]];
            text += &trivia.replace('#', &number.to_string());
            text += token;
        }
        let once = format(&text).unwrap();
        prop_assert_eq!(kept(&text), kept(&once), "{} became {}", text, once);
        prop_assert_eq!(&format(&once).unwrap(), &once, "from {}", text);
        let value = |text: &str| read(&Source::new(text), text, &CollectOptions::default())
            .unwrap()
            .value
            .map(|value| super::super::syntax::json(&value));
        prop_assert_eq!(value(&text), value(&once));
    }
}
