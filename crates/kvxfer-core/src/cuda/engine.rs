//! Copies on a device: many pieces in one submission, on streams of our own, with an event at the end.

use super::device::Device;
use super::driver::{self, check, check_drop};
use super::kernels::Kernels;
use super::stream::{Event, Fence, Stream};
use crate::{Error, Result};
use cudarc::driver::sys;
use kvxfer_proto::ErrorCode;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, OnceLock, Weak};

/// Streams of an engine: a large transfer holds up only the others of its own.
const STREAMS: usize = 4;
/// From this many pieces on, of at most [`KERNEL_PIECE`] bytes on average, a kernel copies them: its cost a piece is that of the
/// bytes, while the copy engines pay for each descriptor.
const KERNEL_PIECES: usize = 8;
const KERNEL_PIECE: u64 = 1 << 20;
/// Longest piece a kernel gets; longer ones are cut, so that its threads are loaded evenly.
const KERNEL_CUT: u64 = 64 << 10;
/// Up to this many descriptors the kernel reads them in host memory; more are copied to the device first.
const DESCRIPTORS_IN_PLACE: usize = 128;

/// One copy between device-visible addresses; the kernel's own structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Move {
    pub(crate) src: u64,
    pub(crate) dst: u64,
    pub(crate) len: u64,
}

impl Move {
    /// As part of the last one, where it goes on from that on both sides.
    pub(crate) fn append_to(self, moves: &mut Vec<Self>) {
        match moves.last_mut() {
            Some(last) if last.src + last.len == self.src && last.dst + last.len == self.dst => {
                last.len += self.len;
            }
            _ => moves.push(self),
        }
    }
}

/// What copies on one device.
pub(crate) struct Engine {
    device: Device,
    streams: Vec<Stream>,
    next: AtomicUsize,
    kernels: OnceLock<Result<Kernels>>,
    idle: Mutex<Idle>,
}

/// Things that are dear to make, for the next flight.
#[derive(Default)]
struct Idle {
    events: Vec<Event>,
    scratch: Vec<Scratch>,
}

/// Copies under way.
pub(crate) struct Flight {
    engine: Arc<Engine>,
    /// Taken when it has ended.
    event: Option<Event>,
    scratch: Option<Scratch>,
}

/// Room for descriptors: pinned host memory, and as much on the device.
pub(super) struct Scratch {
    device: Device,
    host: *mut u8,
    far: u64,
    bytes: usize,
}

// SAFETY: two addresses and their owner; only the flight that holds it writes there.
unsafe impl Send for Scratch {}

/// The engine of a device, held by whoever has memory there: streams, kernels and scratch are made once, not for each transfer.
#[derive(Debug, Default)]
pub(super) struct Kept(OnceLock<Arc<Engine>>);

static ENGINES: LazyLock<Mutex<HashMap<i32, Weak<Engine>>>> = LazyLock::new(Mutex::default);

impl Engine {
    /// The engine of a device; all agents of a process share it. It goes with its last holder: ask the memory for it, which holds it.
    fn of(device: &Device) -> Result<Arc<Self>> {
        let mut known = ENGINES.lock();
        if let Some(engine) = known.get(&device.ordinal()).and_then(Weak::upgrade) {
            return Ok(engine);
        }
        let streams = (0..STREAMS).map(|_| Stream::new(device)).collect::<Result<Vec<_>>>()?;
        let engine = Arc::new(Self {
            device: device.clone(),
            streams,
            next: AtomicUsize::new(0),
            kernels: OnceLock::new(),
            idle: Mutex::default(),
        });
        known.insert(device.ordinal(), Arc::downgrade(&engine));
        Ok(engine)
    }

    /// A stream for the next transfer; all its flights take the same, so that they are done in order.
    pub(crate) fn pick(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % STREAMS
    }

    /// The kernels, loaded at the first call.
    pub(crate) fn kernels(&self) -> Result<&Kernels> {
        self.kernels
            .get_or_init(|| {
                let kernels = Kernels::load(&self.device);
                if let Err(e) = &kernels {
                    tracing::warn!(device = %self.device, error = %e, "no kernels; scattered blocks take the copy engines");
                }
                kernels
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// Starts `moves` on stream `stream`, after `fence`. Never waits for the device. `kernel`: whether kernels of this device may touch
    /// all of the addresses.
    ///
    /// # Safety
    /// Every range must stay valid until the flight has ended.
    pub(crate) unsafe fn start(
        self: &Arc<Self>,
        stream: usize,
        moves: &[Move],
        fence: Option<&Fence>,
        kernel: bool,
    ) -> Result<Flight> {
        let total: u64 = moves.iter().map(|m| m.len).sum();
        let few_or_long = moves.len() < KERNEL_PIECES || total / moves.len().max(1) as u64 > KERNEL_PIECE;
        let mut scratch = None;
        let mut flight =
            self.fly(stream, fence, |stream| match (kernel && !few_or_long).then(|| self.kernels()) {
                Some(Ok(kernels)) => self.by_kernel(kernels, stream, moves, &mut scratch),
                // SAFETY: the caller's promise.
                _ => unsafe { self.by_copies(stream, moves) },
            })?;
        flight.scratch = scratch;
        Ok(flight)
    }

    /// Gives a stream something to do after `fence`, and an event behind it. On an error nothing of it is under way any more.
    pub(super) fn fly(
        self: &Arc<Self>,
        stream: usize,
        fence: Option<&Fence>,
        work: impl FnOnce(&Stream) -> Result<()>,
    ) -> Result<Flight> {
        let stream = &self.streams[stream % STREAMS];
        if let Some(fence) = fence {
            stream.wait_for(fence.event())?;
        }
        let event = self.idle.lock().events.pop().map_or_else(|| Event::new(&self.device), Ok)?;
        let mut flight = Flight { engine: self.clone(), event: Some(event), scratch: None };
        let started = work(stream);
        let recorded = flight.event.as_ref().map_or(Ok(()), |e| e.record(stream));
        if started.is_ok() && recorded.is_ok() {
            return Ok(flight);
        }
        // Some of it may be under way: nobody must believe the opposite.
        if let Err(e) = stream.synchronize() {
            tracing::debug!(error = %e, "after a failed submission");
        }
        flight.ended();
        started.and(recorded).map(|()| flight)
    }

    /// Brings scattered bytes of the device together in host memory; waits for the device.
    ///
    /// # Safety
    /// Every source range must be valid.
    pub(crate) unsafe fn collect(self: &Arc<Self>, sources: &[(u64, u64)], out: &mut [u8]) -> Result<()> {
        let pinned = self.scratch(out.len())?;
        let mut at = 0;
        let moves: Vec<_> = sources
            .iter()
            .map(|(src, len)| {
                let dst = pinned.host as u64 + at;
                at += len;
                Move { src: *src, dst, len: *len }
            })
            .collect();
        assert_eq!(at as usize, out.len(), "the runs fill the buffer");
        // SAFETY: the caller's promise for the sources; the target is pinned memory of that size, held until the flight has ended.
        let mut flight = unsafe { self.start(self.pick(), &moves, None, true) }?;
        flight.wait()?;
        // SAFETY: as many bytes were just written there, and nothing writes them any more.
        out.copy_from_slice(unsafe { std::slice::from_raw_parts(pinned.host, out.len()) });
        self.keep(pinned);
        Ok(())
    }

    unsafe fn by_copies(&self, stream: &Stream, moves: &[Move]) -> Result<()> {
        let _here = self.device.enter()?;
        // One call costs more than a few; and the batched call does not take the legacy stream, which ours is not.
        if moves.len() >= 4 && driver::driver()?.batch {
            return Self::by_batch(stream, moves);
        }
        for m in moves {
            // SAFETY: the caller's promise.
            check(format_args!("cuMemcpyAsync of {} bytes", m.len), unsafe {
                sys::cuMemcpyAsync(m.dst, m.src, m.len as usize, stream.raw())
            })?;
        }
        Ok(())
    }

    fn by_batch(stream: &Stream, moves: &[Move]) -> Result<()> {
        let mut dsts: Vec<u64> = moves.iter().map(|m| m.dst).collect();
        let mut srcs: Vec<u64> = moves.iter().map(|m| m.src).collect();
        let mut lens: Vec<usize> = moves.iter().map(|m| m.len as usize).collect();
        let nowhere =
            sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
        let mut attributes = sys::CUmemcpyAttributes {
            srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: nowhere,
            dstLocHint: nowhere,
            flags: 0,
        };
        let mut first = 0usize;
        let mut failed = usize::MAX;
        // SAFETY: three arrays of the stated length, one set of attributes from index 0 on; the ranges by the promise of `start`.
        let result = unsafe {
            sys::cuMemcpyBatchAsync(
                dsts.as_mut_ptr(),
                srcs.as_mut_ptr(),
                lens.as_mut_ptr(),
                moves.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream.raw(),
            )
        };
        check(format_args!("cuMemcpyBatchAsync of {} copies (first bad one: {failed})", moves.len()), result)
    }

    fn by_kernel(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        moves: &[Move],
        keep: &mut Option<Scratch>,
    ) -> Result<()> {
        let count: usize = moves.iter().map(|m| m.len.div_ceil(KERNEL_CUT) as usize).sum();
        let mut scratch = self.scratch(count * size_of::<Move>())?;
        // SAFETY: pinned memory of at least that size, held by this flight alone, aligned to a page.
        let cut = unsafe {
            std::slice::from_raw_parts_mut(scratch.host.cast::<std::ffi::c_void>().cast::<Move>(), count)
        };
        let mut at = 0;
        for m in moves {
            let mut done = 0;
            while done < m.len {
                let len = KERNEL_CUT.min(m.len - done);
                cut[at] = Move { src: m.src + done, dst: m.dst + done, len };
                at += 1;
                done += len;
            }
        }
        let mut descriptors = scratch.host as u64;
        if count > DESCRIPTORS_IN_PLACE {
            scratch.put_on_device()?;
            descriptors = scratch.far;
            if let Err(e) = scratch.to_device(stream, count * size_of::<Move>()) {
                *keep = Some(scratch);
                return Err(e);
            }
        }
        *keep = Some(scratch);
        // Wide accesses need both sides alike modulo 16; the kernel sees to each piece by itself.
        kernels.copy(stream, descriptors, count)
    }

    pub(super) fn scratch(&self, bytes: usize) -> Result<Scratch> {
        let bytes = bytes.next_power_of_two().max(16 << 10);
        {
            let mut idle = self.idle.lock();
            if let Some(i) = idle.scratch.iter().position(|s| s.bytes >= bytes && s.bytes <= 4 * bytes) {
                return Ok(idle.scratch.swap_remove(i));
            }
        }
        Scratch::new(&self.device, bytes)
    }

    /// The same with its half on the device.
    pub(super) fn scratch_on_both(&self, bytes: usize) -> Result<Scratch> {
        let mut scratch = self.scratch(bytes)?;
        scratch.put_on_device()?;
        Ok(scratch)
    }

    /// For the next flight; nothing uses it any more.
    pub(super) fn keep(&self, scratch: Scratch) {
        let mut idle = self.idle.lock();
        if idle.scratch.len() < 16 {
            idle.scratch.push(scratch);
        }
    }
}

impl Engine {
    /// Runs `then` when stream `stream` has done what it was given so far.
    pub(crate) fn when_done(&self, stream: usize, then: Box<dyn FnOnce() + Send>) -> Result<()> {
        self.streams[stream % STREAMS].when_done(then)
    }
}

impl Kept {
    pub(super) fn get(&self, device: &Device) -> Result<Arc<Engine>> {
        if let Some(engine) = self.0.get() {
            return Ok(engine.clone());
        }
        let engine = Engine::of(device)?;
        Ok(self.0.get_or_init(|| engine).clone())
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Engine").field(&self.device).finish()
    }
}

impl Flight {
    /// Whether it has ended; an error when the device failed (it touches nothing any more then either).
    pub(crate) fn poll(&mut self) -> Result<bool> {
        let Some(event) = &self.event else { return Ok(true) };
        let done = event.is_done();
        if !matches!(done, Ok(false)) {
            self.ended();
        }
        done
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> Result<()> {
        let done = self.event.as_ref().map_or(Ok(()), Event::synchronize);
        self.ended();
        done
    }

    fn ended(&mut self) {
        if let Some(event) = self.event.take() {
            let mut idle = self.engine.idle.lock();
            if idle.events.len() < 64 {
                idle.events.push(event);
            }
        }
        if let Some(scratch) = self.scratch.take() {
            self.engine.keep(scratch);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // Normally it has ended. If not, its descriptors must outlive it.
        if let Some(event) = self.event.take()
            && let Err(e) = event.synchronize()
        {
            tracing::debug!(error = %e, "a flight was dropped before its end");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for stream in &self.streams {
            if let Err(e) = stream.synchronize() {
                tracing::debug!(error = %e, "an engine ends");
            }
        }
    }
}

impl Scratch {
    fn new(device: &Device, bytes: usize) -> Result<Self> {
        let _here = device.enter()?;
        let mut host = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a context is current; the pointer is to a live pointer.
        check(format_args!("cuMemHostAlloc of {bytes} bytes"), unsafe {
            sys::cuMemHostAlloc(&raw mut host, bytes, flags)
        })?;
        if host.is_null() {
            return Err(Error::failed(ErrorCode::Transport, "cuMemHostAlloc gave no memory"));
        }
        Ok(Self { device: device.clone(), host: host.cast(), far: 0, bytes })
    }

    /// Copies bytes to an offset of the pinned half, which no copy or kernel uses at the moment.
    pub(super) fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(
            offset <= self.bytes && bytes.len() <= self.bytes - offset,
            "{offset} + {} of {}",
            bytes.len(),
            self.bytes
        );
        // SAFETY: inside the allocation, which this value owns; `bytes` is somebody else's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.add(offset), bytes.len()) };
    }

    /// Word `i` of 8 bytes, once nothing writes there any more.
    pub(super) fn word(&self, i: usize) -> u64 {
        assert!(8 * i + 8 <= self.bytes);
        // SAFETY: inside the allocation, which is aligned to a page.
        unsafe { self.host.cast::<std::ffi::c_void>().cast::<u64>().add(i).read_volatile() }
    }

    /// Address of the half on the device, 0 where it has none.
    pub(super) fn far(&self) -> u64 {
        self.far
    }

    /// Its half on the device, when first wanted.
    fn put_on_device(&mut self) -> Result<()> {
        if self.far == 0 {
            let _here = self.device.enter()?;
            // SAFETY: a context is current; the pointer is to a live integer.
            check(format_args!("cuMemAlloc of {} bytes", self.bytes), unsafe {
                sys::cuMemAlloc_v2(&raw mut self.far, self.bytes)
            })?;
        }
        Ok(())
    }

    /// Queues a copy of its first bytes from the pinned half to the other. Whoever queues it keeps the scratch until the stream has done so.
    pub(super) fn to_device(&self, stream: &Stream, bytes: usize) -> Result<()> {
        self.copy(stream, self.far, self.host as u64, bytes)
    }

    /// The same back.
    pub(super) fn to_host(&self, stream: &Stream, bytes: usize) -> Result<()> {
        self.copy(stream, self.host as u64, self.far, bytes)
    }

    fn copy(&self, stream: &Stream, dst: u64, src: u64, bytes: usize) -> Result<()> {
        assert!(self.far != 0 && bytes <= self.bytes, "{bytes} of {}", self.bytes);
        let _here = self.device.enter()?;
        // SAFETY: both halves hold as many bytes and belong to the scratch, which a flight keeps until its end.
        check(format_args!("cuMemcpyAsync of {bytes} bytes of scratch"), unsafe {
            sys::cuMemcpyAsync(dst, src, bytes, stream.raw())
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Ok(_here) = self.device.enter() else { return };
        // SAFETY: allocated here; whatever read them has ended (the flight waits for it).
        unsafe {
            check_drop("cuMemFreeHost", sys::cuMemFreeHost(self.host.cast()));
            if self.far != 0 {
                check_drop("cuMemFree", sys::cuMemFree_v2(self.far));
            }
        }
    }
}
