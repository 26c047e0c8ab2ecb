//! The gRPC health protocol (grpc.health.v1, as the gRPC project documents it): one `Check` over HTTP/2.
//!
//! Its two messages have one field each, so this file encodes and decodes them without generated code.

use super::ProbeError;
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    HeaderMap, Request,
    client::conn::http2,
    header::{CONTENT_TYPE, HeaderName, TE},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};

const PATH: &str = "/grpc.health.v1.Health/Check";
const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// Largest answer, in bytes.
const LIMIT: usize = 4_096;

/// Encodes `HealthCheckRequest { service }` behind the five-byte frame header.
fn encode_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(1 << 3 | 2);
        let mut length = service.len();
        while length > 0x7f {
            message.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        message.put_u8(length as u8);
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put(message);
    framed.freeze()
}

/// Decodes the status of a framed `HealthCheckResponse`. An unknown field ends decoding: the message has only one
/// field.
fn decode_status(body: &[u8]) -> Option<u64> {
    let message = body.strip_prefix(&[0])?;
    let (length, message) = message.split_first_chunk::<4>()?;
    let message = message.get(..u32::from_be_bytes(*length) as usize)?;
    let Some((&key, rest)) = message.split_first() else { return Some(0) };
    if key != 1 << 3 {
        return None;
    }
    let mut value = 0u64;
    for (i, &byte) in rest.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * i as u32)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn grpc_status(headers: &HeaderMap) -> Option<(u32, String)> {
    let code = headers.get(STATUS)?.to_str().ok()?.parse().ok()?;
    let message = headers.get(MESSAGE).and_then(|m| m.to_str().ok()).unwrap_or_default();
    Some((code, message.chars().take(100).collect()))
}

/// Checks whether the server reports `service` as SERVING.
///
/// # Errors
/// The status that it reports instead, or that it does not speak gRPC.
pub async fn check(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: &str,
    authority: &str,
    scheme: &str,
) -> Result<String, ProbeError> {
    let failed = |what: &str| Err(ProbeError::Failed(what.to_owned()));
    let broken = |e: hyper::Error| match ProbeError::sort(&e) {
        ProbeError::Failed(what) => {
            ProbeError::Failed(format!("the answer is not HTTP/2, or the connection broke: {what}"))
        }
        ours => ours,
    };
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(broken)?;
    let request = Request::post(format!("{scheme}://{authority}{PATH}"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header("user-agent", concat!("lbd/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(encode_request(service)))
        .map_err(|e| ProbeError::settings(format!("cannot build the request: {e}")))?;
    let ask = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let code = response.status().as_u16();
        if code != 200 {
            return failed(&format!("HTTP status {code}, expected 200: not a gRPC server"));
        }
        let early = grpc_status(response.headers());
        let body = Limited::new(response.into_body(), LIMIT).collect().await;
        let body = body.map_err(|e| ProbeError::Failed(format!("the answer cannot be read: {e}")))?;
        let late = body.trailers().and_then(grpc_status);
        match early.or(late) {
            None => return failed("the answer has no grpc-status"),
            Some((0, _)) => {}
            Some((5, _)) => return failed(&format!("gRPC: service {service:?} is unknown (NOT_FOUND)")),
            Some((12, _)) => return failed("gRPC: the server has no health service (UNIMPLEMENTED)"),
            Some((code, message)) => return failed(&format!("gRPC status {code}: {message}")),
        }
        match decode_status(&body.to_bytes()) {
            Some(1) => Ok("SERVING".to_owned()),
            Some(2) => failed("NOT_SERVING"),
            Some(3) => failed("SERVICE_UNKNOWN"),
            Some(_) => failed("UNKNOWN"),
            None => failed("the answer is not a health status"),
        }
    };
    let mut connection = std::pin::pin!(connection);
    let mut ask = std::pin::pin!(ask);
    tokio::select! {
        biased;
        result = &mut ask => result,
        _ = &mut connection => ask.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_protobuf_writes_them() {
        assert_eq!(&encode_request("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&encode_request("a.B")[..], b"\0\0\0\0\x05\x0a\x03a.B");
        let long = "x".repeat(300);
        assert_eq!(&encode_request(&long)[..8], b"\0\0\0\x01\x2f\x0a\xac\x02");
        for (body, expected) in [
            (&b"\0\0\0\0\x02\x08\x01"[..], Some(1)),
            (b"\0\0\0\0\x02\x08\x02", Some(2)),
            (b"\0\0\0\0\0", Some(0)),
            (b"\0\0\0\0\x03\x08\xac\x02", Some(300)),
            (b"\0\0\0\0\x09\x08\x01", None),
            (b"\x01\0\0\0\x02\x08\x01", None),
            (b"\0\0\0\0\x02\x10\x01", None),
            (b"\0\0\0\0\x01\x08", None),
            (b"\0\0\0\0\x0c\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"", None),
        ] {
            assert_eq!(decode_status(body), expected, "{body:?}");
        }
    }
}
