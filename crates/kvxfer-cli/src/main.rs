//! The `kvxfer` command.
fn main() {}
