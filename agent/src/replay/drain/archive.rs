//! What the archive holds beyond a replica that is being promoted: segments of its change log, and what waits in the agent's spool
//! where that is on this machine.
//!
//! # Invariants
//! - From where the replica stands without a gap, in commit order, each transaction once: as a restore reads it.
//! - What is there and cannot be applied is named: behind a gap, or damaged.
//! - The spool is only read: whoever writes there goes on.
//!
//! # What it does not do
//! It waits for no upload: what is there when it is looked at is all it takes.

use std::time::Duration;

use tokio::time::timeout;

use super::error::Failed;
use crate::archive::log::{Layout, LogChain, SegmentReader, Span, Spooled};
use crate::cloud::store::Store;
use crate::config::Config;
use crate::error::{Class, Classify as _, chain};
use crate::pg::PgLsn;
use crate::setup::Ready;
use crate::source::LogIntake;

/// How long the archive may take to say what it has: the users wait.
const LISTED_WITHIN: Duration = Duration::from_secs(15);

/// What is there beyond a position.
pub(super) struct Archived {
    store: Store,
    layout: Layout,
    url: String,
    from: PgLsn,
    /// There is a log of this history at all.
    has_log: bool,
    chain: LogChain,
    spooled: Vec<Spooled>,
}

/// Looks what the archive has beyond where the replica is; none where there is no archive.
pub(super) async fn find(config: &Config, prepared: &Ready) -> Result<Option<Archived>, Failed> {
    let Some(archive) = &config.archive else {
        return Ok(None);
    };
    let layout = Layout::new(&prepared.stream, prepared.history);
    let listing = async {
        let store = Store::as_it_is(&archive.url, &archive.encryption).await?;
        let objects = store.list(&layout.log(), None).await?;
        Ok::<_, Failed>((store, objects))
    };
    let listed = timeout(LISTED_WITHIN, listing).await;
    let (store, objects) = listed.unwrap_or(Err(Failed::ArchiveSilent(LISTED_WITHIN)))?;
    let spans: Vec<Span> = objects
        .iter()
        .filter_map(|object| layout.parse_segment(&object.name))
        .collect();
    let directory = crate::flow::spill::directory_of(&archive.spool_directory, &prepared.stream)
        .join(prepared.history.to_string());
    Ok(Some(Archived {
        store,
        layout,
        url: archive.url.to_string(),
        from: prepared.end_lsn,
        has_log: !spans.is_empty(),
        chain: LogChain::from(prepared.end_lsn, &spans),
        spooled: Spooled::in_directory(&directory),
    }))
}

impl Archived {
    /// Whether there may be anything to apply.
    pub(super) fn leads_on(&self) -> bool {
        !self.chain.spans.is_empty() || !self.spooled.is_empty()
    }

    /// What is there, in words.
    pub(super) fn says(&self) -> String {
        let mut said = match self.chain.spans.len() {
            0 => format!(
                "the archive {} holds nothing beyond {}",
                self.url, self.from
            ),
            count => format!(
                "the archive {} leads from {} on to {} ({count} segments)",
                self.url, self.from, self.chain.end
            ),
        };
        if !self.spooled.is_empty() {
            said += &format!("; {} more wait in the spool here", self.spooled.len());
        }
        for warning in self.warnings() {
            said += "; ";
            said += &warning;
        }
        said
    }

    /// What is known beforehand not to be applied.
    pub(super) fn warnings(&self) -> Vec<String> {
        if !self.has_log {
            return vec![format!(
                "the archive {} holds no change log of this replica's source: if it should, check archive.url",
                self.url
            )];
        }
        let gap = self.chain.resumes.map(|next| {
            format!(
                "the archive's change log goes on at {next}, but from {} to there it is missing: what is behind was not applied",
                self.chain.end
            )
        });
        gap.into_iter().collect()
    }

    /// Hands everything over; returns what could not be, in words.
    pub(super) async fn read(self, mut intake: LogIntake) -> Result<Vec<String>, Failed> {
        let mut warnings = self.warnings();
        let mut position = self.from;
        for span in &self.chain.spans {
            match self.segment(*span, &mut intake).await {
                Ok(true) => position = span.end,
                // Nobody wants more: the apply has failed, and says why.
                Ok(false) => return Ok(warnings),
                Err(Failed::Archive(error)) if error.class() == Class::Definite => {
                    warnings.push(format!(
                        "what the archive holds from {} on was not applied: {}",
                        intake.end_lsn(),
                        chain(&error)
                    ));
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        for spooled in &self.spooled {
            if spooled.start > position {
                warnings.push(format!(
                    "{} holds what committed behind {}, but from {position} to there nothing is left: it was not applied",
                    spooled.path.display(),
                    spooled.start
                ));
                break;
            }
            let mut reader = spooled.open()?;
            while let Some(messages) = reader.next_messages()? {
                for message in messages {
                    if !intake.take(message).await? {
                        return Ok(warnings);
                    }
                }
            }
            position = position.max(intake.end_lsn());
        }
        Ok(warnings)
    }

    async fn segment(&self, span: Span, intake: &mut LogIntake) -> Result<bool, Failed> {
        let mut segment = SegmentReader::open(&self.store, &self.layout, span).await?;
        while let Some(messages) = segment.next_messages().await? {
            for message in messages {
                if !intake.take(message).await? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
