//! ● Where things are in the archive.
//!
//! ```text
//! <prefix>/<stream>/<history>/log/<start>-<end>.zst     a segment of the change log
//! <prefix>/<stream>/<history>/base/<lsn>/…              a base backup
//! <prefix>/<stream>/<history>/aside/<start>-<end>.….zst what was in a segment's place and was none
//! ```
//! Pure. LSNs are written with sixteen hexadecimal digits, so that names sort as LSNs do. LSNs of different histories have
//! nothing to do with each other: a source that was restored or failed over begins another one.

use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;

/// A stretch of the source's WAL, from the end of one transaction to the end of a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// The end of the last transaction before it.
    pub start: PgLsn,
    /// The end of its last transaction.
    pub end: PgLsn,
}

impl Span {
    /// As in names of files and objects, without their endings.
    pub fn name(self) -> String {
        format!("{}-{}", digits(self.start), digits(self.end))
    }

    /// Reads [`Span::name`].
    pub fn parse(name: &str) -> Option<Self> {
        let (start, end) = name.split_once('-')?;
        let span = Self {
            start: parse_digits(start)?,
            end: parse_digits(end)?,
        };
        (span.start < span.end).then_some(span)
    }
}

/// An LSN as in names.
pub(super) fn digits(lsn: PgLsn) -> String {
    format!("{:016X}", u64::from(lsn))
}

/// Reads [`digits`].
pub(super) fn parse_digits(text: &str) -> Option<PgLsn> {
    let fits = text.len() == 16
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    let number = fits.then(|| u64::from_str_radix(text, 16).ok())??;
    Some(PgLsn::from(number))
}

/// The names of one stream's objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    stream: StreamName,
    history: History,
}

impl Layout {
    /// For one history of a stream.
    pub fn new(stream: &StreamName, history: History) -> Self {
        Self {
            stream: stream.clone(),
            history,
        }
    }

    /// Whose objects these are.
    pub fn stream(&self) -> &StreamName {
        &self.stream
    }

    /// What the names of all of its objects begin with.
    pub fn root(&self) -> String {
        format!("{}/{}/", self.stream, self.history)
    }

    /// What their LSNs are of.
    pub fn history(&self) -> History {
        self.history
    }

    /// What the names of all segments begin with.
    pub fn log(&self) -> String {
        format!("{}log/", self.root())
    }

    /// A segment.
    pub fn segment(&self, span: Span) -> String {
        format!("{}{}.zst", self.log(), span.name())
    }

    /// Where something goes that was under a segment's name and is none.
    pub fn aside(&self, span: Span, number: u32) -> String {
        format!("{}aside/{}.{number:08x}.zst", self.root(), span.name())
    }

    /// The segment that has this name.
    pub fn parse_segment(&self, name: &str) -> Option<Span> {
        let name = name.strip_prefix(&self.log())?.strip_suffix(".zst")?;
        Span::parse(name)
    }

    /// What the names of all base backups begin with.
    pub fn bases(&self) -> String {
        format!("{}base/", self.root())
    }

    /// What the names of one base backup's objects begin with.
    pub fn base(&self, lsn: PgLsn) -> String {
        format!("{}{}/", self.bases(), digits(lsn))
    }
}
