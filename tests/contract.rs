//! The Contract, line by line, on every transport that can run it. See `docs/contract.md`.
//!
//! `cargo test --test contract shm::` runs one transport, `cargo test --test contract no_leak` one line on all of them.

mod actors;

#[path = "contract/admission.rs"]
mod admission;
#[path = "contract/advance.rs"]
mod advance;
#[path = "contract/endings.rs"]
mod endings;
#[path = "contract/peers.rs"]
mod peers;
#[path = "contract/reading.rs"]
mod reading;
#[path = "contract/writes.rs"]
mod writes;

#[test]
fn actor_entry() {
    actors::actor_entry();
}

macro_rules! contract {
    ($($transport:ident),*) => {$(
        mod $transport {
            contract!(@lines $transport,
                writes::visible_only_when_written,
                writes::no_late_write,
                endings::everything_ends,
                admission::no_deadlock_by_admission,
                endings::no_leak,
                admission::shared_prefixes_are_right,
                peers::restart_is_normal,
                peers::mismatch_is_an_error_not_garbage,
                writes::only_the_bytes_that_matter,
                endings::errors_reach_who_can_act,
                peers::no_stranger_writes,
                peers::you_can_see_the_path,
                reading::what_is_read_back_is_right,
                reading::nobody_holds_pages_by_reading,
                advance::pages_in_advance_are_nobody_elses
            );
        }
    )*};
    (@device $transport:ident, $sides:literal, $($line:ident),*) => {$(
        #[test]
        fn $line() {
            crate::actors::on_devices($sides, concat!(stringify!($transport), "::", stringify!($line)));
        }
    )*};
    (@lines $transport:ident, $($file:ident::$line:ident),*) => {$(
        #[test]
        fn $line() {
            crate::actors::on(stringify!($transport), stringify!($line), crate::$file::$line);
        }
    )*};
}

contract!(inproc, shm, cma, tcp, nixl, cuda_ipc);

/// Staged through pinned memory: the same lines on `tcp` with device memory on both sides, or on one of them; and on `nixl`, whose
/// backends take host memory only under the stand-in driver, with device memory at the side that posts.
macro_rules! on_devices {
    ($($module:ident = $transport:ident $sides:literal;)*) => {$(
        mod $module {
            contract!(@device $transport, $sides,
                visible_only_when_written,
                no_late_write,
                everything_ends,
                no_leak,
                shared_prefixes_are_right,
                only_the_bytes_that_matter,
                errors_reach_who_can_act,
                what_is_read_back_is_right
            );
        }
    )*};
}

on_devices! {
    tcp_between_devices = tcp "both";
    tcp_from_a_device = tcp "sender";
    tcp_to_a_device = tcp "receiver";
    nixl_from_a_device = nixl "sender";
}
