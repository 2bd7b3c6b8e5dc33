//! One short file per subcommand: arguments in, exit class out.

pub mod init;
