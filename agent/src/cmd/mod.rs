//! One short file per subcommand: configuration and arguments in, text for people or programs and an
//! exit code out. Where there is more to print, a view beside it (●) makes the text and the JSON.

pub mod backup;
pub mod check;
pub mod ddl;
pub mod init;
pub mod promote;
pub mod reload;
pub mod restore;
pub mod run;
pub mod status;
