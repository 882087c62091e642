//! What goes wrong on a device while transfers use it.
#![expect(
    unsafe_code,
    reason = "foreign memory and streams are used by promise, and the promise is broken here"
)]

use crate::copies::{Pair, SOON, bytes, noise};
use crate::raw;
use kvxfer_core::cuda::{Device, Fence};
use kvxfer_core::{ErrorCode, Memory, Piece, TransferOptions};

pub(crate) fn a_stream_of_another_context_is_refused() {
    raw::foreign_context(|_, stream| {
        // SAFETY: a live stream.
        let e = unsafe { Fence::of_stream(0, stream) }.unwrap_err();
        assert_eq!(e.code(), ErrorCode::InvalidArgument);
        assert!(e.to_string().contains("primary context of cuda:0"), "{e}");
    });
    // SAFETY: the default stream.
    assert!(unsafe { Fence::of_stream(0, 0) }.unwrap().is_done().is_ok());
    // SAFETY: no device, no use of the stream.
    assert_eq!(unsafe { Fence::of_stream(5, 0) }.unwrap_err().code(), ErrorCode::NotAvailable);
}

fn device_pair(len: usize) -> (Pair, std::sync::Arc<Memory>) {
    let device = Device::get(0).unwrap();
    let target = Memory::device(&device, len).unwrap();
    let local = Memory::device(&device, len).unwrap();
    local.write_at(0, &noise(len, 1)).unwrap();
    (Pair::new(local, target.clone()), target)
}

/// The 40th copy fails; each transfer takes one. All others are right, and the failed one says why.
pub(crate) fn a_failed_submission_ends_the_transfer() {
    let (pair, target) = device_pair(4096);
    let mut failed = 0;
    for _ in 0..60 {
        let whole = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
        match pair.peer.write(&pair.local, &pair.remote, &whole, TransferOptions::default()) {
            Ok(t) => assert_eq!(t.wait(SOON).unwrap().error, None),
            Err(e) => {
                assert!(e.to_string().contains("cuMemcpyAsync of 4096 bytes: CUDA_ERROR_UNKNOWN"), "{e}");
                failed += 1;
            }
        }
    }
    assert_eq!(failed, 1);
    assert_eq!(bytes(&target), noise(4096, 1));
    pair.end();
}

/// The owner frees memory that a queued transfer is going to read, against its promise: the transfer ends with an error.
pub(crate) fn memory_freed_too_early_ends_the_transfer() {
    println!("LEAKS ON PURPOSE: after this error the context answers nothing else");
    let device = Device::get(0).unwrap();
    let source = raw::Allocation::new(0, 4096);
    // SAFETY: broken below, on purpose.
    let local = unsafe { Memory::device_foreign(source.address, 4096) }.unwrap();
    let pair = Pair::new(local, Memory::device(&device, 4096).unwrap());
    let stream = raw::Stream::new(0);
    stream.sleep(100);
    // SAFETY: a live stream.
    let fence = unsafe { Fence::of_stream(0, stream.address()) }.unwrap();
    let options = TransferOptions { after: Some(fence), ..TransferOptions::default() };
    let whole = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
    let t = pair.peer.write(&pair.local, &pair.remote, &whole, options).unwrap();
    source.free();
    let report = t.wait(SOON).unwrap();
    assert_eq!(report.error, Some(ErrorCode::Transport));
    assert!(report.detail.unwrap().contains("CUDA_ERROR_ILLEGAL_ADDRESS"));
    // And so does every later one: the device's context is broken for good.
    let e = pair.peer.write(&pair.local, &pair.remote, &whole, TransferOptions::default());
    assert!(e.is_err() || e.unwrap().wait(SOON).unwrap().error.is_some());
    pair.end();
}

pub(crate) fn a_context_destroyed_first_is_an_error() {
    println!("LEAKS ON PURPOSE: what was made in the context went with it");
    let (pair, _target) = device_pair(4096);
    let whole = [Piece { local_offset: 0, remote_offset: 0, len: 4096 }];
    let t = pair.peer.write(&pair.local, &pair.remote, &whole, TransferOptions::default()).unwrap();
    assert_eq!(t.wait(SOON).unwrap().error, None);
    raw::reset(0);
    let e = pair.peer.write(&pair.local, &pair.remote, &whole, TransferOptions::default()).unwrap_err();
    assert!(e.to_string().contains("destroyed"), "{e}");
    assert!(pair.local.memory().read_at(0, &mut [0; 8]).unwrap_err().to_string().contains("destroyed"));
    pair.end();
}
