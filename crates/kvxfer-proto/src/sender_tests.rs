//! What the machine says of chunks whose bytes have not been supplied. Everything else is tested with both machines, in `tests/sim`.

use super::Standing::{HasPage, NoPage, Unknown};
use super::*;
use crate::ChunkKey;

const PAGE: u64 = 4096;

fn spec(n: u32) -> ChunkSpec {
    ChunkSpec { key: ChunkKey::new(format!("k{n}")).expect("valid"), len: PAGE }
}

fn page(n: u32) -> Slot {
    Slot::Page { page: PageIndex(n), generation: Generation(1) }
}

fn declaration(request: RequestId, specs: Vec<ChunkSpec>, more: u32, deadline: Time) -> Declaration {
    Declaration { request, specs, more, deadline, integrity: Integrity::Bound, at_once: false }
}

#[test]
fn chunks_without_bytes_stand_as_the_receiver_says() {
    let mut sender = Sender::new(7, Layout::new(PAGE, 8).expect("a layout"));
    let (now, request) = (Time(0), RequestId::new("r").expect("valid"));
    let deadline = Time(0) + Duration::from_secs(5);
    let specs = (0..3).map(spec).collect();
    let serial = sender.reserve(now, declaration(request, specs, 2, deadline)).expect("taken");
    let stand = |s: &Sender| (0..5).map(|chunk| s.standing(serial, chunk)).collect::<Vec<_>>();
    assert_eq!(stand(&sender), [Unknown, Unknown, Unknown, NoPage, NoPage], "not admitted; two have no name");

    let slots = vec![page(3), Slot::Present, Slot::Pending];
    sender.message(now, &Message::Grant { channel: 7, serial, slots, lease_ms: 1000 });
    assert_eq!(stand(&sender)[..3], [HasPage, NoPage, NoPage]);

    // The other request has failed; two more are named, and one of them gets its page.
    sender.message(now, &Message::Resolved { channel: 7, serial, chunk: 2, slot: page(4) });
    sender.extend(serial, vec![spec(3), spec(4)], true).expect("announced");
    assert_eq!(stand(&sender), [HasPage, NoPage, HasPage, Unknown, Unknown]);
    sender.message(now, &Message::Extended { channel: 7, serial, first: 3, slots: vec![page(5)] });
    assert_eq!(stand(&sender)[3..], [HasPage, Unknown]);

    // Supplied, it is being written; given up, nothing has a page.
    sender.supply(serial, 0).expect("its bytes");
    assert_eq!(stand(&sender)[0], NoPage);
    sender.abort(serial, ErrorCode::Cancelled);
    assert_eq!(stand(&sender), [NoPage; 5]);
    assert_eq!(sender.standing(serial + 1, 0), NoPage, "an unknown request");
}
