//! Versioned wire and file formats of dr-agent.
//!
//! `.proto` files in, prost types out, and the framing around them. Nothing here knows what a
//! PostgreSQL change means, compresses, or touches a file: bytes in, bytes out.

/// The change log: committed transactions in a Kinesis stream or in the archive.
pub mod changelog {
    /// Version 1 of the format.
    #[allow(
        missing_docs,
        clippy::doc_markdown,
        reason = "generated; the fields are documented in the .proto file"
    )]
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/dr_agent.changelog.v1.rs"));
    }
}

/// The journal: what the agent keeps of large transactions while they arrive.
pub mod journal {
    /// Version 1 of the format.
    #[allow(
        missing_docs,
        clippy::doc_markdown,
        reason = "generated; the fields are documented in the .proto file"
    )]
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/dr_agent.journal.v1.rs"));
    }
}
