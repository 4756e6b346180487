//! Carrier: a way for long payloads of a group's exchanges beside the link, such as NCCL's between GPUs.
//!
//! Who sends announces a payload in the frame that goes over the link in any case, with its call and its length. So ranks
//! that are at other calls, late or gone are found as ever, and a carrier is asked for nothing that its other end does not
//! expect. It carries bytes and adds nothing up: sums keep the order that `collective` gives them, whatever carries.

use super::link::{Broken, Call};
use rehearsal_kernels::HostMemory;
use std::sync::Arc;
use std::time::Duration;

/// See the module.
pub trait Carrier: Send + Sync {
    /// Payloads of so many bytes and more go this way.
    fn shortest(&self) -> usize;

    /// Sends payloads to ranks, and takes as many bytes from ranks as they have announced, all at once. Whoever is named
    /// is at this call or comes to it; whoever does not within the deadline ends the run.
    fn exchange(
        &self,
        call: &Call,
        out: &[(usize, Vec<u8>)],
        into: &[(usize, usize)],
        deadline: Duration,
    ) -> Result<Vec<Vec<u8>>, Broken>;

    /// Memory of the host that the carrier's device reads by itself.
    fn host_memory(&self) -> Arc<dyn HostMemory>;
}

/// The last byte of a frame: its payload is in it, or is announced.
const HERE: u8 = 0;
const BESIDE: u8 = 1;

/// What goes over the link for a payload, and the payload itself if it goes beside it.
pub(super) fn announce(mut payload: Vec<u8>, shortest: usize) -> (Vec<u8>, Option<Vec<u8>>) {
    if payload.len() < shortest {
        payload.push(HERE);
        return (payload, None);
    }
    let mut frame = (payload.len() as u64).to_le_bytes().to_vec();
    frame.push(BESIDE);
    (frame, Some(payload))
}

/// Leaves the payload of a frame in it, or tells the length of the one that it announces; `None` if it does neither.
pub(super) fn announced(frame: &mut Vec<u8>) -> Option<Option<usize>> {
    match frame.pop()? {
        HERE => Some(None),
        BESIDE => {
            let length = u64::from_le_bytes(frame.as_slice().try_into().ok()?);
            frame.clear();
            usize::try_from(length).ok().map(Some)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_in_its_frame_or_announced_with_its_length() {
        for length in [0, 1, 7, 8, 9, 300] {
            let payload: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let (mut frame, beside) = announce(payload.clone(), 8);
            let told = announced(&mut frame).unwrap();
            match length < 8 {
                true => assert_eq!((frame, beside, told), (payload, None, None)),
                false => assert_eq!((frame, beside, told), (vec![], Some(payload), Some(length))),
            }
        }
        for broken in [vec![], vec![2], vec![5, BESIDE]] {
            assert_eq!(announced(&mut broken.clone()), None, "{broken:?}");
        }
    }
}
