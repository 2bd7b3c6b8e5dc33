//! The checksum over what a part says of itself.
//!
//! Its messages have one of their own, over the bytes before compression. This one covers the rest: a part that claims to belong
//! to another batch, or its batch to begin elsewhere, would be put together with the wrong ones.

use bytes::Bytes;
use prost::Message as _;

use super::Part;

/// The first version that has it.
const SINCE: u32 = 2;

/// The part with its checksum.
pub fn sealed(mut part: Part) -> Part {
    part.header_crc32c = sum(&part);
    part
}

/// Whether a part says what its writer said. One without the checksum is taken at its word.
pub fn is_intact(part: &Part) -> bool {
    // A version that was damaged into an earlier one has it all the same.
    let has_none = part.version < SINCE && part.header_crc32c == 0;
    has_none || part.header_crc32c == sum(part)
}

fn sum(part: &Part) -> u32 {
    let header = Part {
        messages: Bytes::new(),
        header_crc32c: 0,
        ..part.clone()
    };
    crc32c::crc32c(&header.encode_to_vec())
}
