//! TLS to the server: libpq's `sslmode`, `sslrootcert`, `sslcert` and `sslkey` on rustls.
//!
//! Certificates are read for every new session, so that renewed ones need no restart.
//! [`verify`] decides whether a server's certificate will do.
//!
//! # Invariants
//! - `verify-ca` and `verify-full` never fall back to less: without root certificates they fail.
//! - A file the configuration names must be readable, in every mode. (libpq ignores a missing
//!   `sslrootcert` below `verify-ca`, which turns a typing error into no verification at all.)
//! - A private key that others may read is refused.
//!
//! # What it does not do
//! No certificate revocation lists, no encrypted private keys, nothing below TLS 1.2.

mod verify;

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::PgError;
use super::conninfo::{ConnInfo, Host, SslMode};
use super::socket::Socket;
use super::stream::connect_error;

pub(super) use self::verify::server_end_point;

/// Where distributions keep the certificates of public authorities.
const SYSTEM_ROOTS: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The name of PostgreSQL's protocol in TLS's own negotiation, which `sslnegotiation=direct` needs.
const ALPN: &[u8] = b"postgresql";

/// Everything a handshake needs.
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    direct: bool,
}

impl Tls {
    /// Reads the certificates that `conninfo` names.
    pub(super) fn new(conninfo: &ConnInfo, host: &Host) -> Result<Self, PgError> {
        let home = std::env::home_dir().map(|home| home.join(".postgresql"));
        Self::with_home(conninfo, home.as_deref()).map_err(|reason| tls_error(host, reason))
    }

    fn with_home(conninfo: &ConnInfo, home: Option<&Path>) -> Result<Self, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let roots = root_certificates(conninfo, home)?;
        let verifier: Arc<dyn ServerCertVerifier> = match roots {
            None => Arc::new(verify::Unverified { algorithms }),
            Some((roots, pinned)) => Arc::new(verify::Verified {
                roots,
                pinned,
                check_name: conninfo.ssl_mode == SslMode::VerifyFull,
                algorithms,
            }),
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match client_certificate(conninfo, home)? {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| format!("sslcert and sslkey: {error}"))?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self {
            config: Arc::new(config),
            direct: conninfo.ssl_direct,
        })
    }

    /// TLS from the first byte, without PostgreSQL's own request for it.
    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    pub(super) async fn handshake(
        &self,
        host: &Host,
        tcp: Socket,
    ) -> Result<TlsStream<Socket>, PgError> {
        let name = ServerName::try_from(host.name.clone()).map_err(|_| {
            tls_error(
                host,
                "the host's name cannot be in a certificate".to_owned(),
            )
        })?;
        let stream = TlsConnector::from(Arc::clone(&self.config))
            .connect(name, tcp)
            .await
            .map_err(|error| handshake_error(host, error))?;
        // A server that answers a direct handshake without the protocol's name may be anything.
        if self.direct && stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            let reason = "sslnegotiation=direct: the server does not negotiate `postgresql`";
            return Err(tls_error(host, reason.to_owned()));
        }
        Ok(stream)
    }
}

fn tls_error(host: &Host, reason: String) -> PgError {
    PgError::Tls {
        server: host.to_string(),
        reason,
    }
}

/// A broken connection is worth a retry; a certificate that will not do is not.
fn handshake_error(host: &Host, error: io::Error) -> PgError {
    refusal(host, &error).unwrap_or_else(|| connect_error(host, error))
}

/// The TLS error inside an I/O error. With TLS 1.3 the server judges our certificate after the
/// handshake is over for us, so its refusal arrives with the first answer.
pub(super) fn refusal(host: &Host, error: &io::Error) -> Option<PgError> {
    let cause = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(tls_error(host, verify::explain(cause)))
}

/// Certificates to trust, and the same ones byte by byte.
type Roots = (RootCertStore, Vec<CertificateDer<'static>>);

/// `None` means that any certificate will do.
fn root_certificates(conninfo: &ConnInfo, home: Option<&Path>) -> Result<Option<Roots>, String> {
    let verifies = conninfo.ssl_mode >= SslMode::VerifyCa;
    let path = match conninfo.ssl_root_cert.as_deref() {
        Some(word) if word == Path::new("system") => system_roots()
            .ok_or_else(|| {
                format!(
                    "sslrootcert=system: none of SSL_CERT_FILE, {} exists; install \
                     ca-certificates or name a file",
                    SYSTEM_ROOTS.join(", ")
                )
            })?
            .to_owned(),
        Some(file) => file.to_owned(),
        None => match home.map(|home| home.join("root.crt")) {
            Some(file) if file.exists() => file,
            Some(file) if verifies => {
                return Err(format!(
                    "sslmode={} needs root certificates: {} does not exist; provide it or set \
                     sslrootcert",
                    conninfo.ssl_mode.as_str(),
                    file.display()
                ));
            }
            None if verifies => {
                return Err(
                    "there is no home directory with root certificates; set sslrootcert".to_owned(),
                );
            }
            _ => return Ok(None),
        },
    };
    let certificates = read_certificates("sslrootcert", &path)?;
    let mut roots = RootCertStore::empty();
    // Public collections contain a few certificates that webpki does not understand.
    let (usable, _) = roots.add_parsable_certificates(certificates.iter().cloned());
    if usable == 0 {
        return Err(format!(
            "sslrootcert {}: no usable certificate (X.509 version 3 is needed)",
            path.display()
        ));
    }
    Ok(Some((roots, certificates)))
}

/// The file with the certificates of public authorities.
pub(super) fn system_roots() -> Option<&'static Path> {
    static FOUND: std::sync::OnceLock<Option<PathBuf>> = std::sync::OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
        named
            .into_iter()
            .chain(SYSTEM_ROOTS.iter().map(PathBuf::from))
            .find(|path| path.is_file())
    });
    found.as_deref()
}

fn read_certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let unusable = |what: &dyn std::fmt::Display| format!("{setting} {}: {what}", path.display());
    let pem = fs::read(path).map_err(|error| unusable(&error))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(&error))?;
    if certificates.is_empty() {
        return Err(unusable(&"no PEM certificate in it"));
    }
    Ok(certificates)
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// libpq's defaults, `~/.postgresql/postgresql.crt` and `.key`, count only where they exist.
fn client_certificate(
    conninfo: &ConnInfo,
    home: Option<&Path>,
) -> Result<Option<ClientCertificate>, String> {
    let certificate = match (&conninfo.ssl_cert, home) {
        (Some(file), _) => file.clone(),
        (None, Some(home)) if home.join("postgresql.crt").exists() => home.join("postgresql.crt"),
        (None, _) => return Ok(None),
    };
    let key = match (&conninfo.ssl_key, home) {
        (Some(file), _) => file.clone(),
        (None, Some(home)) => home.join("postgresql.key"),
        (None, None) => return Err("sslcert is set, sslkey is not".to_owned()),
    };
    let chain = read_certificates("sslcert", &certificate)?;
    let unusable = |what: &dyn std::fmt::Display| format!("sslkey {}: {what}", key.display());
    let metadata = fs::metadata(&key).map_err(|error| unusable(&error))?;
    // libpq's rule: ours alone, or root's and readable by a group of ours.
    let open_to = if metadata.uid() == 0 { 0o027 } else { 0o077 };
    if metadata.permissions().mode() & open_to != 0 {
        return Err(unusable(
            &"open to the group or the world; chmod 0600 (0640 if root owns it)",
        ));
    }
    let pem = fs::read(&key).map_err(|error| unusable(&error))?;
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| unusable(&"no unencrypted PEM private key in it"))?;
    Ok(Some((chain, key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conninfo(parameters: &str) -> ConnInfo {
        ConnInfo::parse(&format!("postgres://u@h/d?{parameters}"), None).unwrap()
    }

    fn reason(parameters: &str, home: Option<&Path>) -> Option<String> {
        Tls::with_home(&conninfo(parameters), home).err()
    }

    #[test]
    fn verification_without_root_certificates_fails_and_says_which_file_is_missing() {
        let home = tempfile::tempdir().unwrap();
        let text = reason("sslmode=verify-full", Some(home.path())).unwrap();
        assert!(
            text.contains("sslmode=verify-full") && text.contains("root.crt"),
            "{text}"
        );
        assert!(
            reason("sslmode=verify-ca", None)
                .unwrap()
                .contains("sslrootcert")
        );
        assert_eq!(reason("sslmode=require", Some(home.path())), None);
    }

    #[test]
    fn a_named_file_must_be_usable_in_every_mode() {
        let text = reason("sslmode=require&sslrootcert=/no/such", None).unwrap();
        assert!(text.contains("sslrootcert /no/such"), "{text}");
        let home = tempfile::tempdir().unwrap();
        let empty = home.path().join("empty");
        fs::write(&empty, "").unwrap();
        let text = reason(&format!("sslrootcert={}", empty.display()), None).unwrap();
        assert!(text.contains("no PEM certificate"), "{text}");
    }

    #[test]
    fn a_private_key_that_others_may_read_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let pair = rcgen::generate_simple_self_signed(vec!["client".to_owned()]).unwrap();
        fs::write(home.path().join("postgresql.crt"), pair.cert.pem()).unwrap();
        let key = home.path().join("postgresql.key");
        fs::write(&key, pair.signing_key.serialize_pem()).unwrap();
        for (mode, refused) in [(0o644, true), (0o600, false)] {
            fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
            let text = reason("sslmode=require", Some(home.path()));
            assert_eq!(
                text.is_some_and(|t| t.contains("chmod 0600")),
                refused,
                "{mode:o}"
            );
        }
    }
}
