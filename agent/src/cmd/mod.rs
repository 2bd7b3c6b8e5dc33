//! The subcommands: each turns a configuration into an exit code and prints for people or programs.

pub mod check;
