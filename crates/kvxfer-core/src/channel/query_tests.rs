//! Reading back over real agents in one process.

use super::*;

const LEASE: Duration = Duration::from_secs(10);

/// Somewhere to read chunks to, each in `runs` pieces that are apart.
struct Place {
    region: crate::Region,
    runs: u64,
    each: u64,
}

impl Place {
    fn new(agent: &Agent, chunks: u64, runs: u64) -> Self {
        let each = 2 * PAGE;
        let memory = Memory::anonymous((chunks * each) as usize).expect("memory");
        memory.write_at(0, &vec![0xee; (chunks * each) as usize]).expect("inside");
        Self { region: agent.register(memory).expect("registered"), runs, each }
    }

    fn at(&self, slot: u64, len: u64) -> ChunkSource {
        let cut = |i: u64| len * i / self.runs;
        let run = |i: u64| (slot * self.each + 2 * cut(i), cut(i + 1) - cut(i));
        ChunkSource::new(self.region.clone(), (0..self.runs).map(run).collect())
    }

    fn check(&self, slot: u64, n: u32, len: u64) {
        let mut bytes = Vec::new();
        for (start, run) in self.at(slot, len).runs {
            let mut part = vec![0; run as usize];
            self.region.memory().read_at(start, &mut part).expect("inside");
            bytes.extend(part);
        }
        assert!(bytes == content(n, len), "chunk {n} differs");
    }
}

fn deliver(p: &Pair, numbers: std::ops::Range<u32>) {
    let all = chunks(&p.from, numbers, PAGE);
    p.sender.send(id("r"), all, None).expect("accepted").wait(SOON).expect("delivered");
}

fn keys(numbers: impl IntoIterator<Item = u32>) -> Vec<ChunkKey> {
    numbers.into_iter().map(key).collect()
}

fn indexes(found: &Found) -> Vec<u32> {
    found.chunks().iter().map(|c| c.index).collect()
}

#[test]
fn chunks_are_read_back_at_every_level_on_every_transport() {
    for kind in [TransportKind::Inproc, TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp] {
        for level in [None, Some(Integrity::Off), Some(Integrity::Bound), Some(Integrity::Full)] {
            let sender = SenderConfig { integrity: level, ..sender_config() };
            let Some(p) = try_pair(&[kind], sender) else {
                println!("SKIPPED: {kind} is not available here");
                continue;
            };
            let mut all = chunks(&p.from, 0..3, PAGE);
            all.push((spec(3, 1000), source(&p.from, 3, 1000, 7)));
            p.sender.send(id("r"), all, None).expect("accepted").wait(SOON).expect("delivered");
            // Two chunks that are not there among four that are; two regions to read to.
            let found = p.sender.query(keys([7, 0, 1, 8, 2, 3]), LEASE, SOON).expect("asked");
            assert_eq!(indexes(&found), [1, 2, 4, 5], "{kind} {level:?}");
            assert_eq!((found.chunks()[3].len, found.lease()), (1000, LEASE));
            assert_eq!(p.receiver.stats().pinned, 4);
            let (whole, pieces) = (Place::new(&p.from, 2, 1), Place::new(&p.from, 2, 5));
            let targets = [
                (1, whole.at(0, PAGE)),
                (2, whole.at(1, PAGE)),
                (4, pieces.at(0, PAGE)),
                (5, pieces.at(1, 1000)),
            ];
            let report = found.read(&targets, SOON).unwrap_or_else(|e| panic!("{kind} {level:?}: {e}"));
            assert_eq!((report.chunks, report.bytes, report.transport), (4, 3 * PAGE + 1000, kind));
            whole.check(0, 0, PAGE);
            whole.check(1, 1, PAGE);
            pieces.check(0, 2, PAGE);
            pieces.check(1, 3, 1000);
            assert_eq!(p.receiver.stats().pinned, 0, "confirmed, so given back");
        }
    }
}

#[test]
fn asking_alone_holds_nothing() {
    let p = pair(8);
    deliver(&p, 0..2);
    let found = p.sender.query(keys(0..4), Duration::ZERO, SOON).expect("asked");
    assert_eq!((indexes(&found), found.lease()), (vec![0, 1], Duration::ZERO));
    assert_eq!(p.receiver.stats().pinned, 0);
    let place = Place::new(&p.from, 1, 1);
    assert_eq!(code(found.read(&[(0, place.at(0, PAGE))], SOON)), ErrorCode::InvalidArgument);
    let nothing = p.sender.query(keys(5..7), LEASE, SOON).expect("asked");
    assert!(nothing.chunks().is_empty() && nothing.lease().is_zero());
    assert_eq!(code(p.sender.query(Vec::new(), LEASE, SOON)), ErrorCode::InvalidArgument);
    assert_eq!(code(p.sender.query(keys(0..4097), LEASE, SOON)), ErrorCode::InvalidArgument);
}

#[test]
fn what_is_found_is_held_until_it_is_given_back() {
    let p = pair(2);
    deliver(&p, 0..2);
    let found = p.sender.query(keys(0..2), LEASE, SOON).expect("asked");
    assert!(p.receiver.remove(&key(0)) && p.receiver.remove(&key(1)));
    let next = p.sender.send(id("next"), chunks(&p.from, 5..7, PAGE), None).expect("accepted");
    assert!(
        matches!(next.wait(Duration::from_millis(50)), Err(Error::TimedOut { .. })),
        "its pages are read"
    );
    let place = Place::new(&p.from, 2, 1);
    found.read(&[(0, place.at(0, PAGE)), (1, place.at(1, PAGE))], SOON).expect("read");
    (0..2).for_each(|n| place.check(u64::from(n), n, PAGE));
    next.wait(SOON).expect("delivered");
    let dropped = p.sender.query(keys(5..7), LEASE, SOON).expect("asked");
    assert_eq!(p.receiver.stats().pinned, 2);
    drop(dropped);
    eventually("given back", || p.receiver.stats().pinned == 0);
}

#[test]
fn a_lease_that_ends_first_is_an_error() {
    let receiver = ReceiverConfig { lease: Duration::from_millis(100), ..config(2) };
    let p = pair_over(&[TransportKind::Shm], receiver, sender_config());
    deliver(&p, 0..2);
    let found = p.sender.query(keys(0..2), LEASE, SOON).expect("asked");
    assert_eq!(found.lease(), Duration::from_millis(100), "the receiver's own is the longest");
    eventually("the end of the lease", || p.receiver.stats().pinned == 0);
    assert!(p.receiver.remove(&key(0)) && p.receiver.remove(&key(1)));
    p.sender
        .send(id("next"), chunks(&p.from, 5..7, PAGE), None)
        .expect("accepted")
        .wait(SOON)
        .expect("delivered");
    let place = Place::new(&p.from, 2, 1);
    let targets = [(0, place.at(0, PAGE)), (1, place.at(1, PAGE))];
    assert_eq!(code(found.read(&targets, SOON)), ErrorCode::Stale);
}

#[test]
fn bytes_that_do_not_fit_their_digest_are_refused() {
    for level in [Integrity::Bound, Integrity::Full] {
        let to = agent("decoder", &[TransportKind::Shm], |_| ());
        let from = agent("prefiller", &[TransportKind::Shm], |_| ());
        // Its transfers claim success and move nothing.
        let plan = FaultPlan { drop_every: Some(1), ..FaultPlan::default() };
        let reader = agent("reader", &[TransportKind::Shm], |c| c.faults = Some(plan));
        let receiver = Receiver::new(&to, config(4)).expect("a pool");
        let config = SenderConfig { integrity: Some(level), ..sender_config() };
        let connect =
            |agent| Sender::connect(agent, &to.addresses()[0], config.clone(), SOON).expect("attached");
        let (sender, asker) = (connect(&from), connect(&reader));
        sender
            .send(id("r"), chunks(&from, 0..1, PAGE), None)
            .expect("accepted")
            .wait(SOON)
            .expect("delivered");
        let found = asker.query(keys(0..1), LEASE, SOON).expect("asked");
        let place = Place::new(&reader, 1, 1);
        assert_eq!(code(found.read(&[(0, place.at(0, PAGE))], SOON)), ErrorCode::Corrupt, "{level:?}");
        eventually("given back", || receiver.stats().pinned == 0);
    }
}

#[test]
fn a_level_that_cannot_be_kept_is_refused() {
    let p = pair(4);
    deliver(&p, 0..1);
    let strict = SenderConfig { integrity: Some(Integrity::Full), ..sender_config() };
    let asker = Sender::connect(&p.from, &p.to.addresses()[0], strict, SOON).expect("attached");
    let found = asker.query(keys(0..1), LEASE, SOON).expect("asked");
    let place = Place::new(&p.from, 1, 1);
    let e = found.read(&[(0, place.at(0, PAGE))], SOON).expect_err("sampled lines only");
    assert!(e.code() == ErrorCode::NotAvailable && e.to_string().contains("full"), "{e}");
    eventually("given back", || p.receiver.stats().pinned == 0);
}

#[test]
fn wrong_targets_are_named_and_everything_is_given_back() {
    let p = pair(4);
    deliver(&p, 0..1);
    let place = Place::new(&p.from, 1, 1);
    let (short, absent) = ([(0, place.at(0, PAGE - 1))], [(1, place.at(0, PAGE))]);
    let outside = [(0, ChunkSource::new(place.region.clone(), vec![(PAGE + 1, PAGE)]))];
    for targets in [&[][..], &short, &absent, &outside] {
        let found = p.sender.query(keys(0..2), LEASE, SOON).expect("asked");
        assert_eq!(code(found.read(targets, SOON)), ErrorCode::InvalidArgument, "{targets:?}");
    }
    eventually("given back", || p.receiver.stats().pinned == 0);
}

#[test]
fn a_stalled_read_ends_and_gives_back() {
    let to = agent("decoder", &[TransportKind::Inproc], |_| ());
    let from = agent("prefiller", &[TransportKind::Inproc], |_| ());
    let plan = FaultPlan { stall_after: Some(0), ..FaultPlan::default() };
    let reader = agent("reader", &[TransportKind::Inproc], |c| c.faults = Some(plan));
    let receiver = Receiver::new(&to, config(4)).expect("a pool");
    let connect =
        |agent| Sender::connect(agent, &to.addresses()[0], sender_config(), SOON).expect("attached");
    let (sender, asker) = (connect(&from), connect(&reader));
    sender.send(id("r"), chunks(&from, 0..1, PAGE), None).expect("accepted").wait(SOON).expect("delivered");
    let found = asker.query(keys(0..1), LEASE, SOON).expect("asked");
    let place = Place::new(&reader, 1, 1);
    let read = found.read(&[(0, place.at(0, PAGE))], Duration::from_millis(100));
    assert!(matches!(code(read), ErrorCode::TimedOut | ErrorCode::Cancelled));
    eventually("given back", || receiver.stats().pinned == 0);
}

#[test]
fn a_receiver_that_goes_fails_the_query_and_the_read() {
    let p = pair(4);
    deliver(&p, 0..1);
    let found = p.sender.query(keys(0..1), LEASE, SOON).expect("asked");
    p.receiver.close(SOON).expect("closed");
    assert_eq!(p.receiver.stats().pinned, 0);
    let place = Place::new(&p.from, 1, 1);
    assert!(matches!(
        code(found.read(&[(0, place.at(0, PAGE))], SOON)),
        ErrorCode::Closed | ErrorCode::PeerGone
    ));
    let late = p.sender.query(keys(0..1), LEASE, Duration::from_millis(100));
    assert!(matches!(code(late), ErrorCode::Closed | ErrorCode::NotFound | ErrorCode::TimedOut));
}

#[test]
fn who_holds_too_much_is_refused_and_a_reader_that_leaves_holds_nothing() {
    let p = pair(4);
    deliver(&p, 0..1);
    let (from, other) = p.another("reader");
    let held: Vec<_> = (0..64).map(|_| other.query(keys(0..1), LEASE, SOON).expect("asked")).collect();
    assert_eq!(code(other.query(keys(0..1), LEASE, SOON)), ErrorCode::NoCapacity);
    assert_eq!(indexes(&other.query(keys(0..1), Duration::ZERO, SOON).expect("asked")), [0]);
    from.shutdown(SOON).expect("shut down");
    eventually("given back", || p.receiver.stats().pinned == 0);
    drop(held);
}
