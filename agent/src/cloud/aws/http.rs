//! How every client of AWS connects: TLS by rustls on ring, whom it trusts, and the proxy on the way.
//!
//! As the AWS CLI does: the certificates in the file that `AWS_CA_BUNDLE` names are trusted in place of this machine's own, and
//! `HTTPS_PROXY` with `NO_PROXY` says how to get out. Requests without TLS (instance metadata, a store on this machine) use no proxy.
//!
//! # Invariants
//! - A bundle that cannot be used is said aloud, and nothing more is trusted because of it.

use std::env;
use std::path::{Path, PathBuf};

use aws_sdk_kinesis::config::SharedHttpClient;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{self, TlsContext, TrustStore, rustls_provider::CryptoMode};
use aws_smithy_http_client::{Builder, Connector};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// What the environment says about the way to AWS.
#[derive(Clone, Debug, Default)]
pub(super) struct ProxySettings {
    /// `AWS_CA_BUNDLE`
    bundle: Option<PathBuf>,
    /// `HTTPS_PROXY`
    proxy: Option<String>,
    /// `NO_PROXY`
    direct: Option<String>,
}

impl ProxySettings {
    pub(super) fn of_environment() -> Self {
        let said = |names: [&str; 2]| {
            let mut values = names.into_iter().filter_map(|name| env::var(name).ok());
            values.find(|value| !value.is_empty())
        };
        Self {
            bundle: env::var_os("AWS_CA_BUNDLE")
                .filter(|it| !it.is_empty())
                .map(PathBuf::from),
            proxy: said(["HTTPS_PROXY", "https_proxy"]),
            direct: said(["NO_PROXY", "no_proxy"]),
        }
    }

    /// A client that goes this way.
    pub(super) fn client(&self) -> SharedHttpClient {
        let context = TlsContext::builder()
            .with_trust_store(self.trusted())
            .build();
        let context = context.expect("certificates that were looked at can be used");
        let proxy = self.proxy();
        Builder::new().build_with_connector_fn(move |settings, components| {
            let mut connector = Connector::builder()
                .tls_provider(tls::Provider::Rustls(CryptoMode::Ring))
                .tls_context(context.clone())
                .proxy_config(proxy.clone());
            connector.set_connector_settings(settings.cloned());
            connector.set_sleep_impl(components.and_then(|components| components.sleep_impl()));
            connector.build()
        })
    }

    fn trusted(&self) -> TrustStore {
        let Some(path) = &self.bundle else {
            return TrustStore::default();
        };
        match certificates(path) {
            Ok(pem) => TrustStore::empty().with_pem_certificate(pem),
            Err(reason) => {
                tracing::error!(
                    path = %path.display(), reason,
                    "AWS_CA_BUNDLE cannot be used: only this machine's own authorities are trusted"
                );
                TrustStore::default()
            }
        }
    }

    fn proxy(&self) -> ProxyConfig {
        let Some(url) = &self.proxy else {
            return ProxyConfig::disabled();
        };
        // The URL may hold a password, so it is not said.
        match ProxyConfig::https(url.as_str()) {
            Ok(proxy) => match &self.direct {
                Some(direct) => proxy.no_proxy(direct),
                None => proxy,
            },
            Err(_) => {
                tracing::error!("HTTPS_PROXY is no URL of a proxy: it is not used");
                ProxyConfig::disabled()
            }
        }
    }
}

/// A file of certificates, of which every one can be used: the client would panic.
fn certificates(path: &Path) -> Result<Vec<u8>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    match roots.is_empty() {
        true => Err("it holds no certificate".to_owned()),
        false => Ok(pem),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aws_sdk_s3::Client;
    use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::cloud::aws::{Refusal, refusal};

    /// An endpoint under a certificate of its own that answers everything with "slow down"; its port and that certificate.
    async fn endpoint() -> (u16, String) {
        let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let pem = pair.cert.pem();
        let key = rustls::pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![pair.cert.der().clone()], key.unwrap())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if let Ok(mut client) = acceptor.accept(client).await {
                    let _ = client.read(&mut [0; 8192]).await;
                    let answer =
                        "HTTP/1.1 429 Planned\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                    let _ = client.write_all(answer.as_bytes()).await;
                    let _ = client.shutdown().await;
                }
            }
        });
        (port, pem)
    }

    async fn asked(way: &ProxySettings, port: u16) -> Refusal {
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .http_client(way.client())
            .endpoint_url(format!("https://localhost:{port}"))
            .region(Region::from_static("eu-central-1"))
            .credentials_provider(Credentials::new("a", "b", None, None, "test"))
            .retry_config(aws_sdk_s3::config::retry::RetryConfig::disabled())
            .force_path_style(true)
            .build();
        let error = Client::from_conf(config).list_buckets().send().await;
        refusal(&error.unwrap_err())
    }

    #[tokio::test]
    async fn who_issued_a_certificate_is_said_by_the_bundle_and_nothing_is_said_about_dns() {
        let (port, pem) = endpoint().await;
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("bundle.pem");
        let way = |bundle: Option<&Path>| ProxySettings {
            bundle: bundle.map(Path::to_owned),
            ..ProxySettings::default()
        };
        let unknown = asked(&way(None), port).await;
        assert_eq!(unknown, Refusal::Certificate);
        assert!(unknown.hint().contains("AWS_CA_BUNDLE"));
        std::fs::write(&path, &pem).unwrap();
        assert_eq!(asked(&way(Some(&path)), port).await, Refusal::Throttled);
        // One that cannot be used lets nobody in, and is no panic.
        for broken in [
            "",
            "no certificate",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            std::fs::write(&path, broken).unwrap();
            assert_eq!(asked(&way(Some(&path)), port).await, Refusal::Certificate);
        }
        let nowhere = home.path().join("nowhere");
        assert_eq!(
            asked(&way(Some(&nowhere)), port).await,
            Refusal::Certificate
        );
    }

    #[tokio::test]
    async fn requests_go_through_the_proxy_unless_it_is_said_otherwise() {
        let (port, pem) = endpoint().await;
        let home = tempfile::tempdir().unwrap();
        let bundle = home.path().join("bundle.pem");
        std::fs::write(&bundle, &pem).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy_port = listener.local_addr().unwrap().port();
        let asking = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut asked = [0; 1024];
            let length = client.read(&mut asked).await.unwrap();
            let _ = client
                .write_all(b"HTTP/1.1 407 Planned\r\nContent-Length: 0\r\n\r\n")
                .await;
            String::from_utf8_lossy(&asked[..length]).into_owned()
        });
        let mut way = ProxySettings {
            bundle: Some(bundle),
            proxy: Some(format!("http://127.0.0.1:{proxy_port}")),
            direct: None,
        };
        assert_eq!(asked(&way, port).await, Refusal::Unavailable);
        let asked_for = asking.await.unwrap();
        assert!(
            asked_for.starts_with(&format!("CONNECT localhost:{port} ")),
            "{asked_for}"
        );
        way.direct = Some("localhost".to_owned());
        assert_eq!(asked(&way, port).await, Refusal::Throttled);
        way.direct = None;
        way.proxy = Some("no url".to_owned());
        assert_eq!(asked(&way, port).await, Refusal::Throttled);
    }
}
