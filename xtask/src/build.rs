//! What the verbs build, by the cargo that runs us.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use serde_json::Value;

use crate::house;

/// A cargo command in the checkout.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(house::root());
    // Ours, not those of the xtask that cargo built: they would force rebuilds.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Builds all programs; returns the folder that they are in. The whole workspace always: a part
/// of it would unify features differently and build half of the dependencies again.
pub fn programs() -> anyhow::Result<PathBuf> {
    programs_by(&["build", "--workspace"])
}

/// Builds what is measured and what measures, with optimisation; returns the folder that they are in.
pub fn optimised() -> anyhow::Result<PathBuf> {
    let packages = ["tests", "agent", "coordinator", "relay"];
    let packages = packages.iter().flat_map(|package| ["-p", package]);
    let build = ["build", "--release", "--bins"].into_iter().chain(packages);
    programs_by(&build.collect::<Vec<_>>())
}

fn programs_by(build: &[&str]) -> anyhow::Result<PathBuf> {
    let mut folder = None;
    artifacts(build, |artifact| {
        if artifact["target"]["kind"][0] == "bin"
            && let Some(program) = artifact["executable"].as_str()
        {
            folder = Path::new(program).parent().map(Path::to_owned);
        }
    })?;
    folder.context("cargo built no program")
}

/// A test executable: which package and target, and where its tests expect to run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TestBinary {
    pub package: String,
    pub target: String,
    /// A file of `tests/`, not the unit tests of a library or program.
    pub integration: bool,
    pub folder: PathBuf,
    pub path: PathBuf,
}

impl TestBinary {
    /// What people call it: `engine`, `tests/lab`.
    pub fn name(&self) -> String {
        if self.target == self.package && !self.integration {
            self.package.clone()
        } else {
            format!("{}/{}", self.package, self.target)
        }
    }
}

/// Builds everything, tests too, in one go: programs and tests then share every dependency, also
/// where a test asks for one more feature. Returns the programs' folder and the tests.
pub fn everything() -> anyhow::Result<(PathBuf, Vec<TestBinary>)> {
    let packages = packages()?;
    let mut folder = None;
    let mut found = Vec::new();
    artifacts(&["build", "--workspace", "--all-targets"], |artifact| {
        let Some(path) = artifact["executable"].as_str().map(PathBuf::from) else {
            return;
        };
        if artifact["profile"]["test"] != true {
            folder = path.parent().map(Path::to_owned);
            return;
        }
        // Built, so that it does not rot; to be run by whoever measures.
        if artifact["target"]["kind"][0] == "bench" {
            return;
        }
        let manifest = artifact["manifest_path"].as_str().unwrap_or_default();
        let Some(package) = packages.get(manifest) else {
            return;
        };
        found.push(TestBinary {
            package: package.clone(),
            target: artifact["target"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            integration: artifact["target"]["kind"][0] == "test",
            folder: Path::new(manifest)
                .parent()
                .map(Path::to_owned)
                .unwrap_or_default(),
            path,
        });
    })?;
    found.sort();
    Ok((folder.context("cargo built no program")?, found))
}

/// Our packages' names by manifest path.
fn packages() -> anyhow::Result<BTreeMap<String, String>> {
    let metadata = metadata(&["--no-deps"])?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    Ok(packages
        .filter_map(|package| {
            let manifest = package["manifest_path"].as_str()?;
            Some((manifest.to_owned(), package["name"].as_str()?.to_owned()))
        })
        .collect())
}

/// `cargo metadata` as JSON.
pub fn metadata(extra: &[&str]) -> anyhow::Result<Value> {
    let out = cargo()
        .args(["metadata", "--format-version", "1"])
        .args(extra)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    anyhow::ensure!(out.status.success(), "cargo metadata failed");
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// Runs a building cargo command and shows its artifacts to `each`.
fn artifacts(arguments: &[&str], mut each: impl FnMut(&Value)) -> anyhow::Result<()> {
    let mut child = cargo()
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("cargo has no stdout")?;
    for line in BufReader::new(stdout).lines() {
        let message: Value = serde_json::from_str(&line?).unwrap_or_default();
        if message["reason"] == "compiler-artifact" {
            each(&message);
        }
    }
    anyhow::ensure!(
        child.wait()?.success(),
        "`cargo {}` failed",
        arguments.join(" ")
    );
    Ok(())
}
