//! The archive: whether the store does what writing, restoring and tidying up will ask of it, and whether the spool has
//! room for a time without it.
//!
//! # Invariants
//! - What it writes is one small object below [`PROBES`], where neither a base backup nor a segment of the log can be;
//!   it is deleted again. What is written a second time must find it there: otherwise two agents, or two attempts of one,
//!   would overwrite what they must not.
//! - One right that is missing does not hide another: each is tried.
//!
//! # What it does not do
//! It makes no directory, and no rule of a bucket. It does not look whether what is in the archive is whole (`dr-agent backup
//! --verify`) or fresh (`dr-agent status`).

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use bytesize::ByteSize;

use super::finding::{Finding, FindingPlace, FindingSide, Severity, counted};
use super::host;
use crate::cloud::store::{Encryption, Put, Store, StoreError, StoreUrl};
use crate::config::{Archive, Config};
use crate::error::{Classify as _, chain};

/// What names of the objects written here begin with. A stream's objects are below its name, which has an underscore.
const PROBES: &str = "check/";

/// What is written: with a name of its own nobody else's is read back.
const PROBE_BYTES: Bytes = Bytes::from_static(b"dr-agent check\n");

/// What must not replace it.
const SECOND_BYTES: Bytes = Bytes::from_static(b"dr-agent check, once more\n");

/// For all that is asked of the store. The SDK alone would try longer.
const STORE_WITHIN: Duration = Duration::from_secs(30);

/// Listing more than so many segments takes minutes.
const SEGMENTS_MAX: f64 = 1e6;

/// Looks at store, spool and settings; `databases` are archived. Beside the replica under route `kinesis` nobody
/// `writes`.
pub(super) async fn look(
    config: &Config,
    archive: &Archive,
    databases: usize,
    writes: bool,
) -> Vec<Finding> {
    let at = FindingPlace::server(FindingSide::Agent);
    let mut findings = store(&at, archive, writes).await;
    if !writes {
        return findings;
    }
    findings.extend(uploads(&at, archive).await);
    findings.extend(spool(&at, archive, databases.max(1)));
    findings.extend(segments(&at, config, archive));
    findings
}

async fn store(at: &FindingPlace, archive: &Archive, writes: bool) -> Vec<Finding> {
    if let StoreUrl::Directory(path) = &archive.url
        && !path.exists()
    {
        if writes {
            return vec![not_there(at, path)];
        }
        let finding = at.warning("archive_store", "is not there");
        return vec![
            finding
                .on(path.display())
                .hint("dr-agent run makes it, on the other side; is its file system mounted here?"),
        ];
    }
    let asked = tokio::time::timeout(STORE_WITHIN, Box::pin(probe(archive, writes))).await;
    let errors = asked.unwrap_or_else(|_| vec![ArchiveFlaw::Silent]);
    let found = |flaw: &ArchiveFlaw| flaw.finding(at).on(&archive.url);
    match errors.as_slice() {
        [] if !writes => {
            let done = "can be read and listed; writing was not tried, because nothing is written from here";
            vec![at.ok("archive_store", done).on(&archive.url)]
        }
        [] => {
            let how = match &archive.encryption {
                Encryption::Default => String::new(),
                Encryption::S3 => ", under SSE-S3".to_owned(),
                Encryption::Kms { key } => format!(", under SSE-KMS with {key}"),
            };
            let done = format!("a small object could be written, read, listed and deleted{how}");
            vec![at.ok("archive_store", done).on(&archive.url)]
        }
        flaws => flaws.iter().map(found).collect(),
    }
}

/// Whoever may not ask the bucket for its rules is told nothing.
async fn uploads(at: &FindingPlace, archive: &Archive) -> Option<Finding> {
    let asking = async {
        let store = Store::as_it_is(&archive.url, &archive.encryption).await;
        store.ok()?.ends_abandoned_uploads().await
    };
    let asked = tokio::time::timeout(STORE_WITHIN, Box::pin(asking)).await;
    let none = matches!(asked, Ok(Some(false)));
    none.then(|| {
        let message = "no lifecycle rule of the bucket ends incomplete multipart uploads";
        at.note("archive_uploads", message).on(&archive.url).hint(
            "what a killed agent was uploading stays, is in no listing, and is paid for: give the bucket a rule with \
             AbortIncompleteMultipartUpload after a day",
        )
    })
}

/// `run` and `backup` make it; but where a file system is not mounted that is the wrong one.
fn not_there(at: &FindingPlace, path: &Path) -> Finding {
    let hint = "create it and give it to the user dr-agent runs as, or mend archive.url";
    let mut finding = host::writable(at, "archive_store", path, hint);
    if finding.severity == Severity::Ok {
        finding.severity = Severity::Note;
        finding.hint = Some("if it should be there, its file system is not mounted".to_owned());
    }
    finding
}

/// What is wrong with the store.
enum ArchiveFlaw {
    Store(StoreError),
    /// Another client's object could be in the way of the probe, which has a name of its own.
    Exists,
    /// It gave back something else, or did not list what is there.
    Forgets(&'static str),
    /// It replaces what it has.
    Overwrites(&'static str),
    /// No answer in time.
    Silent,
}

impl ArchiveFlaw {
    fn is_overwriting(&self) -> bool {
        matches!(self, Self::Overwrites(_))
    }

    fn finding(&self, at: &FindingPlace) -> Finding {
        let (message, hint) = match self {
            Self::Store(error) => (chain(error), error.hint()),
            Self::Exists => (
                "an object that was never written is there already".to_owned(),
                Some("this is no store that keeps If-None-Match: use another".to_owned()),
            ),
            Self::Forgets(what) => (
                format!("an object that was just written {what}"),
                Some("the archive needs a store that shows at once what it took".to_owned()),
            ),
            Self::Overwrites(how) => (
                format!("an object that was there already was overwritten {how}"),
                Some(
                    "this is no store that keeps If-None-Match: use another; agents would overwrite one another's \
                     objects"
                        .to_owned(),
                ),
            ),
            Self::Silent => (
                format!("no answer within {STORE_WITHIN:?}"),
                Some("check DNS, firewall and AWS_ENDPOINT_URL".to_owned()),
            ),
        };
        let finding = at.error("archive_store", message);
        match hint {
            Some(hint) => finding.hint(hint),
            None => finding,
        }
    }
}

/// Writes, reads, lists and deletes; or only reads and lists.
async fn probe(archive: &Archive, writes: bool) -> Vec<ArchiveFlaw> {
    let store = match Store::as_it_is(&archive.url, &archive.encryption).await {
        Ok(store) => store,
        Err(error) => return vec![ArchiveFlaw::Store(error)],
    };
    let name = format!("{PROBES}{:016x}", rand::random::<u64>());
    let mut flaws = Vec::new();
    let mut written = false;
    if writes {
        match store.put_new(&name, PROBE_BYTES).await {
            Ok(Put::Created) => {
                written = true;
                flaws.extend(overwrites(&store, &name).await);
            }
            Ok(Put::Exists) => return vec![ArchiveFlaw::Exists],
            Err(error) => {
                let rest_may_work = is_a_right(&error);
                flaws.push(ArchiveFlaw::Store(error));
                if !rest_may_work {
                    return flaws;
                }
            }
        }
    }
    // What is not there may be asked for as well: the answer tells whether that is allowed.
    match store.get(&name).await {
        // It may have been overwritten by now, which has been said.
        Ok(body) if written && body != PROBE_BYTES && body != SECOND_BYTES => {
            flaws.push(ArchiveFlaw::Forgets("is another"));
        }
        Ok(body) if body == SECOND_BYTES && !flaws.iter().any(ArchiveFlaw::is_overwriting) => {
            flaws.push(ArchiveFlaw::Overwrites(
                "although the store said that it was not",
            ));
        }
        Err(StoreError::NotFound { .. }) if written => {
            flaws.push(ArchiveFlaw::Forgets("is not there"));
        }
        Ok(_) | Err(StoreError::NotFound { .. }) => {}
        Err(error) => {
            let rest_may_work = is_a_right(&error);
            flaws.push(ArchiveFlaw::Store(error));
            if !rest_may_work && !writes {
                return flaws;
            }
        }
    }
    match store.list(PROBES, None).await {
        Ok(listed) if written && !listed.iter().any(|object| object.name == name) => {
            flaws.push(ArchiveFlaw::Forgets("is not listed"));
        }
        Ok(_) => {}
        Err(error) => flaws.push(ArchiveFlaw::Store(error)),
    }
    if writes && let Err(error) = store.delete(&name).await {
        flaws.push(ArchiveFlaw::Store(error));
    }
    flaws
}

/// What is wrong with writing over an object: as a whole, and in parts as large ones are written.
async fn overwrites(store: &Store, name: &str) -> Vec<ArchiveFlaw> {
    let judge = |put: Result<Put, StoreError>, how: &'static str| match put {
        Ok(Put::Exists) => None,
        Ok(Put::Created) => Some(ArchiveFlaw::Overwrites(how)),
        Err(error) => Some(ArchiveFlaw::Store(error)),
    };
    let whole = store.put_new(name, SECOND_BYTES).await;
    let parts = store.put_new_in_parts(name, SECOND_BYTES).await;
    [
        judge(whole, "by a write"),
        judge(parts, "by an upload in parts"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Whether only what was asked is refused, and another request may succeed.
fn is_a_right(error: &StoreError) -> bool {
    matches!(error, StoreError::S3 { refusal, .. } if refusal.is_a_right())
}

/// The directory, and whether its file system holds what may wait in it.
fn spool(at: &FindingPlace, archive: &Archive, databases: usize) -> Vec<Finding> {
    let directory = &archive.spool_directory;
    let hint = "create it and give it to the user dr-agent runs as, or set archive.spool_directory; \
                the change log waits there for the store";
    let mut findings = vec![host::writable(at, "spool_directory", directory, hint)];
    if findings[0].severity == Severity::Ok
        && let Some(free) = free_bytes(host::existing(directory))
    {
        findings.extend(room(at, archive, databases, free));
    }
    findings
}

/// What other users of the file system need, and what waits in the spool already, is left out of account.
fn room(at: &FindingPlace, archive: &Archive, databases: usize, free: u64) -> Option<Finding> {
    let needed = archive.spool_bytes.saturating_mul(databases as u64);
    (free < needed).then(|| {
        let consequence = match archive.required {
            true => "replication waits for the store",
            false => "the change log has a gap",
        };
        at.warning(
            "spool_room",
            format!(
                "its file system has {} free, and archive.spool_bytes is {} for {}",
                size(free),
                size(archive.spool_bytes),
                counted(databases, "database")
            ),
        )
        .on(archive.spool_directory.display())
        .hint(format!(
            "free space, lower archive.spool_bytes, or set archive.spool_directory; when the store is away and \
             the disk is full, {consequence}"
        ))
    })
}

fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// How large segments become, and how many.
fn segments(at: &FindingPlace, config: &Config, archive: &Archive) -> Vec<Finding> {
    let mut findings = Vec::new();
    // One is being uploaded while the next is written.
    if archive.spool_bytes / 2 < archive.segment_bytes {
        findings.push(
            at.warning(
                "segment_bytes",
                format!(
                    "the spool ({}) does not hold two segments ({} each)",
                    size(archive.spool_bytes),
                    size(archive.segment_bytes)
                ),
            )
            .hint("raise archive.spool_bytes, or lower archive.segment_bytes"),
        );
    }
    // The heartbeat sees to it that there is something to write.
    let age = (config.objectives.rpo / 2).max(config.source.heartbeat_every);
    let kept = archive.retention.as_secs_f64() / age.as_secs_f64().max(1e-3);
    if kept > SEGMENTS_MAX {
        findings.push(
            at.warning(
                "segment_age",
                format!(
                    "a segment every {age:?} makes about {:.1} million objects for each database within the \
                     retention",
                    kept / 1e6
                ),
            )
            .hint(
                "a restore lists all of them first, and S3 charges for each: raise objectives.rpo, or lower \
                 archive.retention",
            ),
        );
    }
    findings
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(archive: &str) -> Config {
        let text = format!(
            "[source]\nurl = \"postgres://a@localhost/x\"\n[replica]\nurl = \"postgres://b@localhost/y\"\n\
             {archive}\n[archive]\nurl = \"file:///nowhere/at/all\"\n"
        );
        Config::parse("f", &text, []).unwrap()
    }

    fn at() -> FindingPlace {
        FindingPlace::server(FindingSide::Agent)
    }

    #[test]
    fn a_disk_smaller_than_what_may_wait_is_a_warning_with_numbers() {
        let mut archive = config("").archive.unwrap();
        archive.spool_bytes = 10 << 30;
        assert_eq!(room(&at(), &archive, 2, 20 << 30), None);
        let finding = room(&at(), &archive, 3, 20 << 30).unwrap();
        assert_eq!(finding.severity, Severity::Warning);
        for part in ["20.0 GiB free", "10.0 GiB", "3 databases"] {
            assert!(finding.message.contains(part), "{}", finding.message);
        }
        assert!(finding.hint.unwrap().contains("gap"));
        archive.required = true;
        let finding = room(&at(), &archive, 3, 0).unwrap();
        assert!(finding.hint.unwrap().contains("replication waits"));
    }

    #[test]
    fn segments_must_fit_the_spool_and_not_be_countless() {
        let found = |text: &str, change: fn(&mut Archive)| -> Vec<&'static str> {
            let config = config(text);
            let mut archive = config.archive.clone().unwrap();
            change(&mut archive);
            let findings = segments(&at(), &config, &archive);
            findings.iter().map(|finding| finding.code).collect()
        };
        assert_eq!(found("", |_| {}), Vec::<&str>::new());
        assert_eq!(
            found("", |archive| archive.spool_bytes = 100 << 20),
            ["segment_bytes"]
        );
        assert_eq!(found("[objectives]\nrpo = \"1s\"", |_| {}), ["segment_age"]);
    }
}
