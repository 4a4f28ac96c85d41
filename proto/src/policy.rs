//! The document people write, and its compiler.
