//! One short file per subcommand: arguments in, report and exit code out.

pub mod promote;
