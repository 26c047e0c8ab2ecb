//! QUIC-LB settings of services and backends (draft-ietf-quic-load-balancers-21) in text form: a config
//! is `ID:SERVER_ID_BYTES:NONCE_BYTES[:KEY]`, a server id is hexadecimal.

use lb_common::quic::{CONFIGS, NONCE_MIN, SERVER_ID_MAX, TOGETHER_MAX};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Format of the connection ids of one config.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct QuicConfig {
    /// Config id, 0 to 6: the first three bits of a connection id.
    pub id: u8,
    /// Length of the server id in bytes.
    pub server_id_bytes: u8,
    /// Length of the nonce in bytes.
    pub nonce_bytes: u8,
    /// Key of AES-128; none: ids are not encrypted.
    pub key: Option<[u8; 16]>,
}

/// A server id: 1 to 15 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerId(Vec<u8>);

/// Why a text is not a valid config or server id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct QuicError(String);

/// Parses pairs of hexadecimal digits.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    // A sign would pass for a digit below.
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// Formats bytes as hexadecimal digits.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl FromStr for QuicConfig {
    type Err = QuicError;

    fn from_str(text: &str) -> Result<Self, QuicError> {
        let bad = |what: String| {
            QuicError(format!("{text:?} is not a valid ID:SERVER_ID_BYTES:NONCE_BYTES[:KEY]: {what}"))
        };
        let mut parts = text.split(':');
        let mut number = |what: &str| {
            let part = parts.next().ok_or_else(|| bad(format!("{what} is missing")))?;
            part.parse::<u8>().map_err(|_| bad(format!("{what} {part:?} is not a number from 0 to 255")))
        };
        let (id, server_id_bytes, nonce_bytes) =
            (number("the id")?, number("the server id's length")?, number("the nonce's length")?);
        let key = match parts.next() {
            None => None,
            Some(key) => match from_hex(key).and_then(|key| <[u8; 16]>::try_from(key).ok()) {
                Some(key) => Some(key),
                None => return Err(bad("the key must have 32 hexadecimal digits".to_owned())),
            },
        };
        if parts.next().is_some() {
            return Err(bad("nothing may follow the key".to_owned()));
        }
        if u32::from(id) >= CONFIGS {
            return Err(bad(format!("the id is {id}: give 0 to {}", CONFIGS - 1)));
        }
        if server_id_bytes == 0 || usize::from(server_id_bytes) > SERVER_ID_MAX {
            return Err(bad(format!("a server id has 1 to {SERVER_ID_MAX} bytes")));
        }
        if nonce_bytes < NONCE_MIN || nonce_bytes > TOGETHER_MAX - server_id_bytes {
            let most = TOGETHER_MAX - server_id_bytes;
            return Err(bad(format!("with this server id, the nonce has {NONCE_MIN} to {most} bytes")));
        }
        Ok(Self { id, server_id_bytes, nonce_bytes, key })
    }
}

impl fmt::Display for QuicConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.id, self.server_id_bytes, self.nonce_bytes)?;
        self.key.map_or(Ok(()), |key| write!(f, ":{}", to_hex(&key)))
    }
}

impl ServerId {
    /// Returns the bytes of the id.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl FromStr for ServerId {
    type Err = QuicError;

    fn from_str(text: &str) -> Result<Self, QuicError> {
        match from_hex(text) {
            Some(bytes) if (1..=SERVER_ID_MAX).contains(&bytes.len()) => Ok(Self(bytes)),
            _ => Err(QuicError(format!(
                "{text:?} is not a valid server id: give 1 to {SERVER_ID_MAX} bytes in hexadecimal"
            ))),
        }
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

macro_rules! by_text {
    ($($ty:ty),+) => { $(
        impl TryFrom<String> for $ty {
            type Error = QuicError;
            fn try_from(text: String) -> Result<Self, QuicError> {
                text.parse()
            }
        }
        impl From<$ty> for String {
            fn from(value: $ty) -> Self {
                value.to_string()
            }
        }
    )+ };
}
by_text!(QuicConfig, ServerId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_are_read_as_they_are_written() {
        for text in ["0:1:4", "6:15:4", "2:8:8:8f95f09245765f80256934e50c66207f"] {
            assert_eq!(text.parse::<QuicConfig>().unwrap().to_string(), text);
        }
        for (text, what) in [
            ("", "the id \"\" is not a number"),
            ("7:3:4", "the id is 7: give 0 to 6"),
            ("0:3", "the nonce's length is missing"),
            ("0:0:4", "1 to 15 bytes"),
            ("0:16:4", "1 to 15 bytes"),
            ("0:3:3", "4 to 16 bytes"),
            ("0:12:8", "4 to 7 bytes"),
            ("0:3:4:00", "32 hexadecimal digits"),
            ("0:3:4:8f95f09245765f80256934e50c66207f:", "nothing may follow"),
        ] {
            let error = text.parse::<QuicConfig>().unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn server_ids_are_hexadecimal() {
        assert_eq!("00c4605e".parse::<ServerId>().unwrap().as_bytes(), [0, 0xc4, 0x60, 0x5e]);
        for text in ["", "0", "0g", "+1", "é0", "00112233445566778899aabbccddeeff"] {
            assert!(
                text.parse::<ServerId>().unwrap_err().to_string().contains("is not a valid server id"),
                "{text}"
            );
        }
    }
}
