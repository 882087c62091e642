//! The control messages between two agents, their limits and their encoding.
//!
//! A frame is a little-endian `u32` length followed by that many bytes of `MessagePack` with named fields: a map of one
//! entry, the message's name in `snake_case` and its fields (a message without fields is the name alone). The first
//! frame in each direction is [`Message::Hello`], which carries the protocol range. Fields this version does not know
//! are skipped, so a later version may add some; a message it does not know is an error that names it. Nothing that comes
//! from the wire is trusted: [`decode`] checks lengths, counts and strings before anybody sees the message.
//!
//! The channel messages belong to a *channel*: one sender's attachment to one pool, numbered by the sender, unique within
//! its agent's epoch. Within it every reservation has a *serial*, larger than the one before and never reused, so that
//! a late or repeated message can never be taken for one of a newer request of the same name.

mod codec;

pub use codec::{WireError, decode, encode};

use crate::{
    AgentName, ChunkKey, Epoch, ErrorCode, Generation, Geometry, Hold, Integrity, PageIndex, RegionId,
    RequestId,
};
use serde::{Deserialize, Serialize};

/// Oldest and newest protocol version this build speaks.
pub const PROTOCOL: std::ops::RangeInclusive<u16> = 1..=1;
/// Largest frame, in bytes, length prefix not counted.
pub const MAX_FRAME: usize = 4 << 20;
/// Largest notification payload, in bytes.
pub const MAX_NOTIFICATION: usize = 4096;
/// Most chunks in one request.
pub const MAX_CHUNKS: usize = 65_536;
/// Most keys in one query.
pub const MAX_QUERY: usize = 4096;
/// Longest text meant for humans, and longest string of a geometry or host identity, in bytes.
pub const MAX_TEXT: usize = 4096;
/// Most transports in one [`Message::Offers`], and most tickets in one [`RegionAdvert`].
pub const MAX_OFFERS: usize = 32;
/// Largest payload of one offer or ticket, in bytes.
pub const MAX_PAYLOAD: usize = 256 << 10;
/// Largest challenge, session token or MAC, in bytes.
pub const MAX_PROOF: usize = 64;

/// What one agent tells another on the control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Message {
    /// First frame in each direction.
    Hello(Hello),
    /// Answers the peer's challenge: `HMAC-SHA256(key, role || both challenges || both names || both epochs)`.
    Auth {
        /// The MAC; empty when no key is configured.
        #[serde(with = "serde_bytes")]
        mac: Vec<u8>,
    },
    /// After authentication: what each transport needs to be reached by the peer.
    Offers {
        /// Token of this connection, 16 random bytes made by the accepting side; empty from the connecting side.
        #[serde(with = "serde_bytes")]
        session: Vec<u8>,
        /// One entry per transport the sender of this message can use towards this peer.
        offers: Vec<Offer>,
    },
    /// Connection is complete on this side.
    Welcome,
    /// The connection is refused or broken off, with the reason.
    Refuse {
        /// Why.
        code: ErrorCode,
        /// For humans; names both values where two differ.
        text: String,
    },

    /// Ask for an exported region by name.
    RegionQuery {
        /// Correlates the answer.
        query: u64,
        /// Name it was exported under.
        name: String,
    },
    /// Answer to [`Message::RegionQuery`].
    RegionInfo {
        /// Same as in the query.
        query: u64,
        /// The region, or none of that name.
        region: Option<RegionAdvert>,
    },
    /// A region is not exported any more; transfers on it fail from now on.
    Unexported {
        /// Its id at the exporting agent.
        region: RegionId,
    },
    /// A notification outside shared memory.
    Notify {
        /// Payload, at most [`MAX_NOTIFICATION`] bytes.
        #[serde(with = "serde_bytes")]
        payload: Vec<u8>,
    },

    /// A sender opens a channel to a pool and states the geometry of what it will send.
    Attach {
        /// The channel, numbered by the sender.
        channel: u64,
        /// Name of the receiver's pool.
        pool: String,
        /// Geometry of the sender.
        geometry: Geometry,
    },
    /// Answer to [`Message::Attach`].
    Attached {
        /// The channel.
        channel: u64,
        /// Region of the pool at the receiver; its pages follow one another.
        region: Option<RegionAdvert>,
        /// Pages in the pool.
        pages: u32,
        /// [`ErrorCode::Ok`] or the reason.
        code: ErrorCode,
        /// Reason in words.
        text: String,
    },
    /// The channel is closed, by either side; its requests have ended.
    Detach {
        /// The channel.
        channel: u64,
        /// Why.
        code: ErrorCode,
        /// For humans.
        text: String,
    },
    /// Declare a request: the chunks that are known, and how many more there will be.
    Reserve {
        /// The channel.
        channel: u64,
        /// Number of this reservation in the channel.
        serial: u64,
        /// The request.
        request: RequestId,
        /// The chunks that are known; all of them unless `more` says otherwise.
        chunks: Vec<ChunkSpec>,
        /// Milliseconds until the sender gives the request up, admission included.
        deadline_ms: u64,
        /// Level the sender will provide digests for.
        integrity: Integrity,
        /// Most chunks that [`Message::Extend`] will still name: pages are granted for them as well, so that no request
        /// that holds pages ever waits for more.
        #[serde(default, skip_serializing_if = "is_zero")]
        more: u32,
        /// Pages out of the sender's advance, one for each chunk or none at all: it may be writing there already. The
        /// request is admitted at once with them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        places: Vec<Hold>,
        /// Pages that the sender would like to have in advance of its next requests.
        #[serde(default, skip_serializing_if = "is_zero")]
        advance: u32,
    },
    /// Pages for requests to come, because a [`Message::Reserve`] asked for some. Nobody else gets one before the sender has
    /// returned it.
    Advance {
        /// The channel.
        channel: u64,
        /// Number of this advance in the channel, larger than the one before: a repetition brings nothing.
        number: u64,
        /// The pages.
        pages: Vec<Hold>,
    },
    /// Others wait for pages: the sender returns what it has in advance and has not used.
    Recall {
        /// The channel.
        channel: u64,
    },
    /// Pages of the advance that no chunk has got, and to which no write can land any more.
    Return {
        /// The channel.
        channel: u64,
        /// The pages.
        pages: Vec<Hold>,
    },
    /// Name further chunks of a declared request, out of the `more` it announced.
    Extend {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Index of the first of them in the request: how many were named before.
        first: u32,
        /// The chunks.
        chunks: Vec<ChunkSpec>,
        /// No more will follow: pages that were kept for them are free.
        last: bool,
    },
    /// Answer to [`Message::Extend`] once the request is admitted: one per chunk, in order.
    Extended {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Index of the first of them in the request.
        first: u32,
        /// Per chunk.
        slots: Vec<Slot>,
    },
    /// The request is admitted: one answer per chunk, in order.
    Grant {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Per chunk.
        slots: Vec<Slot>,
        /// Milliseconds until the lease ends unless renewed by any commit or [`Message::Renew`].
        lease_ms: u64,
    },
    /// A chunk has a new answer: one that was [`Slot::Pending`] is decided, or one that failed its check gets a fresh
    /// generation to be written again.
    Resolved {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Index of the chunk in the request.
        chunk: u32,
        /// Now [`Slot::Page`] or [`Slot::Present`].
        slot: Slot,
    },
    /// The request is refused: nothing was granted, nothing is to be confirmed.
    Refused {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Why.
        code: ErrorCode,
        /// For humans.
        text: String,
    },
    /// All bytes of a chunk are written.
    Commit {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Index of the chunk in the request.
        chunk: u32,
        /// Generation of the page it was written to.
        generation: Generation,
        /// What the receiver checks the bytes against.
        check: Check,
    },
    /// A chunk was checked and published, or failed its check.
    Committed {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Index of the chunk in the request.
        chunk: u32,
        /// Generation named in the commit.
        generation: Generation,
        /// [`ErrorCode::Ok`], [`ErrorCode::Corrupt`], [`ErrorCode::Stale`], …
        code: ErrorCode,
    },
    /// Every chunk of the request is published.
    Ready {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
    },
    /// The sender gives up; `quiet` means that no write can land any more.
    Abort {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// True when every write of the request has ended.
        quiet: bool,
        /// Why.
        code: ErrorCode,
    },
    /// The receiver has ended an admitted request; the sender stops writing and answers with [`Message::Abort`] `quiet: true`.
    Revoke {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
        /// Why.
        code: ErrorCode,
        /// For humans.
        text: String,
    },
    /// Keeps the lease of a request alive while the prefill goes on.
    Renew {
        /// The channel.
        channel: u64,
        /// The reservation.
        serial: u64,
    },
    /// Asks a receiver which of these chunks it has, to read them back from its pages.
    Query {
        /// The channel.
        channel: u64,
        /// Number of this query in the channel, larger than the one before.
        query: u64,
        /// The chunks.
        keys: Vec<ChunkKey>,
        /// Milliseconds the pages of what is found shall stay as they are, unless released before; 0 only asks.
        lease_ms: u64,
    },
    /// Answer to [`Message::Query`].
    Found {
        /// The channel.
        channel: u64,
        /// The query.
        query: u64,
        /// The published ones, in the order of the query; a key that is not here is absent.
        chunks: Vec<FoundChunk>,
        /// Milliseconds their pages stay as they are, counted from this answer; at most what was asked for.
        lease_ms: u64,
        /// [`ErrorCode::Ok`] or why the query was not looked at.
        code: ErrorCode,
        /// Reason in words.
        text: String,
    },
    /// Nothing of a query is read any more.
    Release {
        /// The channel.
        channel: u64,
        /// The query.
        query: u64,
    },
    /// Answer to [`Message::Release`]: whether the pages stayed as they were until it came.
    Released {
        /// The channel.
        channel: u64,
        /// The query.
        query: u64,
        /// [`ErrorCode::Ok`]; [`ErrorCode::Stale`] when the lease had ended: what was read may be of another chunk.
        code: ErrorCode,
    },

    /// Is anybody there?
    Ping {
        /// Echoed.
        nonce: u64,
    },
    /// Answer to [`Message::Ping`].
    Pong {
        /// From the ping.
        nonce: u64,
    },
    /// Orderly end.
    Bye {
        /// For humans.
        reason: String,
    },
}

impl Message {
    /// The channel of a message between a sender and a receiver; `None` for the agents' own messages.
    pub fn channel(&self) -> Option<u64> {
        match self {
            Self::Attach { channel, .. }
            | Self::Attached { channel, .. }
            | Self::Detach { channel, .. }
            | Self::Reserve { channel, .. }
            | Self::Advance { channel, .. }
            | Self::Recall { channel, .. }
            | Self::Return { channel, .. }
            | Self::Extend { channel, .. }
            | Self::Extended { channel, .. }
            | Self::Grant { channel, .. }
            | Self::Resolved { channel, .. }
            | Self::Refused { channel, .. }
            | Self::Commit { channel, .. }
            | Self::Committed { channel, .. }
            | Self::Ready { channel, .. }
            | Self::Abort { channel, .. }
            | Self::Revoke { channel, .. }
            | Self::Renew { channel, .. }
            | Self::Query { channel, .. }
            | Self::Found { channel, .. }
            | Self::Release { channel, .. }
            | Self::Released { channel, .. } => Some(*channel),
            _ => None,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the form serde asks for")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What a commit says of the chunk's bytes; see [`crate::integrity`] for the formulas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Nothing.
    None,
    /// Digest at level [`Integrity::Bound`]. Enough for a request at level `full` when the transport has checked every
    /// byte on arrival.
    Bound(u64),
    /// Digest at level [`Integrity::Full`].
    Full(u64),
}

/// Who is speaking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest protocol version spoken.
    pub protocol_min: u16,
    /// Newest protocol version spoken.
    pub protocol_max: u16,
    /// Library version, for humans.
    pub library: String,
    /// Name of the agent.
    pub agent: AgentName,
    /// Its epoch.
    pub epoch: Epoch,
    /// Where it runs.
    pub host: HostIdentity,
    /// 32 random bytes for the peer to authenticate over.
    #[serde(with = "serde_bytes")]
    pub challenge: Vec<u8>,
    /// True when this side demands authentication.
    pub auth_required: bool,
}

/// Enough to tell whether two agents share a host, a PID namespace or a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostIdentity {
    /// Kernel boot id.
    pub boot_id: String,
    /// Inode of the PID namespace.
    pub pid_namespace: u64,
    /// Inode of the network namespace.
    pub net_namespace: u64,
    /// Process id in its own namespace.
    pub pid: u32,
    /// Random token of the process, new at each start.
    pub process: u64,
    /// Unix-socket address for passing file descriptors; a leading `@` means the abstract namespace; empty when none.
    pub side_socket: String,
}

/// What a transport needs to reach the sender of this message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Name of the transport, e.g. `shm`.
    pub transport: String,
    /// Opaque to everything but that transport.
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
}

/// A region a peer may read or write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionAdvert {
    /// Its id at the exporting agent.
    pub id: RegionId,
    /// The name it is exported under.
    pub name: String,
    /// Length in bytes.
    pub len: u64,
    /// Peers may read it.
    pub readable: bool,
    /// Peers may write it.
    pub writable: bool,
    /// One ticket per transport that can reach this memory.
    pub tickets: Vec<Ticket>,
}

/// How one transport reaches one region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Name of the transport.
    pub transport: String,
    /// Opaque to everything but that transport.
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
    /// Label of the file descriptor sent over the side socket; 0 when none.
    pub fd_label: u64,
}

/// One chunk of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkSpec {
    /// Content key.
    pub key: ChunkKey,
    /// Valid bytes; at most a page.
    pub len: u64,
}

/// What the receiver says of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slot {
    /// Write it to this page.
    Page {
        /// Which page.
        page: PageIndex,
        /// Its generation, to be named in the commit.
        generation: Generation,
    },
    /// Already here, checked and pinned for this request: nothing to write.
    Present,
    /// Another request is writing it; [`Message::Resolved`] follows.
    Pending,
}

/// One chunk that a query has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundChunk {
    /// Its place in the query.
    pub index: u32,
    /// Where it is.
    pub page: PageIndex,
    /// Generation of that page.
    pub generation: Generation,
    /// Valid bytes.
    pub len: u64,
    /// The request that wrote it; its digest is bound to it.
    pub request: RequestId,
    /// What its writer said of its bytes, and the receiver has checked.
    pub check: Check,
}
