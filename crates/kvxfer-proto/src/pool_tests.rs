use super::*;

const RETENTION: Duration = Duration::from_secs(10);

fn pool(pages: u32) -> Pool {
    Pool::new(pages, RETENTION)
}

fn key(n: u32) -> ChunkKey {
    ChunkKey::new(format!("k{n}")).expect("valid")
}

fn specs(keys: impl IntoIterator<Item = u32>) -> Vec<ChunkSpec> {
    keys.into_iter().map(|n| ChunkSpec { key: key(n), len: 100 }).collect()
}

fn admit(pool: &mut Pool, owner: u64, keys: impl IntoIterator<Item = u32>) -> Option<Vec<Placement>> {
    let admitted = pool.admit(Owner(owner), &specs(keys), Source::Room(0)).expect("no conflict");
    pool.check().expect("consistent");
    admitted.map(|a| a.placements)
}

fn hold(p: Placement) -> Hold {
    match p {
        Placement::Write(h) | Placement::Present(h) | Placement::Pending(h) => h,
    }
}

fn origin() -> Origin {
    Origin { request: RequestId::new("r").expect("valid"), check: Check::Bound(7) }
}

/// Writes and publishes one chunk by a request that ends well.
fn publish(pool: &mut Pool, owner: u64, n: u32, now: Time) -> Hold {
    let placed = admit(pool, owner, [n]).expect("room");
    let h = hold(placed[0]);
    assert_eq!(pool.publish(Owner(owner), &key(n), h, origin()), Some(vec![]));
    pool.settle(h, true, now);
    pool.check().expect("consistent");
    h
}

#[test]
fn admission_is_all_or_nothing() {
    let mut p = pool(4);
    assert_eq!(admit(&mut p, 1, 0..3).map(|v| v.len()), Some(3));
    assert_eq!(admit(&mut p, 2, 10..12), None);
    assert_eq!(p.counts(), Counts { free: 1, writing: 3, ..Counts::default() }, "nothing was taken");
    assert_eq!(p.known(&key(10)), Known::Absent);
}

#[test]
fn a_generation_is_never_used_twice() {
    let mut p = pool(1);
    let mut seen = std::collections::HashSet::new();
    for owner in 0..10 {
        let h = hold(admit(&mut p, owner, [owner as u32]).expect("room")[0]);
        assert!(seen.insert(h.generation));
        let again = p.renew(Owner(owner), h).expect("held");
        assert!(seen.insert(again.generation));
        assert_eq!(p.renew(Owner(owner), h), None, "the old hold is void");
        assert_eq!(p.publish(Owner(owner), &key(owner as u32), h, origin()), None, "so is its publication");
        p.fail_write(Owner(owner), &key(owner as u32));
        p.give_back(Owner(owner), again);
    }
}

#[test]
fn a_pending_chunk_is_granted_to_the_waiter_when_its_write_fails() {
    let mut p = pool(3);
    let a = admit(&mut p, 1, [7]).expect("room");
    let b = admit(&mut p, 2, [7]).expect("room");
    let c = admit(&mut p, 3, [7]).expect("room");
    assert!(matches!((b[0], c[0]), (Placement::Pending(_), Placement::Pending(_))));
    assert_eq!(p.fail_write(Owner(1), &key(7)), Some((Owner(2), 0)));
    p.quarantine(Owner(1), hold(a[0]));
    assert_eq!(p.publish(Owner(2), &key(7), hold(b[0]), origin()), Some(vec![(Owner(3), 0)]));
    p.give_back(Owner(3), hold(c[0]));
    assert_eq!(p.counts(), Counts { free: 1, published: 1, quarantined: 1, ..Counts::default() });
    p.end_quarantine(Owner(9), hold(a[0]).page);
    assert_eq!(p.counts().quarantined, 1, "only its own owner ends a quarantine");
    p.end_quarantine(Owner(1), hold(a[0]).page);
    assert_eq!(p.counts().free, 2);
    p.check().expect("consistent");
}

#[test]
fn a_failed_request_leaves_nothing_visible() {
    let mut p = pool(2);
    let placed = admit(&mut p, 1, [1, 2]).expect("room");
    p.publish(Owner(1), &key(1), hold(placed[0]), origin());
    assert_eq!(p.known(&key(1)), Known::Published(100));
    p.settle(hold(placed[0]), false, Time(0));
    p.fail_write(Owner(1), &key(2));
    p.give_back(Owner(1), hold(placed[1]));
    assert_eq!((p.known(&key(1)), p.known(&key(2))), (Known::Absent, Known::Absent));
    assert_eq!(p.counts().free, 2);
    p.check().expect("consistent");
}

#[test]
fn a_shared_chunk_is_kept_for_every_announced_consumer() {
    let mut p = pool(2);
    publish(&mut p, 1, 5, Time(0));
    let b = hold(admit(&mut p, 2, [5]).expect("present")[0]);
    assert!(p.remove(Time(0), &key(5)), "the first consumer is done");
    assert_eq!(p.known(&key(5)), Known::Published(100), "the second request counts on it");
    p.settle(b, true, Time(0));
    assert_eq!(p.known(&key(5)), Known::Published(100));
    assert!(p.remove(Time(0), &key(5)));
    assert_eq!((p.known(&key(5)), p.counts().free), (Known::Absent, 2));
    assert!(!p.remove(Time(0), &key(5)));
    p.check().expect("consistent");
}

#[test]
fn a_consumer_may_be_faster_than_the_end_of_the_request() {
    let mut p = pool(2);
    let h = hold(admit(&mut p, 1, [5]).expect("room")[0]);
    p.publish(Owner(1), &key(5), h, origin());
    let (pinned, _) = p.pin(&key(5)).expect("visible");
    assert!(p.remove(Time(0), &key(5)));
    assert_eq!(p.known(&key(5)), Known::Absent, "removed means removed");
    p.check().expect("consistent");
    p.unpin(pinned);
    assert_eq!(p.counts().free, 2);
    p.settle(h, true, Time(0));
    assert_eq!(p.counts().free, 2, "the request's end finds nothing to announce");
    p.check().expect("consistent");
}

#[test]
fn a_pinned_page_outlives_its_removal() {
    let mut p = pool(1);
    publish(&mut p, 1, 1, Time(0));
    let (h, len) = p.pin(&key(1)).expect("published");
    assert_eq!((len, p.counts().pinned), (100, 1));
    assert!(p.remove(Time(0), &key(1)));
    assert_eq!(admit(&mut p, 2, [2]), None, "the page is not free yet");
    p.unpin(h);
    p.unpin(h);
    assert_eq!(admit(&mut p, 2, [2]).map(|v| v.len()), Some(1));
    p.unpin(h);
    p.check().expect("consistent");
}

#[test]
fn retention_bounds_a_consumer_that_never_comes() {
    let mut p = pool(2);
    publish(&mut p, 1, 1, Time(0));
    publish(&mut p, 2, 2, Time(5));
    let (h, _) = p.pin(&key(2)).expect("published");
    p.unpin(h);
    assert_eq!(p.next_expiry(), Some(Time(0) + RETENTION));
    p.expire(Time(0) + RETENTION);
    assert_eq!(p.known(&key(1)), Known::Absent);
    assert_eq!(p.known(&key(2)), Known::Published(100), "its consumer came: it stays as a cached chunk");
    assert_eq!(p.next_expiry(), None);
    p.check().expect("consistent");
}

#[test]
fn admission_throws_out_the_least_recently_used_cached_chunk_only() {
    let mut p = pool(4);
    for n in 0..4 {
        publish(&mut p, u64::from(n), n, Time(0));
    }
    assert_eq!(admit(&mut p, 10, [100]), None, "all are awaited: none may be thrown out");
    for n in [2, 0, 1] {
        let (h, _) = p.pin(&key(n)).expect("published");
        p.unpin(h);
    }
    assert_eq!(p.available(), 3);
    assert!(admit(&mut p, 10, [100, 0]).is_some(), "0 is present and safe");
    assert_eq!(p.known(&key(2)), Known::Absent, "2 was used longest ago");
    assert_eq!(p.known(&key(1)), Known::Published(100));
    assert_eq!(admit(&mut p, 11, [101, 102]), None, "0 is claimed, 3 awaited: only 1 is left");
    assert!(admit(&mut p, 11, [101]).is_some());
}

#[test]
fn the_same_key_with_another_length_is_refused() {
    let mut p = pool(4);
    publish(&mut p, 1, 1, Time(0));
    let other = vec![ChunkSpec { key: key(1), len: 99 }];
    assert_eq!(
        p.admit(Owner(2), &other, Source::Room(0)),
        Err(LengthConflict { key: key(1), ours: 100, theirs: 99 })
    );
    admit(&mut p, 3, [2]);
    let other = vec![ChunkSpec { key: key(2), len: 99 }];
    assert!(p.admit(Owner(2), &other, Source::Room(0)).is_err());
    p.check().expect("consistent");
}

#[test]
fn what_a_consumer_leaves_of_a_request_is_not_waited_for() {
    let mut p = pool(8);
    // Three requests of one chunk each, announced as one; the last chunk is announced to another consumer too.
    let holds: Vec<Hold> = (0..4).map(|n| publish(&mut p, u64::from(n), n, Time(0))).collect();
    p.announce(Owner(10), holds.clone());
    let shared = admit(&mut p, 11, [3]).expect("present");
    p.settle(hold(shared[0]), true, Time(0));
    p.announce(Owner(11), vec![holds[3]]);
    let later = Time(0) + Duration::from_secs(1);
    assert!(p.pin(&key(0)).is_some());
    assert!(p.remove(later, &key(0)));
    p.unpin(holds[0]);
    p.check().expect("consistent");
    p.expire(later + LEFTOVER);
    assert_eq!(p.known(&key(0)), Known::Absent);
    assert_eq!((p.known(&key(1)), p.known(&key(2))), (Known::Absent, Known::Absent), "left over");
    assert_eq!(p.known(&key(3)), Known::Published(100), "somebody else comes for it");
    p.expire(Time(0) + RETENTION);
    assert_eq!(p.counts().free, 8);
    assert!(p.groups.is_empty(), "nothing is remembered of what has gone");
    p.check().expect("consistent");
}

#[test]
fn a_request_of_which_nothing_was_taken_keeps_its_retention() {
    let mut p = pool(8);
    let holds: Vec<Hold> = (0..2).map(|n| publish(&mut p, u64::from(n), n, Time(0))).collect();
    p.announce(Owner(10), holds);
    p.expire(Time(0) + LEFTOVER);
    assert_eq!(p.known(&key(1)), Known::Published(100));
    p.expire(Time(0) + RETENTION);
    assert!(p.groups.is_empty(), "nothing is remembered of what has gone");
}

#[test]
fn a_loan_keeps_bytes_and_is_nobodys_consumption() {
    let mut p = pool(1);
    let (start, h) = (Time(0), publish(&mut p, 1, 1, Time(0)));
    assert_eq!(p.lend(&key(1), false), Some((h, 100, origin())), "asking pins nothing");
    assert_eq!(p.counts().pinned, 0);
    assert_eq!(p.lend(&key(1), true), Some((h, 100, origin())));
    assert_eq!((p.counts().pinned, p.available()), (1, 0));
    // Its consumer has still not come: what is lent is kept beyond the retention, and dropped when it is back.
    p.expire(start + 2 * RETENTION);
    assert_eq!(p.known(&key(1)), Known::Published(100));
    p.unpin(h);
    p.check().expect("consistent");
    assert_eq!(p.available(), 0, "protected for its consumer, who may still come");
    p.expire(start + 2 * RETENTION);
    assert_eq!((p.known(&key(1)), p.counts().free), (Known::Absent, 1));
}

#[test]
fn a_lent_chunk_can_be_removed_and_its_page_waits() {
    let mut p = pool(1);
    let h = publish(&mut p, 1, 1, Time(0));
    assert!(p.lend(&key(1), true).is_some());
    assert!(p.remove(Time(0), &key(1)));
    assert_eq!((p.known(&key(1)), p.lend(&key(1), true)), (Known::Absent, None));
    assert_eq!(p.counts().free, 0, "somebody reads it");
    p.unpin(h);
    p.check().expect("consistent");
    assert_eq!(p.counts().free, 1);
}
