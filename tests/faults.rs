//! Peers that are killed, stopped and restarted in every phase of a request, on every transport; and input that is wrong.
//!
//! After each of them the same three things must hold: the error is clear, other peers are still served, and nothing
//! (page, descriptor, thread) is lost.

mod actors;

#[path = "faults/input.rs"]
mod input;
#[path = "faults/phases.rs"]
mod phases;

#[test]
fn actor_entry() {
    actors::actor_entry();
}

macro_rules! phases {
    ($($transport:ident),*) => {$(
        mod $transport {
            phases!(@case $transport, sender_killed, receiver_killed, sender_stopped, receiver_stopped, receiver_restarted);
        }
    )*};
    (@case $transport:ident, $($case:ident),*) => {$(
        #[test]
        fn $case() {
            let transport = stringify!($transport);
            match crate::actors::unavailable(transport) {
                None => crate::phases::$case(transport),
                Some(why) => println!("SKIPPED on {transport}: {why}"),
            }
        }
    )*};
}

phases!(shm, cma, tcp, nixl);
