//! QUIC: a worker that gives out connection ids by QUIC-LB, and a client that downloads and moves to another
//! address meanwhile.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use quinn::{
    ClientConfig, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, ServerConfig, TokioRuntime,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use socket2::{Domain, Socket, Type};

use crate::netns::Namespace;

/// Bytes of every download.
pub const DOWNLOAD: usize = 8 * 1024 * 1024;
const PATIENCE: Duration = Duration::from_secs(30);
const HOST: &str = "worker";

/// How a worker writes its server id into connection ids.
#[derive(Clone, Copy, Debug)]
pub struct Ids {
    /// Config id.
    pub config: u8,
    /// Server id.
    pub server_id: [u8; 8],
    /// Key: then there are 8 bytes of nonce and all is one block; else 4 bytes, and in the clear.
    pub key: Option<[u8; 16]>,
}

impl Ids {
    /// An id that the worker might give out, in hexadecimal.
    pub fn one(mut self) -> String {
        self.generate_cid().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut nonce = [0; 8];
        let mut random = std::fs::File::open("/dev/urandom").expect("every Linux has it");
        std::io::Read::read_exact(&mut random, &mut nonce).expect("it never ends");
        let len = self.cid_len();
        let mut id = [&[self.config << 5 | (len - 1) as u8][..], &self.server_id, &nonce].concat();
        id.truncate(len);
        if let Some(key) = self.key {
            let mut block: [u32; 4] = std::array::from_fn(|i| {
                u32::from_be_bytes(id[1 + i * 4..5 + i * 4].try_into().expect("four"))
            });
            lb_ebpf::quic::aes::encrypt(&lb_ebpf::quic::aes::expand(key), &mut block);
            id.splice(1.., block.iter().flat_map(|word| word.to_be_bytes()));
        }
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        if self.key.is_some() { 17 } else { 13 }
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A certificate for all workers.
#[derive(Debug)]
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Identity {
    /// A new one.
    pub fn new() -> Result<Self> {
        let made = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        Ok(Self { certificate: made.cert.der().clone(), key: made.signing_key.serialize_der() })
    }
}

/// Serves downloads at `address` (a VIP, perhaps not there yet) until the test ends.
pub fn serve(
    namespace: &Namespace,
    name: &str,
    address: SocketAddr,
    ids: Ids,
    identity: &Identity,
) -> Result<JoinHandle<()>> {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.key.clone()));
    let config = ServerConfig::with_single_cert(vec![identity.certificate.clone()], key)?;
    let name = name.to_owned();
    namespace.spawn_async(move || async move {
        let mut endpoint_config = EndpointConfig::default();
        endpoint_config.cid_generator(move || Box::new(ids));
        let socket = bind(address).expect("the port is free");
        let endpoint = Endpoint::new(endpoint_config, Some(config), socket, Arc::new(TokioRuntime))
            .expect("the socket works");
        while let Some(incoming) = endpoint.accept().await {
            let name = name.clone();
            tokio::spawn(async move {
                let Ok(connection) = incoming.await else { return };
                while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                    let _ = receive.read_to_end(64).await;
                    let mut answer = name.clone().into_bytes();
                    answer.resize(DOWNLOAD, b'.');
                    let _ = send.write_all(&answer).await;
                    let _ = send.finish();
                }
            });
        }
    })
}

fn bind(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Downloads from `target` and moves from one address to the other in the middle; who answered before, who after.
pub fn download(
    namespace: &Namespace,
    target: SocketAddr,
    addresses: [IpAddr; 2],
    identity: &Identity,
) -> Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.certificate.clone())?;
    let config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    let run = namespace.spawn_async(move || async move {
        tokio::time::timeout(PATIENCE, migrate(target, addresses, config))
            .await
            .with_context(|| format!("no download within {PATIENCE:?}"))?
    })?;
    run.join().map_err(|_| anyhow!("the client panicked"))?
}

async fn migrate(target: SocketAddr, addresses: [IpAddr; 2], config: ClientConfig) -> Result<String> {
    let socket = |address| bind(SocketAddr::new(address, 0));
    let mut endpoint =
        Endpoint::new(EndpointConfig::default(), None, socket(addresses[0])?, Arc::new(TokioRuntime))?;
    endpoint.set_default_client_config(config);
    let connection = endpoint.connect(target, HOST)?.await.context("no connection")?;
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(b"get").await?;
    send.finish()?;
    let (mut first, mut bytes, mut moved) = (Vec::new(), 0, false);
    while let Some(chunk) = receive.read_chunk(64 * 1024, true).await.context("the download broke off")? {
        if first.len() < 2 {
            first.extend_from_slice(&chunk.bytes[..chunk.bytes.len().min(2)]);
        }
        bytes += chunk.bytes.len();
        if !moved && bytes > DOWNLOAD / 8 {
            endpoint.rebind(socket(addresses[1])?)?;
            moved = true;
        }
    }
    ensure!(bytes == DOWNLOAD, "{bytes} bytes instead of {DOWNLOAD}");
    Ok(String::from_utf8_lossy(&first).into_owned())
}
