//! Sinks: places where a batch becomes durable. In this version there is one, the replica.
//!
//! # What a sink promises
//! `apply` is called with batches in order, each once per session. `Ok` means the batch is durable:
//! the ledger may let the slot forget it. After an error the session is over; the pipeline starts
//! again from the progress row, which says whether the batch was committed after all.

pub mod replica;
