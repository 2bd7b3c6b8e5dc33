//! ● What a batch is and becomes: transactions of the stream put together, folded to net changes, dealt to lanes, and counted off by
//! the ledger.
//!
//! ```text
//! transaction ▶ [shipment] ▶ batch ▶ net ▶ lanes          ledger: what is durable, and so what the slot may be told
//!      └ spill, where it is too large for memory          changelog: the same, packed for stream and archive
//! ```
//! It knows nothing of sources and sinks. `spill` and what of `changelog` reads spill files are the only I/O.

pub mod batch;
pub mod changelog;
pub mod counts;
pub mod lanes;
pub mod ledger;
pub mod net;
pub mod shipment;
pub mod spill;
#[cfg(test)]
pub(crate) mod testing;
pub mod transaction;
