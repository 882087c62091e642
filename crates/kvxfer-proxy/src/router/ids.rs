//! Ids of transfers, unique among proxies and over restarts.

/// Hands out ids: a prefix made of this proxy's start and random bits, and a counter.
#[derive(Clone, Debug)]
pub struct Ids {
    prefix: String,
    next: u64,
}

impl Ids {
    /// `started` is this process' start in milliseconds since 1970, `random` comes from the system.
    pub fn new(started: u64, random: u64) -> Self {
        Self { prefix: format!("kvx{started:x}{random:016x}-"), next: 1 }
    }

    /// A new number.
    pub fn fresh(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// A number as it travels.
    pub fn text(&self, number: u64) -> String {
        format!("{}{number}", self.prefix)
    }

    /// The number of an id of ours, alone.
    pub fn parse(&self, text: &str) -> Option<u64> {
        let digits = text.strip_prefix(self.prefix.as_str())?;
        (!digits.starts_with(['+', '0'])).then(|| digits.parse().ok()).flatten()
    }

    /// The number of an id of ours inside an engine's own request id (`cmpl-…-0-1f2e3d4c`).
    pub fn find(&self, text: &str) -> Option<u64> {
        let at = text.find(self.prefix.as_str())? + self.prefix.len();
        let digits = &text[at..];
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        digits[..end].parse().ok()
    }

    /// Whether the number was handed out.
    pub fn known(&self, number: u64) -> bool {
        number < self.next
    }
}
