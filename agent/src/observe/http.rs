//! The HTTP listener: `/metrics`, `/status`, `/healthz`, `/readyz` and a page for people.
//!
//! Read-only and without authentication, so it listens on loopback unless told otherwise. Nothing here
//! asks a database: it shows what the pipelines and the watch last wrote, as it is at the moment of asking.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Objectives};
use crate::observe::metrics;
use crate::observe::status::{DatabaseStatus, Leg, Registry, State};
use crate::time;
use crate::watch::WatchedSide;
use crate::watch::coverage::Coverage;

/// Names of a kind that the page shows; `/status` has more.
const NAMES_SHOWN: usize = 5;

/// What the handlers read.
#[derive(Clone)]
pub struct ServedState {
    /// The metrics.
    pub prometheus: PrometheusHandle,
    /// The pipelines.
    pub registry: Registry,
    /// The configuration in use.
    pub config: watch::Receiver<Arc<Config>>,
}

impl ServedState {
    fn objectives(&self) -> Objectives {
        self.config.borrow().objectives
    }

    fn databases(&self) -> Vec<DatabaseStatus> {
        self.registry.read(time::now())
    }
}

#[derive(Serialize)]
struct StatusPage {
    version: &'static str,
    objectives: StatusObjectives,
    clock_offset_seconds: StatusClocks,
    databases: Vec<DatabaseStatus>,
}

/// How far the clock of a side is ahead of the agent's; null while it does not answer.
#[derive(Serialize)]
struct StatusClocks {
    source: Option<f64>,
    replica: Option<f64>,
}

#[derive(Serialize)]
struct StatusObjectives {
    rpo_seconds: f64,
    rto_seconds: f64,
}

/// Binds the listener; a port in use is an error before anything else starts.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until cancelled.
pub async fn serve(
    listener: TcpListener,
    shown: ServedState,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/", get(page))
        .route("/metrics", get(scraped))
        .route("/status", get(status))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(shown);
    axum::serve(listener, router)
        .with_graceful_shutdown(async move { cancel.cancelled().await })
        .await
}

async fn scraped(Shared(shown): Shared<ServedState>) -> impl IntoResponse {
    metrics::show(&shown.databases(), shown.registry.servers());
    shown.prometheus.run_upkeep();
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        shown.prometheus.render(),
    )
}

async fn status(Shared(shown): Shared<ServedState>) -> impl IntoResponse {
    let objectives = shown.objectives();
    Json(StatusPage {
        version: crate::VERSION,
        objectives: StatusObjectives {
            rpo_seconds: objectives.rpo.as_secs_f64(),
            rto_seconds: objectives.rto.as_secs_f64(),
        },
        clock_offset_seconds: StatusClocks {
            source: shown
                .registry
                .servers()
                .clock_offset_seconds(WatchedSide::Source),
            replica: shown
                .registry
                .servers()
                .clock_offset_seconds(WatchedSide::Replica),
        },
        databases: shown.databases(),
    })
}

/// The process is there and answers; starting it again would mend nothing. Whether anything is protected is [`readyz`]'s.
async fn healthz(Shared(shown): Shared<ServedState>) -> String {
    let databases = shown.databases();
    let streaming = databases
        .iter()
        .filter(|database| database.state == State::Streaming);
    format!(
        "ok: the process answers; {} of {} databases stream, see /readyz\n",
        streaming.count(),
        databases.len()
    )
}

/// Every database is streaming and within its RPO.
async fn readyz(Shared(shown): Shared<ServedState>) -> Response {
    let databases = shown.databases();
    let mut text = String::new();
    for database in &databases {
        if database.state != State::Streaming {
            let since = database.since.as_deref().unwrap_or("");
            let _ = writeln!(
                text,
                "{}: {} since {since}",
                database.database,
                database.state.as_str()
            );
        } else if database.rpo_breached {
            let _ = writeln!(text, "{}: RPO breached", database.database);
        }
    }
    if databases.is_empty() {
        text.push_str("no database yet\n");
    }
    if text.is_empty() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
    }
}

async fn page(Shared(shown): Shared<ServedState>) -> impl IntoResponse {
    Html(render(&shown.objectives(), &shown.databases()))
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;\
    color:#1a1a1a;background:#fff}table{border-collapse:collapse;width:100%}\
    th,td{text-align:left;padding:.4rem .8rem;border-bottom:1px solid #ddd;vertical-align:top}\
    td.n{text-align:right;font-variant-numeric:tabular-nums}.ok{color:#0a6b2d;font-weight:600}\
    .bad{color:#b00020;font-weight:600}.hint{color:#444}code{font-size:.9em}";

fn render(objectives: &Objectives, databases: &[DatabaseStatus]) -> String {
    let mut rows = String::new();
    for database in databases {
        let (class, verdict) = verdict(database);
        let lag = database
            .lag_seconds
            .map_or_else(|| "unknown".to_owned(), |lag| format!("{lag:.1} s"));
        let behind = database
            .lag_bytes
            .map_or_else(|| "unknown".to_owned(), bytes);
        let retained = database
            .slot_retained_bytes
            .map_or_else(|| "unknown".to_owned(), bytes);
        let _ = write!(
            rows,
            "<tr><td>{}</td><td class=\"{class}\">{verdict}</td>{}<td>{}<br><span class=hint>since {}</span></td><td class=n>{lag}</td>\
             <td class=n>{behind}</td><td class=n>{retained}</td><td><code>{}</code></td></tr>",
            escape(&database.database),
            protected(database),
            database.state.as_str(),
            database.since.as_deref().unwrap_or("the start"),
            escape(database.end_lsn.as_deref().unwrap_or("none")),
        );
        for line in not_protected(database) {
            let _ = write!(
                rows,
                "<tr><td></td><td colspan=7 class=bad>{}</td></tr>",
                escape(&line)
            );
        }
        if let Some(waits) = &database.waits_for {
            let _ = write!(
                rows,
                "<tr><td></td><td colspan=7 class=bad>{}</td></tr>",
                escape(waits)
            );
        }
        if let Some(error) = &database.error {
            let hint = database.hint.as_deref().unwrap_or("");
            let _ = write!(
                rows,
                "<tr><td></td><td colspan=7><span class=bad>{}</span><br><span class=hint>{}</span></td></tr>",
                escape(error),
                escape(hint)
            );
        }
    }
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=2>\
         <meta name=viewport content=\"width=device-width\"><title>dr-agent</title><style>{STYLE}</style>\
         <h1>dr-agent {}</h1>{}<p>RPO {} · RTO {} · <a href=/status>status</a> · <a href=/metrics>metrics</a></p>\
         <table><thead><tr><th>Database<th>RPO<th>Protected<th>State<th>Lag<th>Lag, bytes<th>WAL kept on source<th>Applied up to</thead>\
         <tbody>{rows}</tbody></table>",
        crate::VERSION,
        what_it_does(databases),
        humantime::format_duration(objectives.rpo),
        humantime::format_duration(objectives.rto),
    )
}

/// All pipelines of a process go the same part of the way.
fn what_it_does(databases: &[DatabaseStatus]) -> &'static str {
    match databases.first().map(|database| database.leg) {
        None | Some(Leg::Whole) => "",
        Some(Leg::Send) => {
            "<p>Sends into the Kinesis stream: lag and position are those of the stream, not of the replica.</p>"
        }
        Some(Leg::Apply) => "<p>Applies the Kinesis stream to the replica.</p>",
    }
}

fn verdict(database: &DatabaseStatus) -> (&'static str, &'static str) {
    match (database.rpo_breached, database.lag_seconds) {
        (false, _) => ("ok", "met"),
        (true, Some(_)) => ("bad", "BREACHED"),
        (true, None) => ("bad", "not protected yet"),
    }
}

/// The second verdict: which tables a failover would bring. A sender does not see the replica.
fn protected(database: &DatabaseStatus) -> String {
    let Some(coverage) = &database.coverage else {
        return "<td class=hint>not known</td>".to_owned();
    };
    let class = match coverage.tables.is_some() && coverage.protected == coverage.tables {
        true => "ok",
        false => "bad",
    };
    format!(
        "<td class={class}>protected: {}</td>",
        escape(&coverage.verdict())
    )
}

/// What is not protected, a line each; of tables that are set aside also why.
fn not_protected(database: &DatabaseStatus) -> Vec<String> {
    let missing = database.coverage.iter().flat_map(|seen| &seen.missing);
    let missing = missing.map(|one| format!("not protected: {}", one.text(NAMES_SHOWN)));
    let aside = database.set_aside.iter();
    let aside = aside.map(|(table, reason)| format!("set aside, not protected: {table}: {reason}"));
    let waiting = database.coverage.iter().flat_map(|seen| &seen.waiting);
    let waiting =
        waiting.map(|(object, reason)| format!("not as on the source: {object}: {reason}"));
    let coverage = database.coverage.iter();
    let comparison = coverage.filter_map(Coverage::comparison);
    missing
        .chain(aside)
        .chain(waiting)
        .chain(comparison)
        .collect()
}

fn bytes(count: u64) -> String {
    bytesize::ByteSize(count).display().iec().to_string()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::coverage::NotProtected;
    use std::time::Duration;

    #[test]
    fn the_page_shows_the_verdict_and_escapes_names() {
        let objectives = Objectives {
            rpo: Duration::from_secs(30),
            rto: Duration::from_secs(300),
        };
        let database = DatabaseStatus {
            database: "<b>".to_owned(),
            rpo_breached: true,
            lag_seconds: Some(31.0),
            error: Some("it broke".to_owned()),
            hint: Some("mend it".to_owned()),
            ..DatabaseStatus::default()
        };
        let page = render(&objectives, &[database]);
        assert!(page.contains("&lt;b&gt;") && !page.contains("<b>"));
        assert!(page.contains("BREACHED") && page.contains("it broke") && page.contains("mend it"));
        assert!(page.contains("31.0 s") && page.contains("RPO 30s"));
        assert!(!page.contains("Kinesis"));
    }

    #[test]
    fn the_page_says_how_many_tables_are_protected_and_names_the_others() {
        let objectives = Objectives {
            rpo: Duration::from_secs(30),
            rto: Duration::from_secs(300),
        };
        let aside = ("public.<t>".to_owned(), "another type".to_owned());
        let coverage = Coverage {
            known: true,
            tables: Some(43),
            protected: Some(42),
            missing: vec![NotProtected {
                kind: "table_set_aside".to_owned(),
                count: 1,
                names: vec!["public.<t>".to_owned()],
            }],
            set_aside: [aside.clone()].into(),
            waiting: [("view public.v".to_owned(), "no type <x>".to_owned())].into(),
            ..Coverage::default()
        };
        let database = DatabaseStatus {
            coverage: Some(coverage),
            set_aside: [aside].into(),
            ..DatabaseStatus::default()
        };
        let page = render(&objectives, &[database]);
        for words in [
            "<td class=bad>protected: 42 of 43 tables",
            "table set aside: 1 (public.&lt;t&gt;)",
            "public.&lt;t&gt;: another type",
            "not as on the source: view public.v: no type &lt;x&gt;",
        ] {
            assert!(page.contains(words), "{words}: {page}");
        }
        let unknown = render(&objectives, &[DatabaseStatus::default()]);
        assert!(unknown.contains("not known") && !unknown.contains("protected: "));
    }

    #[test]
    fn the_page_says_which_part_of_the_way_is_gone_here() {
        let objectives = Objectives {
            rpo: Duration::from_secs(30),
            rto: Duration::from_secs(300),
        };
        for (leg, words) in [
            (Leg::Send, "Sends into the Kinesis stream"),
            (Leg::Apply, "Applies the Kinesis stream"),
        ] {
            let database = DatabaseStatus {
                leg,
                ..DatabaseStatus::default()
            };
            assert!(render(&objectives, &[database]).contains(words));
        }
    }
}
