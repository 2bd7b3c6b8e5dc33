//! ● A zstd stream that is taken apart as it comes. Pure.
//!
//! # Invariants
//! - Whether it ended where a frame ends, its checksum right, is known ([`Unzstd::is_whole`]): a stream that lost only that has
//!   given all of its bytes.

use std::io;

use zstd::stream::raw::{Decoder, InBuffer, Operation as _, OutBuffer};

/// Decompressed at a time.
const OUT_BYTES: usize = 128 << 10;

/// Takes compressed bytes, gives the others.
pub(super) struct Unzstd {
    decoder: Decoder<'static>,
    room: Vec<u8>,
    is_whole: bool,
}

impl Unzstd {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            decoder: Decoder::new()?,
            room: vec![0; OUT_BYTES],
            is_whole: false,
        })
    }

    /// Takes bytes; `give` gets what comes out of them.
    pub(super) fn push(&mut self, bytes: &[u8], mut give: impl FnMut(&[u8])) -> io::Result<()> {
        let mut input = InBuffer::around(bytes);
        loop {
            let mut output = OutBuffer::around(self.room.as_mut_slice());
            let hint = self.decoder.run(&mut input, &mut output)?;
            let given = output.pos();
            give(&self.room[..given]);
            self.is_whole = hint == 0;
            if input.pos() == bytes.len() && given < OUT_BYTES {
                return Ok(());
            }
        }
    }

    /// Whether what came so far ends where a frame ends.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(packed: &[u8], at_a_time: usize) -> (io::Result<Vec<u8>>, bool) {
        let mut unzstd = Unzstd::new().unwrap();
        let mut out = Vec::new();
        for piece in packed.chunks(at_a_time) {
            if let Err(error) = unzstd.push(piece, |bytes| out.extend_from_slice(bytes)) {
                return (Err(error), false);
            }
        }
        (Ok(out), unzstd.is_whole())
    }

    #[test]
    fn a_stream_that_is_cut_or_goes_on_is_not_whole() {
        let raw: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
        encoder.include_checksum(true).unwrap();
        io::Write::write_all(&mut encoder, &raw).unwrap();
        let packed = encoder.finish().unwrap();
        for at_a_time in [packed.len(), 1 << 14, 7] {
            let (out, whole) = unpacked(&packed, at_a_time);
            assert!(whole && out.unwrap() == raw);
            for cut in 1..=4 {
                let (out, whole) = unpacked(&packed[..packed.len() - cut], at_a_time);
                assert!(!whole && out.unwrap() == raw, "{cut}");
            }
            for rest in [&b"x"[..], b"xxx"] {
                let (_, whole) = unpacked(&[&packed, rest].concat(), at_a_time);
                assert!(!whole);
            }
        }
        let mut damaged = packed.clone();
        *damaged.last_mut().unwrap() ^= 1;
        assert!(unpacked(&damaged, 1 << 14).0.is_err());
        assert!(!unpacked(&[], 1).1);
    }
}
