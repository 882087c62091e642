//! A JSON object whose values are left as the text they came in: read once, changed in a few places, written again
//! with everything else untouched and in its order. Numbers keep their digits, unknown fields their place.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// An object's fields in order, each value as raw JSON text. A key that appears twice keeps its last value, as
/// Python's reader does.
#[derive(Debug, Clone, Default)]
pub struct Object<'a> {
    fields: Vec<(Cow<'a, str>, &'a str)>,
}

impl<'a> Object<'a> {
    /// Reads an object; the whole text is checked to be JSON.
    pub fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The raw value of a field.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.fields.iter().find(|(k, _)| k == key).map(|(_, v)| *v)
    }

    /// The raw value of a field, unless it is missing or null.
    pub fn present(&self, key: &str) -> Option<&'a str> {
        self.get(key).filter(|v| *v != "null")
    }

    /// The fields in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &'a str)> {
        self.fields.iter().map(|(k, v)| (k.as_ref(), *v))
    }

    /// Writes the object with changes; see `write_patched`.
    pub fn write(&self, out: &mut Vec<u8>, patches: &[(&str, Option<&str>)]) {
        write_patched(out, self.iter(), patches);
    }
}

/// Writes fields as an object. A patch replaces the value of its key in place, or is appended when the key is
/// missing; a patch of `None` leaves the key out.
pub(super) fn write_patched<'f>(
    out: &mut Vec<u8>,
    fields: impl Iterator<Item = (&'f str, &'f str)>,
    patches: &[(&str, Option<&str>)],
) {
    debug_assert!(patches.len() <= 64, "the seen-mask holds 64 patches");
    let mut seen = 0u64;
    out.push(b'{');
    for (key, value) in fields {
        let value = match patches.iter().position(|(k, _)| *k == key) {
            Some(i) => {
                seen |= 1 << i;
                match patches[i].1 {
                    Some(value) => value,
                    None => continue,
                }
            }
            None => value,
        };
        write_field(out, key, value);
    }
    for (i, (key, value)) in patches.iter().enumerate() {
        if seen & (1 << i) == 0
            && let Some(value) = value
        {
            write_field(out, key, value);
        }
    }
    out.push(b'}');
}

/// Appends `"key":value`, with a comma unless it is the first.
fn write_field(out: &mut Vec<u8>, key: &str, value: &str) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    write_string(out, key);
    out.push(b':');
    out.extend_from_slice(value.as_bytes());
}

/// Appends a JSON string.
pub(super) fn write_string(out: &mut Vec<u8>, text: &str) {
    if text.bytes().all(|b| b >= 0x20 && b != b'"' && b != b'\\') {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    } else {
        // Writing to memory and writing a string cannot fail.
        let _ = serde_json::to_writer(out, text);
    }
}

/// A JSON string as text.
pub(super) fn string(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len() + 2);
    write_string(&mut out, text);
    String::from_utf8(out).unwrap_or_default()
}

/// The elements of a JSON array as raw text; empty for anything else.
pub(super) fn elements(raw: &str) -> Vec<&str> {
    serde_json::from_str::<Vec<&RawValue>>(raw)
        .map(|v| v.into_iter().map(RawValue::get).collect())
        .unwrap_or_default()
}

/// A JSON array of raw elements.
pub(super) fn array<T: AsRef<str>>(elements: &[T]) -> String {
    let mut out = String::from("[");
    for (i, element) in elements.iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push_str(element.as_ref());
    }
    out.push(']');
    out
}

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields: Vec<(Cow<'de, str>, &'de str)> = Vec::with_capacity(8);
                while let Some(Key(key)) = map.next_key::<Key<'de>>()? {
                    let value: &'de RawValue = map.next_value()?;
                    match fields.iter_mut().find(|(k, _)| *k == key) {
                        Some(field) => field.1 = value.get(),
                        None => fields.push((key, value.get())),
                    }
                }
                Ok(Object { fields })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}
