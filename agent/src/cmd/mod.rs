//! One short file per subcommand: arguments in, report and exit code out.

mod agent_status;
pub mod promote;
pub mod status;
