//! Handles: what a `kvxfer_agent_t *` really is.
//!
//! A handle is not an address. It is a number that names a slot of a table, the type of the object and the
//! slot's generation, dressed as a pointer to an incomplete type so that C's type checker helps. Nothing is
//! ever dereferenced, so a freed, doubly freed, mistyped or invented handle is found out with certainty and
//! refused with `KVXFER_INVALID_ARGUMENT`, whatever the caller did. The object itself lives in an `Arc`: a
//! call under way on another thread keeps it alive when its handle is freed.
//!
//! ```text
//! 63            32 31     24 23          1 0
//! | generation    |  type   |   index     |1|
//! ```

use kvxfer_core::{Error, ErrorCode, Result};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Once, OnceLock};

/// An object that C owns through a handle.
pub(super) trait Object: Sized + Send + Sync + 'static {
    /// The incomplete type C sees.
    type C: Sized;
    /// Number of the type; part of the handle.
    const TYPE: u8;
    /// Its name in error texts.
    const NAME: &'static str;
    /// Where objects of this type live.
    fn table() -> &'static Table<Self>;
}

/// Declares the table of an [`Object`].
macro_rules! object {
    ($object:ty, $c:ty, $number:ident) => {
        impl $crate::c::handle::Object for $object {
            type C = $c;
            const TYPE: u8 = $crate::c::handle::kind::$number;
            const NAME: &'static str = $crate::c::handle::name($crate::c::handle::kind::$number);
            fn table() -> &'static $crate::c::handle::Table<Self> {
                static TABLE: $crate::c::handle::Table<$object> = $crate::c::handle::Table::new();
                &TABLE
            }
        }
    };
}
pub(super) use object;

/// Numbers of the types.
pub(super) mod kind {
    pub(in crate::c) const AGENT: u8 = 1;
    pub(in crate::c) const REGION: u8 = 2;
    pub(in crate::c) const PEER: u8 = 3;
    pub(in crate::c) const REMOTE_REGION: u8 = 4;
    pub(in crate::c) const TRANSFER: u8 = 5;
    pub(in crate::c) const RECEIVER: u8 = 6;
    pub(in crate::c) const CHUNK: u8 = 7;
    pub(in crate::c) const SENDER: u8 = 8;
    pub(in crate::c) const RESERVATION: u8 = 9;
    pub(in crate::c) const DELIVERY: u8 = 10;
    pub(in crate::c) const OUTBOX: u8 = 11;
    pub(in crate::c) const MEMORY: u8 = 12;
    pub(in crate::c) const FOUND: u8 = 13;
    pub(in crate::c) const FENCE: u8 = 14;
    pub(in crate::c) const GATHER: u8 = 15;
}

/// Name of a type in error texts.
pub(super) const fn name(kind: u8) -> &'static str {
    match kind {
        kind::AGENT => "agent",
        kind::REGION => "region",
        kind::PEER => "peer",
        kind::REMOTE_REGION => "remote region",
        kind::TRANSFER => "transfer",
        kind::RECEIVER => "receiver",
        kind::CHUNK => "chunk",
        kind::SENDER => "sender",
        kind::RESERVATION => "reservation",
        kind::DELIVERY => "delivery",
        kind::OUTBOX => "outbox",
        kind::MEMORY => "memory",
        kind::FOUND => "found",
        kind::FENCE => "fence",
        kind::GATHER => "gather",
        _ => "unknown",
    }
}

/// Slots of the first block; each further block doubles.
const FIRST_BLOCK: u32 = 256;
/// Blocks, which bounds the live objects of one type at about four million.
const BLOCKS: usize = 14;
const INDEX_BITS: u32 = 23;
const _: () = assert!((FIRST_BLOCK as u64) * ((1 << BLOCKS) - 1) < 1 << INDEX_BITS);

/// The live objects of one type. Slots are never given back, so a lookup takes no lock but its slot's.
pub(super) struct Table<T> {
    blocks: [OnceLock<Box<[Slot<T>]>>; BLOCKS],
    free: Mutex<Free>,
}

type Slot<T> = Mutex<Entry<T>>;

struct Entry<T> {
    generation: u32,
    object: Option<Arc<T>>,
}

struct Free {
    /// Slots that have held an object and hold none now.
    again: Vec<u32>,
    /// First slot never used.
    fresh: u32,
}

static LIVE: AtomicU64 = AtomicU64::new(0);
static FORKED: AtomicBool = AtomicBool::new(false);

/// Number of objects that C owns and has not freed.
pub(super) fn live() -> u64 {
    LIVE.load(Ordering::Relaxed)
}

/// True in a child that was forked after the first handle was made.
pub(super) fn forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

fn watch_for_fork() {
    extern "C" fn in_child() {
        FORKED.store(true, Ordering::Relaxed);
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe. The only failure is lack of
        // memory; the child's calls would then run into dead threads and end at their deadlines.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
}

impl<T> Table<T> {
    pub(super) const fn new() -> Self {
        Self {
            blocks: [const { OnceLock::new() }; BLOCKS],
            free: Mutex::new(Free { again: Vec::new(), fresh: 0 }),
        }
    }

    fn slot(&self, index: u32) -> Option<&Slot<T>> {
        let (block, offset, _) = place(index);
        self.blocks.get(block)?.get()?.get(offset as usize)
    }

    fn insert(&self, object: T) -> Option<(u32, u32)> {
        let index = {
            let mut free = self.free.lock();
            if let Some(index) = free.again.pop() {
                index
            } else {
                let index = free.fresh;
                let (block, _, len) = place(index);
                self.blocks.get(block)?.get_or_init(|| {
                    (0..len).map(|_| Mutex::new(Entry { generation: 0, object: None })).collect()
                });
                free.fresh += 1;
                index
            }
        };
        let mut entry = self.slot(index)?.lock();
        // Generations start at 1, so no handle is zero in its upper half.
        entry.generation += 1;
        entry.object = Some(Arc::new(object));
        LIVE.fetch_add(1, Ordering::Relaxed);
        Some((index, entry.generation))
    }

    fn get(&self, index: u32, generation: u32) -> Option<Arc<T>> {
        let entry = self.slot(index)?.lock();
        if entry.generation == generation { entry.object.clone() } else { None }
    }

    fn remove(&self, index: u32, generation: u32) -> Option<Arc<T>> {
        let object = {
            let mut entry = self.slot(index)?.lock();
            if entry.generation != generation {
                return None;
            }
            entry.object.take()?
        };
        // A slot whose generations are used up retires, so no handle ever comes back.
        if generation < u32::MAX {
            self.free.lock().again.push(index);
        }
        LIVE.fetch_sub(1, Ordering::Relaxed);
        Some(object)
    }
}

/// Block of a slot, its place in it, and the block's length.
fn place(index: u32) -> (usize, u32, u32) {
    let block = (index / FIRST_BLOCK + 1).ilog2();
    let start = FIRST_BLOCK * ((1 << block) - 1);
    (block as usize, index - start, FIRST_BLOCK << block)
}

/// Gives an object to C.
pub(super) fn into_raw<T: Object>(object: T) -> Result<*mut T::C> {
    watch_for_fork();
    let (index, generation) = T::table().insert(object).ok_or_else(|| {
        Error::failed(
            ErrorCode::NoCapacity,
            format!("too many live {} handles (over four million): free those no longer needed", T::NAME),
        )
    })?;
    let bits = u64::from(generation) << 32 | u64::from(T::TYPE) << 24 | u64::from(index) << 1 | 1;
    Ok(std::ptr::without_provenance_mut(bits as usize))
}

/// Lends the object behind a handle to one call.
pub(super) fn borrow<T: Object>(argument: &'static str, handle: *const T::C) -> Result<Arc<T>> {
    let (index, generation) = parse::<T>(argument, handle)?;
    T::table().get(index, generation).ok_or_else(|| gone::<T>(argument, handle))
}

/// Takes an object back from C; `None` for NULL, an error for anything that is not a live handle of that type.
pub(super) fn take<T: Object>(argument: &'static str, handle: *mut T::C) -> Result<Option<Arc<T>>> {
    if handle.is_null() {
        return Ok(None);
    }
    let (index, generation) = parse::<T>(argument, handle)?;
    T::table().remove(index, generation).map(Some).ok_or_else(|| gone::<T>(argument, handle))
}

fn parse<T: Object>(argument: &'static str, handle: *const T::C) -> Result<(u32, u32)> {
    let invalid = |problem: String| Err(Error::InvalidArgument { argument, problem });
    if handle.is_null() {
        return invalid("is NULL".into());
    }
    let bits = handle.addr() as u64;
    let (generation, kind) = ((bits >> 32) as u32, (bits >> 24) as u8);
    if bits & 1 == 0 || name(kind) == "unknown" {
        return invalid(format!("{handle:p} is not a handle of this library"));
    }
    if kind != T::TYPE {
        return invalid(format!(
            "{handle:p} is a handle of type {}, here belongs one of type {}",
            name(kind),
            T::NAME
        ));
    }
    Ok(((bits as u32 & 0x00ff_ffff) >> 1, generation))
}

fn gone<T: Object>(argument: &'static str, handle: *const T::C) -> Error {
    Error::InvalidArgument {
        argument,
        problem: format!("{handle:p} is a handle of type {} that was freed already or never made", T::NAME),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Thing(u32);
    struct Other;
    object!(Thing, u8, AGENT);
    object!(Other, u16, REGION);

    #[test]
    fn a_freed_handle_is_refused_also_after_its_slot_is_used_again() {
        let a = into_raw(Thing(1)).unwrap();
        assert_eq!(borrow::<Thing>("a", a).unwrap().0, 1);
        assert!(take::<Thing>("a", a).unwrap().is_some());
        assert!(take::<Thing>("a", a).is_err());
        let b = into_raw(Thing(2)).unwrap();
        assert!(borrow::<Thing>("a", a).is_err());
        assert_eq!(borrow::<Thing>("b", b).unwrap().0, 2);
        take::<Thing>("b", b).unwrap();
    }

    #[test]
    fn wrong_types_null_and_inventions_are_refused() {
        let other = into_raw(Other).unwrap();
        let text = borrow::<Thing>("thing", other.cast()).err().unwrap().to_string();
        assert!(text.contains("is a handle of type region, here belongs one of type agent"), "{text}");
        assert!(borrow::<Thing>("thing", std::ptr::null()).is_err());
        assert!(take::<Thing>("thing", std::ptr::null_mut()).unwrap().is_none());
        for bits in [1_usize, 2, 0x1234_5678, usize::MAX, usize::MAX - 1, 0x0001_0000_01ff_ffff] {
            assert!(borrow::<Thing>("thing", std::ptr::without_provenance(bits)).is_err(), "{bits:x}");
        }
        take::<Other>("other", other).unwrap();
    }

    #[test]
    fn slots_lie_where_their_index_says() {
        let mut expected = 0;
        for block in 0..4_usize {
            for offset in 0..FIRST_BLOCK << block {
                assert_eq!(place(expected), (block, offset, FIRST_BLOCK << block));
                expected += 1;
            }
        }
    }

    #[test]
    fn many_handles_from_many_threads() {
        std::thread::scope(|s| {
            for t in 0..4 {
                s.spawn(move || {
                    let handles: Vec<_> =
                        (0..2000).map(|i| into_raw(Thing(t * 10_000 + i)).unwrap()).collect();
                    for (i, h) in handles.iter().enumerate() {
                        assert_eq!(borrow::<Thing>("h", *h).unwrap().0, t * 10_000 + i as u32);
                        take::<Thing>("h", *h).unwrap();
                        assert!(take::<Thing>("h", *h).is_err());
                    }
                });
            }
        });
    }
}
