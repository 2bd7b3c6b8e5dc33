//! One short file per subcommand: configuration and arguments in, text for people or programs and an
//! exit code out.

mod agent_status;
mod archive_status;
pub mod backup;
pub mod check;
pub mod init;
mod kinesis_status;
pub mod promote;
pub mod reload;
pub mod restore;
pub mod run;
pub mod status;
