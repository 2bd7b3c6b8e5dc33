//! One short file per subcommand: arguments in, exit class out.

pub mod init;
//! The subcommands: each turns a configuration into an exit code and prints for people or programs.

pub mod check;
