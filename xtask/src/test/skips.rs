//! Tests that could not run here: noted by the tests themselves, listed at the end, and compared
//! with the announced ones in `tests/skips.txt`. A skip that nobody announced is a failure:
//! otherwise a machine that lost something would go on looking green.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;

use crate::house;

/// Names with reasons, each name once.
#[derive(Debug, Default)]
pub struct Skips(BTreeMap<String, String>);

impl Skips {
    pub fn add(&mut self, name: &str, reason: &str) {
        self.0.insert(name.to_owned(), reason.to_owned());
    }

    /// Reads what the tests of one process noted; `place` says where they ran.
    pub fn read(&mut self, file: &Path, place: &str) -> usize {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let mut count = 0;
        for (name, reason) in entries(&text) {
            self.add(&format!("{place}::{name}"), reason);
            count += 1;
        }
        count
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&String, &String)> {
        self.0.iter()
    }

    /// The ones that `tests/skips.txt` does not announce.
    pub fn unannounced(&self) -> anyhow::Result<Vec<&String>> {
        let file = house::root().join("tests/skips.txt");
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        Ok(self.not_in(&text))
    }

    fn not_in(&self, announced: &str) -> Vec<&String> {
        let announced: Vec<(&str, &str)> = entries(announced).collect();
        let known = |name: &str, reason: &str| {
            announced.iter().any(|(pattern, prefix)| {
                let named = match pattern.strip_suffix('*') {
                    Some(start) => name.starts_with(start),
                    None => name == *pattern,
                };
                named && reason.starts_with(prefix)
            })
        };
        self.0
            .iter()
            .filter(|(name, reason)| !known(name, reason))
            .map(|(name, _)| name)
            .collect()
    }
}

/// Lines of NAME, a tab, and a reason; empty ones and comments (#) apart.
fn entries(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.split_once('\t').unwrap_or((line, "")))
        .map(|(name, reason)| (name.trim(), reason.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_is_announced_by_name_and_the_start_of_its_reason() {
        let mut skips = Skips::default();
        skips.add("bpf@uml::bounded_loop", "no JIT: callbacks are refused");
        skips.add("bpf@uml::other", "no JIT: callbacks are refused");
        skips.add("lab::tpm", "no TPM here");
        let text = "# why\nbpf@uml::bounded_loop\tno JIT\nlab::*\tno TPM\n";
        assert_eq!(skips.not_in(text), ["bpf@uml::other"]);
        assert_eq!(
            skips.not_in("bpf@uml::*\tno clang\nlab::tpm\tno TPM").len(),
            2
        );
        assert_eq!(skips.not_in("").len(), 3);
    }
}
