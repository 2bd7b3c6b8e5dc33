//! `dr-agent ddl`: what has become of the source's commands on the replica, and what a person may decide about those that wait.
//!
//! Works on the replica alone. Every decision needs a reason, and is kept (`dr_agent.ddl_decided`).

mod view;

use std::io::Write as _;
use std::process::ExitCode;

use tokio_postgres::Client;

use crate::config::Config;
use crate::ddl::{self, Tried};
use crate::error::{Because, Class, Classify, chain};
use crate::names::TableName;
use crate::names::object::ObjectAddress;
use crate::names::stream::StreamName;
use crate::pg::{self, PgError};
use crate::promote::observe;
use crate::schema::ddl_decided::{self, Action};
use crate::schema::{ddl_applied, ddl_waiting, table_sync};
use crate::sink::replica;
use view::DatabaseCommands;

/// Commands that are shown of each database.
const NEWEST: i64 = 20;

/// Flags of `ddl`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Without a subcommand it shows, for each database, what has become of the source's commands, and which objects are \
    not as they are there.\n\
    Exit codes: 0 nothing waits, or done; 1 something waits, or failed; 2 usage or configuration."
)]
pub struct DdlArgs {
    /// Only this database
    #[arg(long, value_name = "NAME", global = true)]
    database: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    action: Option<DdlAction>,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum DdlAction {
    /// Show what was captured, applied and waits (the default)
    Show,
    /// Try everything that waits again, now
    Retry {
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// An object that waits is right as it is on the replica: it counts no more
    Accept {
        /// As `dr-agent ddl` names it: its kind and its name, such as 'view public.orders_of_today'
        object: String,
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Copy a table again: it is not protected until that is done
    Resync {
        /// schema.table
        table: String,
        /// Why, for the record
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Observe(String),
    #[error("no database of that name is replicated here: {0}")]
    NoDatabase(String),
    #[error("nothing that waits is called \"{0}\"")]
    NothingWaits(String),
    #[error("\"{0}\" is no replicated table of this database")]
    NoTable(String),
    #[error("more than one database is replicated: name one with --database")]
    WhichDatabase,
    #[error("ask the replica")]
    Pg(#[from] PgError),
}

impl Classify for Failure {
    fn class(&self) -> Class {
        Class::Definite
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NothingWaits(_) => {
                Some("dr-agent ddl lists what waits, by kind and name".to_owned())
            }
            Self::NoTable(_) => {
                Some("write it as schema.table, as it is called on the replica".to_owned())
            }
            Self::Pg(error) => error.hint(),
            _ => None,
        }
    }
}

/// Runs it.
pub async fn run(config: Config, args: DdlArgs) -> ExitCode {
    match Box::pin(each(&config, &args)).await {
        Ok((text, done)) => {
            // A closed pipe is no reason to fail.
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
            ExitCode::from(u8::from(!done))
        }
        Err(error) => {
            eprintln!("dr-agent: {}", chain(&error));
            if let Some(hint) = error.hint() {
                eprintln!("  hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

/// One database of the replica.
struct Place {
    name: String,
    stream: StreamName,
    client: Client,
}

async fn each(config: &Config, args: &DdlArgs) -> Result<(String, bool), Because> {
    let places = places(config, args).await;
    let mut places = places.map_err(|error| Because::new("look at the replica", error))?;
    let outcome = async {
        match &args.action {
            None | Some(DdlAction::Show) => show(&places, args.json).await,
            Some(DdlAction::Retry { reason }) => retry(&mut places, reason).await,
            Some(DdlAction::Accept { object, reason }) => accept(&places, object, reason).await,
            Some(DdlAction::Resync { table, reason }) => resync(&places, table, reason).await,
        }
    };
    outcome.await.map_err(|error| Because::new("ddl", error))
}

async fn places(config: &Config, args: &DdlArgs) -> Result<Vec<Place>, Failure> {
    let observed = Box::pin(observe::observe(config, "ddl")).await;
    let observed = observed.map_err(|error| Failure::Observe(chain(&error)))?;
    let mut places = Vec::new();
    for database in observed.databases {
        if args
            .database
            .as_ref()
            .is_some_and(|name| *name != database.name)
        {
            continue;
        }
        let info = config.replica.conninfo.with_dbname(&database.name);
        let session = replica::session(&database.stream);
        places.push(Place {
            client: pg::connect(&info, &session).await?,
            name: database.name,
            stream: database.stream,
        });
    }
    match (places.is_empty(), &args.database) {
        (true, Some(name)) => Err(Failure::NoDatabase(name.clone())),
        _ => Ok(places),
    }
}

async fn show(places: &[Place], json: bool) -> Result<(String, bool), Failure> {
    let mut databases = Vec::new();
    for Place {
        name,
        stream,
        client,
    } in places
    {
        databases.push(DatabaseCommands {
            database: name.clone(),
            counts: ddl_applied::counts(client, stream).await?,
            newest: ddl_applied::newest(client, stream, NEWEST).await?,
            waiting: ddl_waiting::read(client, stream).await?,
        });
    }
    let done = databases.iter().all(DatabaseCommands::is_settled);
    let text = match json {
        true => view::json(&databases),
        false => view::text(&databases),
    };
    Ok((text, done))
}

async fn retry(places: &mut [Place], reason: &str) -> Result<(String, bool), Failure> {
    let (mut text, mut done) = (String::new(), true);
    for place in places {
        ddl_decided::note(
            &place.client,
            &place.stream,
            Action::Retry,
            "everything",
            reason,
        )
        .await?;
        let tried = ddl::try_waiting(&mut place.client, &place.stream, None).await?;
        done &= tried.iter().all(|one| one.waits.is_none());
        for table in tried.iter().filter_map(|one| one.copy_again.as_ref()) {
            let object = ddl_decided::object_of(table);
            let (client, stream) = (&place.client, &place.stream);
            ddl_decided::note(client, stream, Action::Resync, &object, reason).await?;
        }
        text.push_str(&view::tried(&place.name, &tried));
    }
    Ok((text, done))
}

/// The only database there is.
fn one(places: &[Place]) -> Result<&Place, Failure> {
    match places {
        [place] => Ok(place),
        _ => Err(Failure::WhichDatabase),
    }
}

async fn accept(places: &[Place], object: &str, reason: &str) -> Result<(String, bool), Failure> {
    let Place { client, stream, .. } = one(places)?;
    let waiting = ddl_waiting::read(client, stream).await?;
    let is_meant = |address: &ObjectAddress, identity: &str| {
        object == identity || object == format!("{} {identity}", address.kind)
    };
    let mut meant = waiting
        .iter()
        .filter(|one| is_meant(&one.address, &one.identity));
    let Some(found) = meant.next() else {
        return Err(Failure::NothingWaits(object.to_owned()));
    };
    ddl_waiting::accept(client, stream, &found.address, reason).await?;
    ddl_decided::note(client, stream, Action::Accept, object, reason).await?;
    Ok((format!("{object} counts as right as it is\n"), true))
}

async fn resync(places: &[Place], table: &str, reason: &str) -> Result<(String, bool), Failure> {
    let Place { client, stream, .. } = one(places)?;
    let tables = table_sync::read(client, stream).await?;
    let is_meant = |name: &TableName| table == name.to_string() || table == name.sql();
    let found = tables
        .iter()
        .find(|row| is_meant(&row.table) && row.table.schema != "dr_agent");
    let Some(found) = found else {
        return Err(Failure::NoTable(table.to_owned()));
    };
    let object = ddl_decided::object_of(&found.table);
    ddl_decided::note(client, stream, Action::Resync, &object, reason).await?;
    Ok((
        format!(
            "{table} is copied again by the running agent, within half a minute; `dr-agent status` shows how far it is\n"
        ),
        true,
    ))
}
