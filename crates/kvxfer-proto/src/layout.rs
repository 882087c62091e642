//! Where pages lie in a pool's region, with every sum checked.

/// A pool: equal pages, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    page_bytes: u64,
    pages: u32,
}

/// A size, page or range that the layout does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Zero pages, zero bytes a page, or more bytes in all than can be addressed.
    #[error(
        "a pool of {pages} pages of {page_bytes} bytes; both must be at least 1 and their product below 2^63"
    )]
    BadPool {
        /// Pages.
        pages: u32,
        /// Bytes of one.
        page_bytes: u64,
    },
    /// No such page.
    #[error("page {page} of a pool of {pages} pages")]
    NoSuchPage {
        /// The page's number.
        page: u32,
        /// Pages in the pool.
        pages: u32,
    },
    /// A chunk that no page can hold, or an empty one.
    #[error("a chunk of {len} bytes; a page holds 1 to {page_bytes}")]
    BadLength {
        /// The chunk's length.
        len: u64,
        /// Bytes of a page.
        page_bytes: u64,
    },
}

impl Layout {
    /// A pool of `pages` pages of `page_bytes` bytes.
    pub fn new(page_bytes: u64, pages: u32) -> Result<Self, LayoutError> {
        let total = page_bytes.checked_mul(u64::from(pages));
        if total.is_none_or(|t| t == 0 || t >= 1 << 63) {
            return Err(LayoutError::BadPool { pages, page_bytes });
        }
        Ok(Self { page_bytes, pages })
    }
    /// Bytes of one page.
    pub const fn page_bytes(&self) -> u64 {
        self.page_bytes
    }
    /// Pages.
    pub const fn pages(&self) -> u32 {
        self.pages
    }
    /// Bytes of the whole pool.
    pub const fn total_bytes(&self) -> u64 {
        self.page_bytes * self.pages as u64
    }
    /// Checks that a chunk of `len` bytes fits a page.
    pub const fn check_len(&self, len: u64) -> Result<(), LayoutError> {
        if len == 0 || len > self.page_bytes {
            return Err(LayoutError::BadLength { len, page_bytes: self.page_bytes });
        }
        Ok(())
    }
    /// Offset of a page's first byte.
    pub const fn offset(&self, page: crate::PageIndex) -> Result<u64, LayoutError> {
        if page.0 >= self.pages {
            return Err(LayoutError::NoSuchPage { page: page.0, pages: self.pages });
        }
        Ok(page.0 as u64 * self.page_bytes)
    }
}
