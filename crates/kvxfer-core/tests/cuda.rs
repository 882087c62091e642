//! Device memory, fences and `cuda_ipc`, through cudarc's real loading path: under the stand-in driver, or with `KVXFER_TEST_GPU=1` on
//! this machine's GPU (scenarios that need a knob of the stand-in are left out there, and say so).
//!
//! Each scenario is a process of its own, started with the driver it needs. At its end the stand-in tells what was made and not
//! freed: that must be nothing.
#![cfg(feature = "cuda")]

mod common;
#[path = "cuda/copies.rs"]
mod copies;
#[path = "cuda/faults.rs"]
mod faults;
#[path = "cuda/harness.rs"]
mod harness;
#[path = "cuda/memory.rs"]
mod memory;
#[cfg(feature = "nixl")]
#[path = "cuda/nixl.rs"]
mod nixl;
#[path = "cuda/processes.rs"]
mod processes;
#[path = "cuda/raw.rs"]
mod raw;
#[path = "cuda/standin.rs"]
mod standin;

/// The other process of `processes`.
#[test]
fn peer_entry() {
    processes::peer_entry();
}

macro_rules! scenarios {
    ($($file:ident::$name:ident $([$($key:ident = $value:expr),*])?;)*) => {$(
        #[test]
        fn $name() {
            harness::run(stringify!($name), &[$($((stringify!($key), $value)),*)?], $file::$name);
        }
    )*};
}

scenarios! {
    memory::kinds_of_device_memory;
    memory::pinned_host_memory;
    memory::pointers_that_are_not_device_memory_are_refused;
    memory::a_full_device_is_an_error_and_leaks_nothing [KVXSTANDIN_MEMORY = "67108864"];
    memory::a_failing_step_leaks_nothing [KVXSTANDIN_DEVICES = "1"];
    memory::no_driver_is_an_ordinary_error [LD_LIBRARY_PATH = ""];
    memory::no_visible_device_is_an_ordinary_error [CUDA_VISIBLE_DEVICES = ""];
    memory::a_driver_too_old_is_an_ordinary_error [KVXSTANDIN_VERSION = "11080"];
    copies::every_pair_of_memories;
    copies::two_devices [KVXSTANDIN_DEVICES = "2"];
    copies::two_devices_that_do_not_reach_each_other [KVXSTANDIN_DEVICES = "2", KVXSTANDIN_NO_PEER = "1"];
    copies::a_driver_without_batched_copies [LD_LIBRARY_PATH = "old"];
    copies::kernels_that_do_not_load_are_replaced_by_copies [KVXSTANDIN_FAIL = "cuModuleLoadDataEx:0:218", KVXFER_NVRTC = "0"];
    copies::sockets [KVXSTANDIN_DELAY_US = "200"];
    copies::sockets_and_a_failing_device [KVXSTANDIN_DELAY_US = "50"];
    copies::streams_and_kernels_are_made_once;
    copies::scattered_blocks_of_a_whole_prompt;
    copies::nothing_is_read_before_the_fence [KVXSTANDIN_DEVICES = "1"];
    copies::other_transports_wait_for_the_fence [KVXSTANDIN_DEVICES = "1"];
    copies::a_transfer_cancelled_before_its_fence_ends;
    faults::a_stream_of_another_context_is_refused;
    faults::a_failed_submission_ends_the_transfer [KVXSTANDIN_FAIL = "cuMemcpyAsync:40:999"];
    faults::memory_freed_too_early_ends_the_transfer [KVXSTANDIN_DEVICES = "1"];
    faults::a_context_destroyed_first_is_an_error [KVXSTANDIN_DEVICES = "1"];
    processes::regions_by_handle;
    processes::regions_by_descriptor_where_handles_are_refused [KVXSTANDIN_NO_IPC = "1"];
    processes::memory_that_cannot_be_shared_is_named [KVXSTANDIN_NO_IPC = "1"];
    processes::a_gather_straight_into_the_memory_of_another_process;
    processes::mappings_of_forgotten_regions_are_bounded;
    processes::descriptors_of_forgotten_regions_are_given_back;
    processes::a_host_pool_of_another_process;
    processes::a_peer_killed_with_its_memory_mapped;
    processes::another_pid_namespace_is_reached_by_descriptor;
    processes::a_peer_killed_in_another_pid_namespace;
    processes::a_hidden_device_is_named [KVXSTANDIN_DEVICES = "2"];
}

#[cfg(feature = "nixl")]
scenarios! {
    nixl::host_only_backends_refuse_device_memory;
    nixl::device_memory_through_slots [KVXSTANDIN_DELAY_US = "100"];
    nixl::no_more_slots_than_configured [KVXSTANDIN_DELAY_US = "200"];
    nixl::cancelled_in_the_middle_no_byte_changes_afterwards [KVXSTANDIN_DELAY_US = "1000"];
    nixl::nothing_is_staged_before_the_fence;
    nixl::a_failing_device_fails_its_transfer_alone [KVXSTANDIN_DEVICES = "1"];
    nixl::a_peers_device_is_reached_another_way;
}
