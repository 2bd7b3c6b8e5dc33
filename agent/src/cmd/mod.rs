//! One short file per subcommand: configuration and arguments in, text for people or programs and an
//! exit code out.

pub mod check;
pub mod init;
pub mod promote;
pub mod run;
