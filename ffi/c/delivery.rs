//! Deliveries: requests whose end can be waited for.

use super::args::{OutStruct, timeout, versioned};
use super::handle::{borrow, object, take};
use super::panic::{Answer, guard};
use super::result::{KVXFER_IN_PROGRESS, KVXFER_OK, kvxfer_result_t};
use kvxfer_core::channel::Delivery;
use kvxfer_core::{Error, Result};
use std::time::Duration;

/// A request whose chunks have all been handed over. Usable from any thread.
pub struct kvxfer_delivery_t {
    _opaque: [u8; 0],
}

/// How a request went. Set `struct_size` before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct kvxfer_delivery_report_t {
    /// `sizeof(kvxfer_delivery_report_t)`, set by the caller.
    pub struct_size: usize,
    /// Bytes that crossed; chunks already present do not.
    pub bytes: u64,
    /// Wait for admission, nanoseconds.
    pub queued_ns: u64,
    /// From admission to the receiver's word that all is published, nanoseconds.
    pub moved_ns: u64,
    /// Chunks written.
    pub written: u32,
    /// Chunks that were there already.
    pub present: u32,
    /// `KVXFER_TRANSPORT_...`: what carried the bytes.
    pub transport: u32,
    /// Zero.
    pub reserved: u32,
}
versioned! { kvxfer_delivery_report_t, 48; }

/// What a delivery's handle stands for.
pub(super) struct DeliveryObject(pub(super) Delivery);
object!(DeliveryObject, kvxfer_delivery_t, DELIVERY);

fn wait(
    delivery: &Delivery,
    timeout: Duration,
    report: Option<OutStruct<kvxfer_delivery_report_t>>,
) -> Answer {
    let answer = match delivery.wait(timeout) {
        // It may have ended in this very moment.
        Err(Error::TimedOut { .. }) if delivery.is_finished() => delivery.wait(Duration::ZERO),
        Err(Error::TimedOut { .. }) => return Ok(KVXFER_IN_PROGRESS),
        other => other,
    }?;
    if let Some(out) = report {
        out.set(&kvxfer_delivery_report_t {
            struct_size: 0,
            bytes: answer.bytes,
            queued_ns: answer.queued.as_nanos() as u64,
            moved_ns: answer.moved.as_nanos() as u64,
            written: answer.written,
            present: answer.present,
            transport: answer.transport as u32,
            reserved: 0,
        });
    }
    Ok(KVXFER_OK)
}

/// How the request stands: `KVXFER_IN_PROGRESS`, or once it has ended `KVXFER_OK` or why it failed. Never
/// blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_delivery_poll(delivery: *const kvxfer_delivery_t) -> kvxfer_result_t {
    guard("kvxfer_delivery_poll", || {
        let object = borrow::<DeliveryObject>("delivery", delivery)?;
        if object.0.is_finished() { wait(&object.0, Duration::ZERO, None) } else { Ok(KVXFER_IN_PROGRESS) }
    })
}

/// Waits for the end: `KVXFER_OK` when every chunk is published at the receiver, the reason when the request
/// failed, `KVXFER_IN_PROGRESS` when `timeout_ms` passes first. `report_out` may be NULL; it is written on
/// `KVXFER_OK` only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_delivery_wait(
    delivery: *const kvxfer_delivery_t,
    timeout_ms: u64,
    report_out: *mut kvxfer_delivery_report_t,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_delivery_wait", || unsafe {
        let object = borrow::<DeliveryObject>("delivery", delivery)?;
        let report =
            if report_out.is_null() { None } else { Some(OutStruct::new("report_out", report_out)?) };
        wait(&object.0, timeout("timeout_ms", timeout_ms)?, report)
    })
}

/// Frees the handle; a request under way goes on by itself. NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_delivery_free(delivery: *mut kvxfer_delivery_t) -> kvxfer_result_t {
    guard("kvxfer_delivery_free", || -> Result<_> {
        take::<DeliveryObject>("delivery", delivery).map(|_| KVXFER_OK)
    })
}
