//! Sizes, rates and times as people write and read them.
//!
//! Sizes are binary (`64K` = 65,536 bytes); rates are decimal (1 GB/s = 10^9 bytes a second), as everywhere in the
//! documentation.

use std::time::Duration;

/// Parses `4096`, `4K`, `4KiB`, `1.5G`: binary multiples, at least one byte.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let number: f64 =
        number.parse().map_err(|_| format!("{text:?} is no size; write 4096, 64K, 1M or 2G"))?;
    let shift = match unit.trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return Err(format!("{text:?}: unit {unit:?} is none of K, M, G")),
    };
    let bytes = number * (1_u64 << shift) as f64;
    if !(1.0..=1e15).contains(&bytes) {
        return Err(format!("{text:?} is out of range; at least one byte and at most 10^15"));
    }
    Ok(bytes as u64)
}

/// `65536` as `64 KiB`.
pub(crate) fn size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let one = 1_u64 << shift;
        if bytes >= one {
            return if bytes.is_multiple_of(one) {
                format!("{} {unit}", bytes >> shift)
            } else {
                format!("{:.1} {unit}", bytes as f64 / one as f64)
            };
        }
    }
    format!("{bytes} B")
}

/// Gigabytes (10^9) a second; zero for an empty duration.
pub(crate) fn gbps(bytes: u64, time: Duration) -> f64 {
    let secs = time.as_secs_f64();
    if secs > 0.0 { bytes as f64 / secs / 1e9 } else { 0.0 }
}

/// Milliseconds as a number.
pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Microseconds with a sensible number of digits.
pub(crate) fn micros(us: f64) -> String {
    match us {
        us if us < 10.0 => format!("{us:.2}"),
        us if us < 100.0 => format!("{us:.1}"),
        us => format!("{us:.0}"),
    }
}

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Two digits a byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |n: u8| char::from_digit(u32::from(n), 16).unwrap_or('0');
    bytes.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back_as_written() {
        for (text, bytes) in
            [("4096", 4096), ("4K", 4096), ("64KiB", 65_536), ("1.5m", 1_572_864), ("2GB", 2 << 30)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "0", "-1", "1T", "1e40", "9999999999G", "nan"] {
            assert!(parse_size(text).is_err(), "{text:?} was accepted");
        }
        assert_eq!(size(65_536), "64 KiB");
        assert_eq!(size(690_880_512), "658.9 MiB");
        assert_eq!(size(12), "12 B");
        assert_eq!(thousands(690_880_512), "690,880,512");
        assert_eq!(thousands(999), "999");
        assert_eq!(hex(&[0, 0x5a, 0xff]), "005aff");
    }
}
