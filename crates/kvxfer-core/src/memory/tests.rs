use super::*;
use kvxfer_proto::ErrorCode;
use rustix::fs::{MemfdFlags, SealFlags};

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

#[test]
fn reads_what_was_written_and_checks_ranges() {
    for memory in [Memory::shared(10_000, HugePages::Try).unwrap(), Memory::anonymous(10_000).unwrap()] {
        assert_eq!(memory.len(), 10_000);
        memory.write_at(9_990, b"0123456789").unwrap();
        let mut out = [0; 10];
        memory.read_at(9_990, &mut out).unwrap();
        assert_eq!(&out, b"0123456789");
        for (offset, len) in [(9_991, 10), (10_001, 0), (u64::MAX, 2), (0, 10_001)] {
            let e = memory.read_at(offset, &mut vec![0; len]).unwrap_err();
            assert_eq!(e.code(), ErrorCode::OutOfRange, "{offset} {len}");
            assert_eq!(memory.write_at(offset, &vec![0; len]).unwrap_err().code(), ErrorCode::OutOfRange);
        }
    }
}

#[test]
fn a_second_mapping_sees_the_same_bytes() {
    let pool = Memory::shared(1 << 20, HugePages::Never).unwrap();
    let peer = Memory::from_fd(pool.fd().unwrap().try_clone_to_owned().unwrap(), pool.len()).unwrap();
    pool.write_at(77, b"hello").unwrap();
    let mut out = [0; 5];
    peer.read_at(77, &mut out).unwrap();
    assert_eq!(&out, b"hello");
    drop(pool);
    peer.write_at(0, b"still mapped").unwrap();
}

#[test]
fn a_large_pool_can_be_used_and_dropped_while_its_page_tables_are_being_filled() {
    let pool = Memory::shared(96 << 20, HugePages::Never).unwrap();
    for round in 0..8u8 {
        let peer = Memory::from_fd(pool.fd().unwrap().try_clone_to_owned().unwrap(), pool.len()).unwrap();
        let at = u64::from(round) * (11 << 20);
        peer.write_at(at, &[round + 1; 64]).unwrap();
        drop(peer);
        let mut seen = [0; 64];
        pool.read_at(at, &mut seen).unwrap();
        assert_eq!(seen, [round + 1; 64]);
    }
}

#[test]
fn a_pool_can_neither_shrink_nor_grow() {
    let pool = Memory::shared(4 << 20, HugePages::Try).unwrap();
    // Multiples of any page size the pool may have got.
    for size in [0, 2 << 20, 8 << 20] {
        assert_eq!(rustix::fs::ftruncate(pool.fd().unwrap(), size), Err(rustix::io::Errno::PERM));
    }
}

#[test]
fn hostile_descriptors_are_refused() {
    let refused = |fd: OwnedFd, len: usize, word: &str| {
        let e = Memory::from_fd(fd, len).unwrap_err();
        assert_eq!(e.code(), ErrorCode::Protocol, "{e}");
        assert!(e.to_string().contains(word), "{e}");
    };
    refused(memfd(8192, SealFlags::empty()), 8192, "not sealed");
    refused(memfd(8192, SealFlags::GROW), 8192, "not sealed");
    refused(memfd(8192, SealFlags::SHRINK), 8193, "8193 were announced");
    refused(memfd(8192, SealFlags::SHRINK), 1 << 40, "were announced");
    refused(memfd(8192, SealFlags::SHRINK | SealFlags::WRITE), 8192, "against writing");
    refused(tempfile::tempfile().unwrap().into(), 10, "no memfd");
    refused(std::fs::File::open("/dev/null").unwrap().into(), 10, "no memfd");
    let (pipe, _keep) = rustix::pipe::pipe().unwrap();
    refused(pipe, 10, "no memfd");
    Memory::from_fd(memfd(8192, SealFlags::SHRINK), 8000).unwrap();
}

#[test]
fn impossible_lengths_are_errors() {
    for len in [0, usize::MAX, isize::MAX as usize] {
        assert_eq!(Memory::shared(len, HugePages::Try).unwrap_err().code(), ErrorCode::InvalidArgument);
        assert_eq!(Memory::anonymous(len).unwrap_err().code(), ErrorCode::InvalidArgument);
    }
    let e = Memory::shared(1 << 50, HugePages::Try).unwrap_err();
    assert_eq!(e.code(), ErrorCode::System);
    assert!(e.to_string().contains("1125899906842624 bytes"), "{e}");
    // SAFETY: refused before anything is touched.
    assert!(unsafe { Memory::foreign(std::ptr::null_mut(), 10) }.is_err());
    // SAFETY: as above.
    assert!(unsafe { Memory::foreign(usize::MAX as *mut u8, 10) }.is_err());
}

#[test]
fn required_huge_pages_are_huge_or_an_error() {
    match Memory::shared(4 << 20, HugePages::Require) {
        Ok(memory) => assert_ne!(memory.paging(), Paging::Base),
        Err(e) => assert!(e.to_string().contains("nr_hugepages"), "{e}"),
    }
    assert_eq!(Memory::shared(4 << 20, HugePages::Never).unwrap().paging(), Paging::Base);
}

#[test]
fn dropping_unmaps() {
    let memory = Memory::anonymous(1 << 20).unwrap();
    let (address, pages) = (memory.as_ptr(), 1 << 20);
    drop(memory);
    // SAFETY: asks the kernel about the range, touches nothing.
    let gone = unsafe { libc::msync(address.cast(), pages, libc::MS_ASYNC) };
    // Another thread may have mapped something there meanwhile; what is certain is the outcome for foreign memory.
    if gone != 0 {
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOMEM));
    }
    let mut bytes = vec![7_u8; 64];
    // SAFETY: the vector outlives the memory and is not borrowed meanwhile.
    let foreign = unsafe { Memory::foreign(bytes.as_mut_ptr(), bytes.len()) }.unwrap();
    foreign.write_at(3, &[9]).unwrap();
    drop(foreign);
    assert_eq!(bytes[3], 9);
    assert!(bytes.iter().enumerate().all(|(i, b)| *b == if i == 3 { 9 } else { 7 }));
}
