//! The machine the agent runs on: PostgreSQL's client programs, the spill directory, the HTTP address.
//!
//! Touches nothing that stays: the spill directory is tried with a file that has no name, the
//! address is bound and let go at once.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::finding::{Finding, FindingPlace, FindingSide};
use super::server::ServerFacts;
use super::{service_user, startable};
use crate::config::Config;
use crate::copy;
use crate::error::{Classify as _, chain};

/// Looks at everything. `source_version_num` is the source's version, where it is known.
pub(super) async fn look(
    config: &Config,
    source_version_num: Option<i32>,
    replica: Option<&ServerFacts>,
) -> Vec<Finding> {
    let at = FindingPlace::server(FindingSide::Agent);
    let mut findings = Vec::new();
    findings.push(tools(&at, config, source_version_num).await);
    findings.extend(service_user::look(&at, config));
    if let (Ok(version), Some(replica)) = (
        copy::find_tools_version(&config.copy, source_version_num.unwrap_or(140_000)).await,
        replica,
    ) {
        findings.extend(startable::tools(&at, version, replica));
    }
    findings.push(spill(&at, &config.limits.spill_directory));
    findings.push(http(&at, config).await);
    findings
}

/// `pg_dump` and `pg_restore`, looked for exactly as the copy looks for them.
async fn tools(at: &FindingPlace, config: &Config, source_version_num: Option<i32>) -> Finding {
    // While the source is away any version is accepted; the oldest one known is asked for.
    let needed = source_version_num.unwrap_or(140_000);
    match copy::find_tools(&config.copy, needed).await {
        Ok(found) => at.ok("pg_tools", format!("pg_dump and pg_restore {found}")),
        Err(error) => {
            let finding = at.error("pg_tools", chain(&error));
            match error.hint() {
                Some(hint) => finding.hint(hint),
                None => finding,
            }
        }
    }
}

fn spill(at: &FindingPlace, directory: &Path) -> Finding {
    writable(
        at,
        "spill_directory",
        directory,
        "create it and give it to the user dr-agent runs as, or set limits.spill_directory; \
         transactions above limits.transaction_bytes are kept there",
    )
}

/// Whether files can be made in a directory, or in the one below which it will be created.
pub(super) fn writable(
    at: &FindingPlace,
    code: &'static str,
    directory: &Path,
    hint: &str,
) -> Finding {
    let existing = existing(directory);
    let finding = match tempfile::tempfile_in(existing) {
        Ok(_) if existing == directory => at.ok(code, "is writable"),
        Ok(_) => at.ok(code, "will be created"),
        Err(error) => {
            let what = if existing == directory {
                format!("is not writable: {}", plain(&error))
            } else {
                format!(
                    "is not there, and {} is not writable: {}",
                    existing.display(),
                    plain(&error)
                )
            };
            at.error(code, what).hint(hint)
        }
    };
    finding.on(directory.display())
}

/// What is not there yet is created below the first directory that is.
pub(super) fn existing(directory: &Path) -> &Path {
    directory
        .ancestors()
        .find(|directory| directory.exists())
        .unwrap_or(Path::new("/"))
}

/// `tempfile` adds the path it tried to the message; the kind is what matters here.
fn plain(error: &io::Error) -> String {
    error.kind().to_string()
}

async fn http(at: &FindingPlace, config: &Config) -> Finding {
    let address = config.http_listen;
    let finding = match TcpListener::bind(address).await {
        Ok(_) => at.ok("http_listen", "is free; no agent serves it now"),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_our_agent(config).await {
                at.ok("http_listen", "a dr-agent is running and answers there")
            } else {
                at.error("http_listen", "is taken by another program")
                    .hint("set http.listen to a free address; `ss -ltnp` shows who has it")
            }
        }
        Err(error) => at
            .error("http_listen", format!("cannot be listened on: {error}"))
            .hint("set http.listen to an address of this machine, with a port above 1023"),
    };
    finding.on(address)
}

/// Whether what listens there has our metrics.
async fn is_our_agent(config: &Config) -> bool {
    let mut address = config.http_listen;
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = "GET /metrics HTTP/1.0\r\nHost: dr-agent\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream
            .take(ANSWER_BYTES_MAX)
            .read_to_end(&mut answer)
            .await?;
        io::Result::Ok(answer)
    };
    match tokio::time::timeout(ANSWER_TIME_MAX, ask).await {
        Ok(Ok(answer)) => String::from_utf8_lossy(&answer).contains("dr_agent_"),
        _ => false,
    }
}

/// Metrics of hundreds of databases fit; a program that never stops sending does not.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// A program that accepts and says nothing must not hold up the check.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::super::finding::Severity;
    use super::*;

    fn at() -> FindingPlace {
        FindingPlace::server(FindingSide::Agent)
    }

    fn config(listen: &str) -> Config {
        let text = format!(
            "[source]\nurl = \"postgres://a@localhost/x\"\n[replica]\n\
             url = \"postgres://b@localhost/y\"\n[http]\nlisten = \"{listen}\"\n"
        );
        Config::parse("f", &text, []).unwrap()
    }

    #[tokio::test]
    async fn tools_that_are_not_there_are_an_error_with_a_hint() {
        let mut config = config("127.0.0.1:0");
        config.copy.pg_bin = Some("/nowhere".into());
        let finding = tools(&at(), &config, Some(170_002)).await;
        assert_eq!(finding.severity, Severity::Error);
        assert!(finding.hint.is_some());
    }

    #[test]
    fn the_spill_directory_may_still_have_to_be_created() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(spill(&at(), directory.path()).severity, Severity::Ok);
        let deeper = directory.path().join("a/b");
        assert_eq!(spill(&at(), &deeper).severity, Severity::Ok);
        assert!(!deeper.exists(), "a check creates nothing");
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(spill(&at(), &file).severity, Severity::Error);
    }

    #[tokio::test]
    async fn an_address_taken_by_a_stranger_is_an_error_and_by_an_agent_is_not() {
        async fn serve(body: &'static str) -> (tokio::task::JoinHandle<()>, String) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let task = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 256];
                let _ = stream.read(&mut request).await.unwrap();
                let answer = format!("HTTP/1.0 200 OK\r\n\r\n{body}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
            (task, address)
        }
        for (body, severity) in [
            ("dr_agent_build_info{version=\"0\"} 1\n", Severity::Ok),
            ("<html>", Severity::Error),
        ] {
            let (task, address) = serve(body).await;
            let finding = http(&at(), &config(&address)).await;
            assert_eq!(finding.severity, severity, "{body}");
            task.await.unwrap();
        }
        assert_eq!(
            http(&at(), &config("127.0.0.1:0")).await.severity,
            Severity::Ok
        );
    }
}
