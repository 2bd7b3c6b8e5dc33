//! ● How the source is read, as the metrics say it.

/// How the source is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reader {
    /// From the walsender, each message as it comes.
    #[default]
    Eager,
    /// From the walsender, letting messages gather, because we are behind or the source is busy.
    Lazy,
    /// Through SQL, in windows, because we are far behind.
    CatchUp,
}

impl Reader {
    /// Every way to read.
    pub const ALL: [Self; 3] = [Self::Eager, Self::Lazy, Self::CatchUp];

    /// As in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Lazy => "lazy",
            Self::CatchUp => "catch_up",
        }
    }
}
