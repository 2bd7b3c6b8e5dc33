//! ● Records into calls of PutRecords. Pure.
//!
//! # Invariants
//! - A call is never empty and within the limits of the API; a record that no call can hold is said before anything
//!   is sent.
//! - Every record is in exactly one call, in the order given.
//!
//! # What it does not do
//! It does not choose partition keys, and it does not aggregate: one record of ours is one record of Kinesis.

use bytes::Bytes;

/// The most bytes of one record, data and partition key together.
///
/// Source: API reference, PutRecords. A stream may be set to take more; this is what every stream takes.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

/// Records of one call.
pub(super) const CALL_RECORDS_MAX: usize = 500;

/// Bytes of one call, data and partition keys together.
pub(super) const CALL_BYTES_MAX: usize = 5 << 20;

/// Characters of a partition key.
const KEY_CHARS_MAX: usize = 256;

/// What is put into the stream, and comes out of it with the same data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Decides about the shard: 1 to 256 characters.
    pub partition_key: String,
    /// The record.
    pub data: Bytes,
}

impl Record {
    /// What counts against the limits.
    pub(super) fn bytes(&self) -> usize {
        self.data.len() + self.partition_key.len()
    }

    fn check(&self) -> Result<(), String> {
        let bytes = self.bytes();
        if bytes > RECORD_BYTES_MAX {
            return Err(format!(
                "a record of {bytes} bytes with its partition key is larger than {RECORD_BYTES_MAX}"
            ));
        }
        let characters = self.partition_key.chars().count();
        if characters == 0 || characters > KEY_CHARS_MAX {
            return Err(format!(
                "a partition key of {characters} characters is not of 1 to {KEY_CHARS_MAX}"
            ));
        }
        Ok(())
    }
}

/// Packs records into as few calls as their order allows; the error says which record none can hold.
pub(super) fn pack(records: Vec<Record>) -> Result<Vec<Vec<Record>>, String> {
    records.iter().try_for_each(Record::check)?;
    let mut calls: Vec<Vec<Record>> = Vec::new();
    let mut bytes = 0;
    for record in records {
        match calls.last_mut() {
            Some(call)
                if call.len() < CALL_RECORDS_MAX && bytes + record.bytes() <= CALL_BYTES_MAX =>
            {
                bytes += record.bytes();
                call.push(record);
            }
            _ => {
                bytes = record.bytes();
                calls.push(vec![record]);
            }
        }
    }
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(key: usize, data: usize) -> Record {
        Record {
            partition_key: "k".repeat(key),
            data: Bytes::from(vec![0; data]),
        }
    }

    #[test]
    fn a_record_at_the_limit_goes_alone_and_one_above_it_nowhere() {
        let full = record(6, RECORD_BYTES_MAX - 6);
        let calls = pack(vec![full; 6]).unwrap();
        assert_eq!(calls.iter().map(Vec::len).collect::<Vec<_>>(), [5, 1]);
        let calls = pack(vec![record(1, 0); 1001]).unwrap();
        assert_eq!(
            calls.iter().map(Vec::len).collect::<Vec<_>>(),
            [500, 500, 1]
        );
        assert_eq!(pack(Vec::new()), Ok(Vec::new()));
        for (wrong, reason) in [
            (record(6, RECORD_BYTES_MAX - 5), "larger"),
            (record(0, 1), "0 characters"),
            (record(257, 1), "257 characters"),
        ] {
            let said = pack(vec![record(1, 1), wrong]).unwrap_err();
            assert!(said.contains(reason), "{said}");
        }
    }

    proptest! {
        #[test]
        fn every_record_is_in_one_call_within_the_limits(
            sizes in prop::collection::vec(
                (1..=256usize, prop_oneof![0..300usize, 0..RECORD_BYTES_MAX - 256]), 0..700)
        ) {
            // Slices of one buffer: sizes matter, not bytes.
            let all = Bytes::from(vec![0; RECORD_BYTES_MAX]);
            let records: Vec<Record> = sizes
                .iter()
                .map(|(key, data)| Record { partition_key: "k".repeat(*key), data: all.slice(..*data) })
                .collect();
            let calls = pack(records.clone()).unwrap();
            for call in &calls {
                prop_assert!(!call.is_empty() && call.len() <= CALL_RECORDS_MAX);
                let bytes: usize = call.iter().map(Record::bytes).sum();
                prop_assert!(bytes <= CALL_BYTES_MAX);
            }
            let lengths = |records: &[Record]| -> Vec<(usize, usize)> {
                records.iter().map(|r| (r.partition_key.len(), r.data.len())).collect()
            };
            prop_assert_eq!(lengths(&calls.concat()), lengths(&records));
        }
    }
}
