//! Rust source as the rules look at it: lines of code without comments and strings, what is
//! test code, which functions there are and how long, which modules are declared.
//!
//! A small scanner and no parser: it knows comments, strings, characters and braces.

/// One source file. `code` has the file's bytes with comments and the insides of strings and
/// characters turned to blanks, so that positions and line numbers stay.
pub struct Source {
    pub text: String,
    pub code: String,
}

/// A function: its name, first line (from 1) and how many lines it has.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    pub line: usize,
    pub lines: usize,
}

impl Source {
    pub fn new(text: String) -> Source {
        let code = blank(&text);
        Source { text, code }
    }

    /// Lines of code, numbered from 1.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
    }

    /// The code with `#[cfg(test)]` items blanked.
    pub fn without_tests(&self) -> String {
        let mut code = self.code.clone();
        let mut from = 0;
        while let Some(at) = code[from..].find("#[cfg(test)]").map(|at| at + from) {
            let end = item_end(&code, at);
            let blanked: String = code[at..end]
                .chars()
                .map(|c| if c == '\n' { '\n' } else { ' ' })
                .collect();
            code.replace_range(at..end, &blanked);
            from = at + blanked.len();
        }
        code
    }

    /// How many lines there are, tests apart.
    pub fn length(&self) -> usize {
        let tests: usize = self
            .test_parts()
            .map(|(from, to)| count_lines(&self.code[from..to]))
            .sum();
        self.text.lines().count().saturating_sub(tests)
    }

    /// Byte ranges of `#[cfg(test)]` items.
    fn test_parts(&self) -> impl Iterator<Item = (usize, usize)> {
        let starts = self.code.match_indices("#[cfg(test)]").map(|(at, _)| at);
        starts.map(|at| (at, item_end(&self.code, at)))
    }

    /// Functions with a body.
    pub fn functions(&self) -> Vec<Function> {
        let mut found = Vec::new();
        for (at, _) in self.code.match_indices("fn ") {
            let before = self.code[..at].chars().next_back();
            if before.is_some_and(is_word) {
                continue;
            }
            let rest = &self.code[at + 3..];
            let name: String = rest.chars().take_while(|&c| is_word(c)).collect();
            let Some(open) = rest.find(['{', ';']) else {
                continue;
            };
            if name.is_empty() || rest[open..].starts_with(';') {
                continue;
            }
            let end = closing(&self.code, at + 3 + open);
            let line = count_lines(&self.code[..at]) + 1;
            found.push(Function {
                name,
                line,
                lines: count_lines(&self.code[at..end]) + 1,
            });
        }
        found
    }

    /// The modules declared in files of their own (`mod name;`), and paths given to them.
    pub fn modules(&self) -> Vec<String> {
        self.lines()
            .filter_map(|(_, line)| {
                let line = line.trim();
                let line = line.strip_prefix("pub ").unwrap_or(line);
                let line = match line.strip_prefix("pub(") {
                    Some(rest) => rest.split_once(") ")?.1,
                    None => line,
                };
                Some(
                    line.strip_prefix("mod ")?
                        .strip_suffix(';')?
                        .trim()
                        .to_owned(),
                )
            })
            .collect()
    }
}

/// Whether `code` has `word` with no letter before or after it.
pub fn has_word(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        !code[..at].chars().next_back().is_some_and(is_word)
            && !code[at + word.len()..].chars().next().is_some_and(is_word)
    })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn count_lines(text: &str) -> usize {
    text.bytes().filter(|&byte| byte == b'\n').count()
}

/// Where the item that starts at `at` ends: after its braces, or its semicolon.
fn item_end(code: &str, at: usize) -> usize {
    match code[at..].find(['{', ';']).map(|offset| at + offset) {
        Some(open) if code[open..].starts_with('{') => closing(code, open),
        Some(semicolon) => semicolon + 1,
        None => code.len(),
    }
}

/// After the brace that closes the one at `open`.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0usize;
    for (offset, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return offset + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

/// Blanks comments and the insides of strings and characters.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match &bytes[at..] {
            [b'/', b'/', ..] => line_end(bytes, at),
            [b'/', b'*', ..] => comment_end(bytes, at),
            [b'"', ..] => string_end(bytes, at),
            [b'r', b'"' | b'#', ..] if !word_before(bytes, at) => raw_end(bytes, at),
            [b'b', b'r', b'"' | b'#', ..] if !word_before(bytes, at) => raw_end(bytes, at + 1),
            [b'\'', ..] => character_end(bytes, at),
            _ => at + 1,
        };
        if end > at + 1 {
            for byte in &mut out[at..end] {
                if *byte != b'\n' {
                    *byte = b' ';
                }
            }
        }
        at = end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn word_before(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..]
        .iter()
        .position(|&byte| byte == b'\n')
        .map_or(bytes.len(), |offset| at + offset)
}

fn comment_end(bytes: &[u8], at: usize) -> usize {
    let (mut depth, mut here) = (0, at);
    while here < bytes.len() {
        match &bytes[here..] {
            [b'/', b'*', ..] => {
                depth += 1;
                here += 2;
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                here += 2;
                if depth == 0 {
                    return here;
                }
            }
            _ => here += 1,
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut here = at + 1;
    while here < bytes.len() {
        match bytes[here] {
            b'\\' => here += 2,
            b'"' => return here + 1,
            _ => here += 1,
        }
    }
    bytes.len()
}

/// `at` is the r of a raw string; of a raw name (`r#type`) only the r is passed.
fn raw_end(bytes: &[u8], at: usize) -> usize {
    let hashes = bytes[at + 1..]
        .iter()
        .take_while(|&&byte| byte == b'#')
        .count();
    let open = at + 1 + hashes;
    if bytes.get(open) != Some(&b'"') {
        return at + 1;
    }
    let mut close = vec![b'"'];
    close.resize(hashes + 1, b'#');
    let rest = &bytes[open + 1..];
    let found = rest.windows(close.len()).position(|window| window == close);
    found.map_or(bytes.len(), |offset| open + 1 + offset + close.len())
}

/// A character's end; of a lifetime only the quote is passed.
fn character_end(bytes: &[u8], at: usize) -> usize {
    match &bytes[at + 1..] {
        [b'\\', ..] => {
            let rest = bytes.get(at + 3..).unwrap_or_default();
            let close = rest.iter().position(|&byte| byte == b'\'');
            close.map_or(at + 1, |offset| at + 3 + offset + 1)
        }
        [first, rest @ ..] => {
            // One character of up to four bytes, then the quote; else it is a lifetime.
            let wide = match first {
                0..0x80 => 0,
                0x80..0xe0 => 1,
                0xe0..0xf0 => 2,
                0xf0.. => 3,
            };
            if rest.get(wide) == Some(&b'\'') {
                at + wide + 3
            } else {
                at + 1
            }
        }
        [] => at + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Source {
        Source::new(text.to_owned())
    }

    #[test]
    fn comments_and_strings_are_no_code() {
        let source = of(
            "let a = \"unsafe \\\" {\"; // unsafe\n/* unsafe /* } */ */ let b = 'u';\n\
             let c = r#\"unsafe\"#; let d: &'static str = r\"{\"; let e = '\\''; let f = b'\"';",
        );
        assert!(!has_word(&source.code, "unsafe"), "{}", source.code);
        assert!(!source.code.contains(['{', '}']), "{}", source.code);
        assert!(source.code.contains("&'static str"));
        assert_eq!(source.code.len(), source.text.len());
        assert!(has_word(&of("x = unsafe { y }").code, "unsafe"));
        assert!(!has_word(&of("unsafe_code").code, "unsafe"));
    }

    #[test]
    fn functions_are_measured() {
        let source = of(
            "fn a() {}\n\nimpl X {\n    pub fn b(&self) -> Y {\n        {\n        }\n    \
             }\n}\ntrait T { fn c(); }\n",
        );
        let expected = [("a", 1, 1), ("b", 4, 4)];
        let found = source.functions();
        let found: Vec<_> = found
            .iter()
            .map(|f| (f.name.as_str(), f.line, f.lines))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn tests_do_not_count() {
        let source = of("fn a() {}\n#[cfg(test)]\nmod tests {\n    fn sleep() {}\n}\nfn z() {}\n");
        assert!(!source.without_tests().contains("sleep"));
        assert!(source.without_tests().contains("fn z"));
        assert_eq!(source.length(), 3);
        assert_eq!(
            of("#[cfg(test)]\nmod tests;\nfn z() {}\n")
                .without_tests()
                .trim(),
            "fn z() {}"
        );
    }

    #[test]
    fn module_declarations_are_found() {
        let source = of("mod a;\npub mod b;\npub(crate) mod c;\nmod d { }\n// mod e;\n");
        assert_eq!(source.modules(), ["a", "b", "c"]);
    }
}
