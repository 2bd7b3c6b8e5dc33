//! The command line: what the user typed.
//!
//! Every command takes `--config`; what it does lives in [`crate::cmd`], one file per command.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::cmd;
use crate::config;

/// Keeps a PostgreSQL ready elsewhere, and makes it the primary on the bad day.
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
    /// Report everything on both sides that is not as replication needs it
    Check(cmd::check::CheckArgs),
    /// Do the one-time set-up that needs more rights than running: schema, publication, replica database
    Init(cmd::init::InitArgs),
    /// Replicate until stopped, after doing whatever is missing; under route kinesis, into the stream
    Run,
    /// Under route kinesis, beside the replica: apply what the stream has, until stopped
    Apply,
    /// Show at a glance whether the RPO is met
    Status(cmd::status::StatusArgs),
    /// Make the replica the primary, and say what was lost and how long it took
    Promote(cmd::promote::PromoteArgs),
    /// Take a base backup into the archive; list, verify or prune what it has
    Backup(cmd::backup::BackupArgs),
    /// Build a database as of any moment out of the archive
    Restore(cmd::restore::RestoreArgs),
}
