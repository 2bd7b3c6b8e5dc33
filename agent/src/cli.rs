//! The command line: what the user typed.
//!
//! Every command takes `--config`; what it does lives in [`crate::cmd`], one file per command.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::cmd;
use crate::config;

/// Keeps a PostgreSQL standby ready at another site, and makes it the primary when the source is lost.
#[derive(Debug, Parser)]
#[command(name = "dr-agent", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// What every command takes.
    #[command(flatten)]
    pub shared: SharedArgs,
}

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed
  2  usage or configuration
  3  fenced: this agent was superseded by a promotion
  4  refused: the promotion would break a promise and no override was given";

/// What every command takes.
#[derive(Debug, Args)]
pub struct SharedArgs {
    /// Configuration file
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "DR_AGENT_CONFIG",
        default_value = config::DEFAULT_PATH
    )]
    pub config: PathBuf,

    /// Log lines as JSON objects, for log collectors
    #[arg(long, global = true, env = "DR_AGENT_LOG_JSON")]
    pub log_json: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check both sides for everything that replication needs
    Check(cmd::check::CheckArgs),
    /// Perform the one-time setup that needs more privileges than run: schema, publication, replica database
    Init(cmd::init::InitArgs),
    /// Set up what is missing, and replicate until stopped; under route kinesis, into the stream
    Run,
    /// Under route kinesis, beside the replica: apply the stream until stopped
    Apply,
    /// Show whether the RPO is met
    Status(cmd::status::StatusArgs),
    /// Show what has become of the source's commands (DDL) on the replica, and decide about those that wait
    Ddl(cmd::ddl::DdlArgs),
    /// Make the replica the primary, and report what was lost and how long it took
    Promote(cmd::promote::PromoteArgs),
    /// Take a base backup into the archive, or list, verify or prune the archive
    Backup(cmd::backup::BackupArgs),
    /// Build a database as of any moment from the archive
    Restore(cmd::restore::RestoreArgs),
}
