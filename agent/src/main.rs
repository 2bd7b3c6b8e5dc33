//! The `dr-agent` command. Two phases: arguments, configuration and logging first, synchronously, so that
//! mistakes show at once; then the runtime.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use dr_agent::cli::{Cli, Command, SharedArgs};
use dr_agent::cloud::aws;
use dr_agent::cmd;
use dr_agent::config::Config;
use dr_agent::error::{Classify, chain};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Exit code for a wrong command line or configuration; clap uses the same.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(&cli.shared);
    let config = match cmd::reload::load(&cli.shared.config) {
        Ok(config) => config,
        Err(error) => {
            failed(&error);
            return ExitCode::from(USAGE);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("dr-agent: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(Box::pin(run(cli.command, config, cli.shared.config)));
    // Tasks that are still sleeping or blocked hold nothing that matters after the outcome is known.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| {
        eprintln!("dr-agent: {error:#}");
        ExitCode::FAILURE
    })
}

/// Tells people what failed and what to do.
fn failed(error: &(impl Classify + 'static)) -> ExitCode {
    eprintln!("dr-agent: {}", chain(error));
    if let Some(hint) = error.hint() {
        eprintln!("  hint: {hint}");
    }
    ExitCode::FAILURE
}

async fn run(command: Command, config: Config, file: PathBuf) -> anyhow::Result<ExitCode> {
    // Whoever hangs up in the middle of a promotion, or tells an agent to look again, kills neither: once it is listened for,
    // the signal does nothing else.
    let _hangup = signal(SignalKind::hangup()).ok();
    match command {
        Command::Check(args) => cmd::check::run(&config, args).await,
        Command::Init(args) => Ok(match cmd::init::run(&config, &args).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        }),
        Command::Run => cmd::run::run(config, file).await,
        Command::Apply => cmd::run::apply(config, file).await,
        Command::Status(args) => Ok(cmd::status::run(config, args).await),
        Command::Ddl(args) => Ok(cmd::ddl::run(config, args).await),
        Command::Promote(args) => Ok(cmd::promote::run(config, args).await),
        Command::Backup(args) => Ok(cmd::backup::run(config, args).await),
        Command::Restore(args) => Ok(cmd::restore::run(config, args).await),
    }
}

/// Logs go to standard error; `RUST_LOG` chooses, `info` otherwise.
fn start_logging(shared: &SharedArgs) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let without_secrets = filter_fn(aws::may_be_logged);
    if shared.log_json {
        builder.json().finish().with(without_secrets).init();
    } else {
        builder.finish().with(without_secrets).init();
    }
}
