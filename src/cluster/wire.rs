//! Wire: MessagePack between processes, and the seal on a frame that comes from outside.
//!
//! A sealed frame is its length, a BLAKE3 tag under the run's secret, epoch, sender, receiver, number, and what it carries. Who does
//! not know the secret can make none; one of another run, for somebody else, or seen before is refused by name.
//!
//! Invariants:
//!   * frames of one rank to another are opened in the order in which they were sealed, each once
//!   * nothing longer than its bound is read, and no memory is taken for bytes that have not come

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{ErrorKind, Read};
use thiserror::Error;

/// Bytes of a frame between ranks that know each other, at most.
pub const LONGEST: usize = 1 << 28;

/// Bytes of a frame before that.
pub const LONGEST_HELLO: usize = 1 << 12;

/// Bytes of tag, epoch, sender, receiver and number.
const HEAD: usize = 32 + 8 + 4 + 4 + 8;

/// What only the ranks of one run know.
#[derive(Clone, Copy)]
pub struct Secret {
    /// Key of the tags.
    pub key: [u8; 32],
    /// Number of the run: frames of an earlier one in the same place are known by it.
    pub epoch: u64,
}

/// Why a frame is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// Longer than its bound.
    #[error("a frame of {bytes} bytes, where {most} are the most")]
    Long {
        /// Its bytes.
        bytes: usize,
        /// The bound.
        most: usize,
    },
    /// Too short for a frame, or what it carries is no MessagePack of the kind.
    #[error("a frame that cannot be read ({0})")]
    Form(String),
    /// Not of somebody who knows the secret.
    #[error("a frame with a wrong tag")]
    Tag,
    /// Of another run.
    #[error("a frame of run {epoch:016x}, this is {own:016x}")]
    Epoch {
        /// Its run.
        epoch: u64,
        /// This one.
        own: u64,
    },
    /// Between other ranks.
    #[error("a frame from rank {from} to rank {to}")]
    Strange {
        /// Its sender.
        from: u32,
        /// Its receiver.
        to: u32,
    },
    /// Seen before, or one before it is missing.
    #[error("frame {number}, where {expected} is next")]
    Order {
        /// Its number.
        number: u64,
        /// The next one.
        expected: u64,
    },
}

/// A value as MessagePack, fields by name.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(value).expect("plain data has a form in MessagePack")
}

/// A value out of MessagePack.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    rmp_serde::from_slice(bytes).map_err(|error| WireError::Form(error.to_string()))
}

/// Seals what one rank sends to another, or opens it there: one for each direction.
pub struct Seal {
    secret: Secret,
    from: u32,
    to: u32,
    number: u64,
}

impl Seal {
    /// The seal of all that `from` sends to `to`.
    pub fn new(secret: Secret, from: usize, to: usize) -> Seal {
        let number = |rank| u32::try_from(rank).expect("ranks are fewer than 2^32");
        Seal { secret, from: number(from), to: number(to), number: 0 }
    }

    /// The next frame, its length included.
    pub fn close(&mut self, carried: &[u8]) -> Vec<u8> {
        let bytes = HEAD + carried.len();
        let length = u32::try_from(bytes).expect("a message is shorter than 4 GiB");
        let mut frame = Vec::with_capacity(4 + bytes);
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&[0; 32]);
        frame.extend_from_slice(&self.secret.epoch.to_le_bytes());
        frame.extend_from_slice(&self.from.to_le_bytes());
        frame.extend_from_slice(&self.to.to_le_bytes());
        frame.extend_from_slice(&self.number.to_le_bytes());
        frame.extend_from_slice(carried);
        let tag = blake3::keyed_hash(&self.secret.key, &frame[36..]);
        frame[4..36].copy_from_slice(tag.as_bytes());
        self.number += 1;
        frame
    }

    /// What the next frame carries; `frame` is without its length.
    pub fn open<'a>(&mut self, frame: &'a [u8]) -> Result<&'a [u8], WireError> {
        if frame.len() < HEAD {
            return Err(WireError::Form(format!("{} bytes", frame.len())));
        }
        let tag: [u8; 32] = frame[..32].try_into().expect("32 bytes");
        // Hashes are compared in constant time.
        if blake3::keyed_hash(&self.secret.key, &frame[32..]) != blake3::Hash::from(tag) {
            return Err(WireError::Tag);
        }
        let long = |at: usize| u64::from_le_bytes(frame[at..at + 8].try_into().expect("8 bytes"));
        let short = |at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().expect("4 bytes"));
        let (epoch, from, to, number) = (long(32), short(40), short(44), long(48));
        if epoch != self.secret.epoch {
            return Err(WireError::Epoch { epoch, own: self.secret.epoch });
        }
        if (from, to) != (self.from, self.to) {
            return Err(WireError::Strange { from, to });
        }
        if number != self.number {
            return Err(WireError::Order { number, expected: self.number });
        }
        self.number += 1;
        Ok(&frame[HEAD..])
    }
}

/// Who says to have sealed a frame, before anything shows it.
pub fn sender(frame: &[u8]) -> Option<usize> {
    let bytes = frame.get(40..44)?;
    Some(u32::from_le_bytes(bytes.try_into().expect("4 bytes")) as usize)
}

/// Reads a frame, without its length, of at most so many bytes; `None` where the stream ends before one begins.
pub fn read_frame(stream: &mut impl Read, most: usize) -> std::io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    if let Err(error) = stream.read_exact(&mut length) {
        return if error.kind() == ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > most {
        let long = WireError::Long { bytes, most };
        return Err(std::io::Error::new(ErrorKind::InvalidData, long));
    }
    // Grows with what comes: a length is easily written.
    let mut frame = Vec::new();
    stream.take(bytes as u64).read_to_end(&mut frame)?;
    match frame.len() == bytes {
        true => Ok(Some(frame)),
        false => Err(ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: Secret = Secret { key: [7; 32], epoch: 11 };

    fn frame(seal: &mut Seal, carried: &[u8]) -> Vec<u8> {
        let frame = seal.close(carried);
        read_frame(&mut frame.as_slice(), LONGEST).unwrap().unwrap()
    }

    #[test]
    fn frames_are_opened_once_and_in_their_order() {
        let (mut close, mut open) = (Seal::new(SECRET, 0, 3), Seal::new(SECRET, 0, 3));
        let frames: Vec<Vec<u8>> = (0..3).map(|i| frame(&mut close, &[i; 5])).collect();
        assert_eq!(open.open(&frames[0]), Ok(&[0; 5][..]));
        assert_eq!(open.open(&frames[0]), Err(WireError::Order { number: 0, expected: 1 }));
        assert_eq!(open.open(&frames[2]), Err(WireError::Order { number: 2, expected: 1 }));
        assert_eq!(open.open(&frames[1]), Ok(&[1; 5][..]));
        assert_eq!(open.open(&frames[2]), Ok(&[2; 5][..]));
    }

    #[test]
    fn a_frame_of_another_run_or_between_other_ranks_is_refused() {
        let other = Secret { epoch: 12, ..SECRET };
        let mut open = Seal::new(SECRET, 0, 3);
        let refused = |seal: &mut Seal, open: &mut Seal| open.open(&frame(seal, b"x")).err();
        let late = refused(&mut Seal::new(other, 0, 3), &mut open);
        assert_eq!(late, Some(WireError::Epoch { epoch: 12, own: 11 }));
        // A frame that is sent back to whom it came from.
        let back = refused(&mut Seal::new(SECRET, 3, 0), &mut open);
        assert_eq!(back, Some(WireError::Strange { from: 3, to: 0 }));
        let unknown = refused(&mut Seal::new(Secret { key: [8; 32], ..SECRET }, 0, 3), &mut open);
        assert_eq!(unknown, Some(WireError::Tag));
        assert_eq!(refused(&mut Seal::new(SECRET, 0, 3), &mut open), None);
    }

    #[test]
    fn a_length_takes_no_memory_and_is_refused_above_its_bound() {
        let long = (LONGEST as u32).to_le_bytes();
        let error = read_frame(&mut long.as_slice(), LONGEST).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        let error = read_frame(&mut long.as_slice(), LONGEST_HELLO).unwrap_err();
        assert!(error.to_string().contains("where 4096 are the most"), "{error}");
        assert!(read_frame(&mut [].as_slice(), LONGEST).unwrap().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

        #[test]
        fn no_change_of_a_frame_is_opened(carried: Vec<u8>, at: usize, bit in 0..8_u32) {
            let mut bytes = frame(&mut Seal::new(SECRET, 1, 0), &carried);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Seal::new(SECRET, 1, 0).open(&bytes), Err(WireError::Tag));
            let cut = bytes.len() - 1;
            prop_assert!(Seal::new(SECRET, 1, 0).open(&bytes[..cut]).is_err());
        }
    }
}
