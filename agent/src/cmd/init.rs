//! `dr-agent init`: the one-time set-up that needs more rights than the agent runs with.
//!
//! Plans every database through [`crate::setup::plan`], then prints the plan or executes it. One
//! database that cannot be set up does not keep the others from it.

use std::error::Error as _;
use std::io::{self, Write};

use crate::config::Config;
use crate::error::{Because, Class, Classify, chain};
use crate::pg::{ConnInfo, ConnInfoError};
use crate::setup::{self, Privileged, SetupError};

/// Performs the privileged one-time setup: schema dr_agent, publication, replica database and roles.
///
/// It can be repeated: what exists is kept. It creates no slot and copies nothing; `run` does.
#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// Print the SQL for both sides, and change nothing.
    #[arg(long)]
    pub plan: bool,
    /// A role of the source with the privileges for the setup; the configured role is granted what it needs.
    #[arg(long, value_name = "URL")]
    pub source_url: Option<String>,
    /// The same for the replica.
    #[arg(long, value_name = "URL")]
    pub replica_url: Option<String>,
}

/// Why `init` did not finish.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A URL on the command line cannot be used.
    #[error("{option}")]
    Url {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        #[source]
        source: ConnInfoError,
    },
    /// The databases could not be listed, or one of them could not be set up: the first that failed; the others were tried.
    #[error(transparent)]
    Because(Because),
    /// Standard output is closed.
    #[error("write to standard output")]
    Output(#[source] io::Error),
}

impl Classify for InitError {
    fn class(&self) -> Class {
        match self {
            Self::Url { .. } | Self::Output(_) => Class::Definite,
            Self::Because(error) => error.class(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Url { .. } => Some("write postgres://user@host/database".to_owned()),
            Self::Output(_) => None,
            Self::Because(error) => error.hint(),
        }
    }
}

/// Plans and, without `--plan`, executes the set-up of every configured database.
pub async fn run(config: &Config, args: &InitArgs) -> Result<(), InitError> {
    let privileged = Privileged {
        source: url(
            "--source-url",
            args.source_url.as_deref(),
            &config.source.conninfo,
        )?,
        replica: url(
            "--replica-url",
            args.replica_url.as_deref(),
            &config.replica.conninfo,
        )?,
    };
    let databases = setup::source_databases_as(config, &privileged)
        .await
        .map_err(|error| InitError::Because(Because::new("find the databases", error)))?;
    let mut first_error = None;
    for database in databases {
        let done = Box::pin(one(config, &privileged, &database, args.plan)).await;
        let Err(error) = done else { continue };
        if let InitError::Because(because) = &error
            && let Some(source) = because.source()
        {
            say(&format!("-- {database}: {}", chain(source)))?;
        }
        first_error.get_or_insert(error);
    }
    first_error.map_or(Ok(()), Err)
}

async fn one(
    config: &Config,
    privileged: &Privileged,
    database: &str,
    only_plan: bool,
) -> Result<(), InitError> {
    let failed = |error: SetupError| {
        InitError::Because(Because::new(format!("database \"{database}\""), error))
    };
    let plan = setup::plan(config, privileged, database)
        .await
        .map_err(failed)?;
    let warnings = if only_plan {
        say(&plan.to_string())?;
        plan.warnings().to_vec()
    } else {
        plan.execute(privileged).await.map_err(failed)?
    };
    for warning in warnings {
        say(&format!("-- warning: {warning}"))?;
    }
    if !only_plan {
        say(&if plan.is_empty() {
            format!("{database}: everything was there already")
        } else {
            let applier = config.route.applier();
            format!("{database}: set up; `{applier}` copies it and replicates")
        })?;
    }
    Ok(())
}

fn url(
    option: &'static str,
    url: Option<&str>,
    configured: &ConnInfo,
) -> Result<ConnInfo, InitError> {
    match url {
        None => Ok(configured.clone()),
        Some(url) => ConnInfo::parse(url, None).map_err(|source| InitError::Url { option, source }),
    }
}

fn say(line: &str) -> Result<(), InitError> {
    writeln!(io::stdout().lock(), "{line}").map_err(InitError::Output)
}
