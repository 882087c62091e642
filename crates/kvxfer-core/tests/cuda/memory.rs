//! Kinds of memory, and what cannot be had.
#![expect(unsafe_code, reason = "foreign memory is registered by promise")]

use crate::{raw, standin};
use kvxfer_core::cuda::{self, Device};
use kvxfer_core::memory::{HugePages, MemoryKind};
use kvxfer_core::{Agent, ErrorCode, Memory, TransportKind};
use std::sync::Arc;

fn foreign(address: u64, len: usize) -> kvxfer_core::Result<Arc<Memory>> {
    // SAFETY: each test frees its memory after the last use, or shows what is said when it did not.
    unsafe { Memory::device_foreign(address, len) }
}

fn holds_what_is_written(memory: &Memory) {
    let mut out = vec![1; memory.len()];
    if memory.kind() == MemoryKind::Device {
        memory.read_at(0, &mut out).unwrap();
        assert!(out.iter().all(|b| *b == 0), "not zeroed");
    }
    let bytes: Vec<u8> = (0..memory.len()).map(|i| (i * 7 + i / 251) as u8).collect();
    memory.write_at(0, &bytes).unwrap();
    memory.write_at(3, b"abc").unwrap();
    memory.read_at(0, &mut out).unwrap();
    assert_eq!(&out[3..6], b"abc");
    assert_eq!(out[6..], bytes[6..]);
    let end = memory.len() as u64;
    for (offset, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1)] {
        assert_eq!(memory.read_at(offset, &mut vec![0; len]).unwrap_err().code(), ErrorCode::OutOfRange);
        assert_eq!(memory.write_at(offset, &vec![0; len]).unwrap_err().code(), ErrorCode::OutOfRange);
    }
}

pub(crate) fn kinds_of_device_memory() {
    let device = Device::get(0).unwrap();
    assert!(!device.name().is_empty() && device.processors() > 0 && device.total_bytes() > 0);
    for len in [1000, 3 << 20] {
        let plain = Memory::device(&device, len).unwrap();
        assert_eq!((plain.kind(), plain.len(), plain.is_device()), (MemoryKind::Device, len, true));
        holds_what_is_written(&plain);
        let shareable = Memory::device_shareable(&device, len).unwrap();
        holds_what_is_written(&shareable);
    }
    // A part of a larger allocation, as torch's caching allocator gives it.
    let large = raw::Allocation::new(0, 1 << 20);
    assert!(cuda::is_device_address(large.address + 512));
    let part = foreign(large.address + 512, 100_000).unwrap();
    assert_eq!(part.kind(), MemoryKind::ForeignDevice);
    holds_what_is_written(&part);
    let agent = Agent::builder().name("kinds").build().unwrap();
    let region = agent.register(part.clone()).unwrap();
    // NIXL, where it is there, decides when it starts.
    let taken = region.transports();
    assert!(
        taken.iter().all(|k| matches!(k, TransportKind::CudaIpc | TransportKind::Nixl | TransportKind::Tcp))
    );
    assert!(region.transports().contains(&TransportKind::CudaIpc));
    assert!(
        region.refused().iter().any(|(k, why)| *k == TransportKind::Shm && why.contains("host memory only"))
    );
    drop((region, part));
    agent.shutdown(std::time::Duration::from_secs(5)).unwrap();
    large.free();
    assert_eq!(Device::get(7).unwrap_err().code(), ErrorCode::NotAvailable);
    assert!(Device::get(-1).unwrap_err().to_string().contains("CUDA_VISIBLE_DEVICES"));
}

pub(crate) fn pinned_host_memory() {
    for memory in [Memory::shared(1 << 20, HugePages::Never).unwrap(), Memory::anonymous(1 << 20).unwrap()] {
        assert!(!memory.is_pinned());
        memory.pin().unwrap();
        memory.pin().unwrap();
        assert!(memory.is_pinned() && !memory.is_device());
        holds_what_is_written(&memory);
    }
    // Pinned by somebody else: fine, and theirs to undo.
    let address = raw::pinned(8192);
    // SAFETY: freed below.
    let theirs = unsafe { Memory::foreign(address as *mut u8, 8192) }.unwrap();
    theirs.pin().unwrap();
    drop(theirs);
    raw::free_pinned(address);
}

pub(crate) fn pointers_that_are_not_device_memory_are_refused() {
    let host = vec![0u8; 4096];
    let pinned = raw::pinned(4096);
    let freed = raw::Allocation::new(0, 4096);
    let live = raw::Allocation::new(0, 8192);
    let gone = freed.address;
    freed.free();
    for (address, len, says) in [
        (host.as_ptr() as u64, 4096, "not device memory"),
        (pinned, 4096, "pinned host memory"),
        (gone, 4096, "freed"),
        (live.address, 8193, "its allocation ends after 8192"),
        (live.address + 8000, 1000, "its allocation ends after 192"),
        (u64::MAX - 10, 100, "wrap around"),
    ] {
        let e = foreign(address, len).unwrap_err();
        assert_eq!(e.code(), ErrorCode::InvalidArgument, "{e}");
        assert!(e.to_string().contains(says), "{e}");
    }
    assert!(!cuda::is_device_address(host.as_ptr() as u64) && !cuda::is_device_address(pinned));
    live.free();
    raw::free_pinned(pinned);
    raw::foreign_context(|address, _| {
        let e = foreign(address, 4096).unwrap_err();
        assert!(e.to_string().contains("primary context"), "{e}");
    });
}

pub(crate) fn a_full_device_is_an_error_and_leaks_nothing() {
    let device = Device::get(0).unwrap();
    let first = Memory::device(&device, 48 << 20).unwrap();
    for too_much in [Memory::device(&device, 32 << 20), Memory::device_shareable(&device, 32 << 20)] {
        let e = too_much.unwrap_err();
        assert_eq!(e.code(), ErrorCode::NoCapacity);
        assert!(e.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY (out of memory)"), "{e}");
        assert!(e.to_string().contains("33554432 bytes on cuda:0"), "{e}");
    }
    drop(first);
    drop(Memory::device_shareable(&device, 32 << 20).unwrap());
    drop(Memory::device(&device, 48 << 20).unwrap());
}

pub(crate) fn a_failing_step_leaks_nothing() {
    let device = Device::get(0).unwrap();
    for call in [
        "cuMemGetAllocationGranularity",
        "cuMemCreate",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemsetD8Async",
    ] {
        standin::fails(call, 1);
        let e = Memory::device_shareable(&device, 1 << 20).unwrap_err();
        assert!(e.to_string().contains(call) && e.to_string().contains("CUDA_ERROR_UNKNOWN"), "{e}");
    }
    for call in ["cuMemAlloc_v2", "cuMemsetD8Async", "cuStreamCreateWithPriority", "cuStreamSynchronize"] {
        standin::fails(call, 1);
        let e = Memory::device(&device, 1 << 20).unwrap_err();
        assert!(e.to_string().contains(call.trim_end_matches("_v2")), "{e}");
    }
    let host = Memory::shared(4096, HugePages::Never).unwrap();
    standin::fails("cuMemHostRegister_v2", 1);
    assert!(host.pin().unwrap_err().to_string().contains("cuMemHostRegister of 4096 bytes"));
    assert!(!host.is_pinned());
    host.pin().unwrap();
}

/// What an agent says of `cuda_ipc`, and that it works without.
fn works_without(says: &str) {
    let e = Device::get(0).unwrap_err();
    assert_eq!(e.code(), ErrorCode::NotAvailable);
    assert!(e.to_string().contains(says), "{e}");
    let e = cuda::probe().unwrap_err();
    assert!(e.to_string().contains(says), "{e}");
    let host = Memory::shared(4096, HugePages::Never).unwrap();
    assert!(host.pin().unwrap_err().to_string().contains(says));
    assert!(!cuda::is_device_address(host.as_ptr() as u64));
    let e = foreign(0x7000_0000_0000, 4096).unwrap_err();
    assert!(e.to_string().contains(says), "{e}");
    let agent = Agent::builder().name("without").build().unwrap();
    agent.register(host).unwrap();
}

pub(crate) fn no_driver_is_an_ordinary_error() {
    works_without("libcuda.so.1 cannot be loaded");
    let agent = Agent::builder().name("told").build().unwrap();
    let status = agent.transports().into_iter().find(|t| t.kind == TransportKind::CudaIpc).unwrap();
    assert!(status.reason.unwrap().contains("libcuda.so.1"));
}

pub(crate) fn no_visible_device_is_an_ordinary_error() {
    works_without("no device is visible");
}

pub(crate) fn a_driver_too_old_is_an_ordinary_error() {
    works_without("the driver is of CUDA 11.8");
}
