//! TLS for probes: caches client configurations and rebuilds them from their files regularly, so that a new certificate
//! takes effect without a restart.

use super::ProbeError;
use crate::desired::model::TlsCheck;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{net::TcpStream, time::Instant};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// How long a configuration is used before its files are read again.
const MAX_AGE: Duration = Duration::from_secs(60);

/// A check's TLS settings and the ALPN protocols that it offers.
type Key = (TlsCheck, &'static [&'static [u8]]);

/// Cache of recent configurations.
#[derive(Default)]
pub struct TlsConfigs {
    cached: Mutex<HashMap<Key, (Instant, Arc<ClientConfig>)>>,
}

impl TlsConfigs {
    /// Does a TLS handshake with the server, whose certificate must be for `name`.
    ///
    /// # Errors
    /// A file cannot be read, or the handshake failed.
    pub async fn connect(
        &self,
        check: &TlsCheck,
        protocols: &'static [&'static [u8]],
        name: &str,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, ProbeError> {
        // Files are this host's: one that cannot be read says nothing about the worker.
        let config = self.config(check, protocols).await.map_err(ProbeError::settings)?;
        let name = ServerName::try_from(name.trim_matches(['[', ']']).to_owned()).map_err(|_| {
            ProbeError::settings(format!("TLS: {name:?} is not a valid server name: set sni"))
        })?;
        let connected = TlsConnector::from(config).connect(name, stream).await;
        connected.map_err(|error| {
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            if let Some(rustls::Error::InvalidMessage(_)) = inner {
                let what = "TLS: handshake failed: the server does not speak TLS on this port";
                return ProbeError::Failed(what.to_owned());
            }
            match ProbeError::sort(&error) {
                ProbeError::Failed(what) => ProbeError::Failed(format!("TLS: handshake failed: {what}")),
                ours => ours,
            }
        })
    }

    async fn config(
        &self,
        check: &TlsCheck,
        protocols: &'static [&'static [u8]],
    ) -> Result<Arc<ClientConfig>, String> {
        let key = (check.clone(), protocols);
        let now = Instant::now();
        let lock = || self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, config)) = lock().get(&key)
            && now - *at < MAX_AGE
        {
            return Ok(config.clone());
        }
        let wanted = key.clone();
        let built = tokio::task::spawn_blocking(move || build_config(&wanted.0, wanted.1)).await;
        let config = Arc::new(built.map_err(|e| e.to_string())??);
        let mut all = lock();
        all.retain(|_, (at, _)| now - *at < MAX_AGE);
        all.insert(key, (now, config.clone()));
        Ok(config)
    }
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = read.map_err(|e| format!("TLS: {}: {e}", file.display()))?;
    if all.is_empty() {
        return Err(format!("TLS: {}: the file contains no certificate", file.display()));
    }
    Ok(all)
}

fn root_store(check: &TlsCheck) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    let found = match &check.ca {
        Some(file) => read_certificates(file)?,
        None => rustls_native_certs::load_native_certs().certs,
    };
    store.add_parsable_certificates(found);
    if store.is_empty() {
        return Err("TLS: this host has no trusted CA certificates: set ca, or verify = false".to_owned());
    }
    Ok(store)
}

fn build_config(check: &TlsCheck, protocols: &[&[u8]]) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("TLS: {e}"))?;
    let builder = if check.verify {
        builder.with_root_certificates(root_store(check)?)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
    };
    let mut config = match &check.client {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = read_certificates(certificate)?;
            let key =
                PrivateKeyDer::from_pem_file(key).map_err(|e| format!("TLS: {}: {e}", key.display()))?;
            builder.with_client_auth_cert(chain, key).map_err(|e| format!("TLS: client certificate: {e}"))?
        }
    };
    config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
    Ok(config)
}

/// Accepts any certificate, for `verify = false`; the handshake's signatures are still verified.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
