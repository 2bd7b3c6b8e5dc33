//! Sinks: places where a batch becomes durable. The replica under route `direct`, a Kinesis stream under route
//! `kinesis`; the archive takes batches beside either ([`crate::archive::log`]).
//!
//! # What a sink promises
//! It is given batches in order, each once per session. An outcome that is `Ok` means the batch is durable:
//! the ledger may let the slot forget it. After an error the session is over; the pipeline starts
//! again from the progress row, or from where the slot was confirmed.

pub mod kinesis;
pub mod replica;
