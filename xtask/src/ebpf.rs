//! `cargo xtask ebpf [--check]`: builds the eBPF programs.

/// Builds the programs, or with `check` rebuilds them and compares with the committed object.
pub fn run(_check: bool) -> anyhow::Result<()> {
    anyhow::bail!("there are no eBPF programs in this checkout yet")
}
