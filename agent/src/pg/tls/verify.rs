//! Whether a server's certificate will do, and what ties a password exchange to it.
//!
//! Chains are verified by webpki. Three habits of PostgreSQL installations that webpki alone refuses
//! are met as libpq meets them: a self-signed server certificate that is its own root, a certificate that
//! names its host only in the subject's common name, and, where nothing is verified, old certificates.
//!
//! # Invariants
//! - The handshake's signature is always verified: whoever answers holds the certificate's key.
//! - The host's name is compared only after the chain was found good.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
    verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, Error, RootCertStore,
    SignatureScheme,
};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use x509_cert::Certificate;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::der::oid::db::{rfc4519, rfc5912};
use x509_cert::der::{Decode as _, Encode as _};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// `sslmode` up to `require`, without root certificates: any certificate will do.
#[derive(Debug)]
pub(super) struct Unverified {
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // By the bare key: `openssl x509 -req`, as PostgreSQL's documentation has it, long made
        // certificates of X.509 version 1, which webpki does not read.
        let parsed = Certificate::from_der(cert).map_err(|_| CertificateError::BadEncoding)?;
        let key = parsed
            .tbs_certificate
            .subject_public_key_info
            .to_der()
            .map_err(|_| CertificateError::BadEncoding)?;
        let key = SubjectPublicKeyInfoDer::from(key);
        verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// `verify-ca`, `verify-full`, and weaker modes where root certificates exist.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) roots: RootCertStore,
    /// The root certificates as they stand in the file.
    pub(super) pinned: Vec<CertificateDer<'static>>,
    /// `verify-full`.
    pub(super) check_name: bool,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl Verified {
    fn verify_chain(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        // The server's own certificate as its root: `openssl req -x509` marks it as an authority's,
        // which webpki takes for no server. That it is this very certificate is all we ask.
        if self.pinned.iter().any(|root| root == end_entity) {
            return check_validity(end_entity, now);
        }
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
    }
}

impl ServerCertVerifier for Verified {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify_chain(end_entity, intermediates, now)?;
        if self.check_name {
            let parsed = ParsedCertificate::try_from(end_entity)?;
            verify_server_name(&parsed, server_name).or_else(|error| match common_name_matches(
                end_entity,
                &server_name.to_str(),
            ) {
                true => Ok(()),
                false => Err(error),
            })?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn check_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let parsed = Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let validity = parsed.tbs_certificate.validity;
    if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

/// libpq's second chance: without any name or address in the certificate's alternative names, the
/// subject's common name is compared. `*.` stands for exactly one label.
fn common_name_matches(certificate: &CertificateDer<'_>, host: &str) -> bool {
    let Ok(parsed) = Certificate::from_der(certificate) else {
        return false;
    };
    let certificate = parsed.tbs_certificate;
    match certificate.get::<SubjectAltName>() {
        Ok(Some((_, names))) => {
            let names_a_host = |name: &GeneralName| {
                matches!(name, GeneralName::DnsName(_) | GeneralName::IpAddress(_))
            };
            if names.0.iter().any(names_a_host) {
                return false;
            }
        }
        Ok(None) => {}
        Err(_) => return false,
    }
    let mut attributes = certificate.subject.0.iter().flat_map(|part| part.0.iter());
    let common_name = attributes
        .find(|attribute| attribute.oid == rfc4519::CN)
        .and_then(|attribute| std::str::from_utf8(attribute.value.value()).ok());
    common_name.is_some_and(|pattern| host_matches(pattern, host))
}

fn host_matches(pattern: &str, host: &str) -> bool {
    if pattern.eq_ignore_ascii_case(host) {
        return !host.is_empty();
    }
    match (pattern.strip_prefix("*."), host.split_once('.')) {
        (Some(domain), Some((label, rest))) => {
            !label.is_empty()
                && domain.contains('.')
                && domain.eq_ignore_ascii_case(rest)
                && host.parse::<std::net::IpAddr>().is_err()
        }
        _ => false,
    }
}

/// The channel binding `tls-server-end-point`: the certificate hashed with the hash of its own
/// signature, MD5 and SHA-1 replaced by SHA-256 (RFC 5929, section 4.1). `None` for signatures with
/// no or another hash (Ed25519, RSA-PSS), for which the RFC defines nothing usable here.
pub(in crate::pg) fn server_end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let parsed = Certificate::from_der(certificate).ok()?;
    hash_with(parsed.signature_algorithm.oid, certificate)
}

fn hash_with(signature: ObjectIdentifier, der: &[u8]) -> Option<Vec<u8>> {
    match signature {
        rfc5912::MD_5_WITH_RSA_ENCRYPTION
        | rfc5912::SHA_1_WITH_RSA_ENCRYPTION
        | ECDSA_WITH_SHA_1
        | rfc5912::SHA_256_WITH_RSA_ENCRYPTION
        | rfc5912::ECDSA_WITH_SHA_256 => Some(Sha256::digest(der).to_vec()),
        rfc5912::SHA_384_WITH_RSA_ENCRYPTION | rfc5912::ECDSA_WITH_SHA_384 => {
            Some(Sha384::digest(der).to_vec())
        }
        rfc5912::SHA_512_WITH_RSA_ENCRYPTION | rfc5912::ECDSA_WITH_SHA_512 => {
            Some(Sha512::digest(der).to_vec())
        }
        _ => None,
    }
}

const ECDSA_WITH_SHA_1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.1");

/// Says what is wrong with a handshake and which setting it belongs to.
pub(super) fn explain(error: &Error) -> String {
    let Error::InvalidCertificate(certificate) = error else {
        return match error {
            Error::AlertReceived(alert) => ended_by_the_server(*alert),
            other => other.to_string(),
        };
    };
    match certificate {
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "the server's certificate is for another host name; sslmode=verify-full compares it \
             with the host of the URL"
                .to_owned()
        }
        CertificateError::UnknownIssuer => {
            "the server's certificate is signed by none of the authorities in sslrootcert"
                .to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "the server's certificate has expired".to_owned()
        }
        other => format!("the server's certificate is refused: {other}"),
    }
}

/// A server of PostgreSQL never ends a handshake for want of a client certificate: that it says afterwards, as SQLSTATE 28000.
fn ended_by_the_server(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::HandshakeFailure
        | AlertDescription::InsufficientSecurity
        | AlertDescription::IllegalParameter => {
            "it shares no way to sign or to encrypt with us: its certificate has a key of a kind that is not understood here \
             (P-521 and RSA-PSS are not; RSA, P-256, P-384 and Ed25519 are), or ssl_ciphers leaves nothing in common"
        }
        AlertDescription::ProtocolVersion => {
            "it speaks no TLS 1.2 or 1.3: see ssl_min_protocol_version and ssl_max_protocol_version there"
        }
        AlertDescription::UnknownCA
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied
        | AlertDescription::DecryptError => {
            "it refuses our client certificate (sslcert): see ssl_ca_file and ssl_crl_file there"
        }
        AlertDescription::CertificateRequired => {
            "it demands a client certificate: sslcert and sslkey in the URL"
        }
        _ => "its log says why",
    };
    format!("the server ended the handshake ({alert:?}): {why}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair,
        PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    };

    #[test]
    fn an_alert_is_explained_by_what_it_says() {
        let cases = [
            (AlertDescription::HandshakeFailure, "P-521"),
            (AlertDescription::ProtocolVersion, "TLS 1.2"),
            (
                AlertDescription::UnknownCA,
                "refuses our client certificate",
            ),
            (
                AlertDescription::CertificateRequired,
                "demands a client certificate",
            ),
            (AlertDescription::InternalError, "its log"),
        ];
        for (alert, words) in cases {
            let text = explain(&Error::AlertReceived(alert));
            assert!(text.contains(words), "{text}");
            assert_eq!(
                text.contains("sslcert"),
                words.contains("client certificate"),
                "{text}"
            );
        }
    }

    fn authority() -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "authority");
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    /// A server's certificate with alternative names and, perhaps, a common name.
    fn certificate(
        authority: &CertifiedIssuer<'static, KeyPair>,
        names: &[&str],
        common_name: Option<&str>,
    ) -> CertificateDer<'static> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(name) = common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        let key = KeyPair::generate().unwrap();
        params.signed_by(&key, authority).unwrap().der().clone()
    }

    fn verified(root: &CertificateDer<'static>, check_name: bool) -> Verified {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        Verified {
            roots,
            pinned: vec![root.clone()],
            check_name,
            algorithms: rustls::crypto::ring::default_provider().signature_verification_algorithms,
        }
    }

    fn accepts(verifier: &Verified, certificate: &CertificateDer<'_>, host: &str) -> bool {
        let name = ServerName::try_from(host).unwrap();
        verifier
            .verify_server_cert(certificate, &[], &name, &[], UnixTime::now())
            .is_ok()
    }

    #[test]
    fn verify_full_compares_the_name_and_verify_ca_does_not() {
        let authority = authority();
        let full = verified(authority.der(), true);
        let chain_only = verified(authority.der(), false);
        let table: [(&[&str], Option<&str>, &str, bool); 8] = [
            (&["db.example"], None, "db.example", true),
            (&["db.example"], None, "other.example", false),
            (&["10.0.0.1"], None, "10.0.0.1", true),
            (&["10.0.0.1"], None, "10.0.0.2", false),
            (&[], Some("db.example"), "DB.example", true),
            (&[], Some("db.example"), "other.example", false),
            // The common name counts only where no alternative name does.
            (&["other.example"], Some("db.example"), "db.example", false),
            (&[], Some("10.0.0.1"), "10.0.0.1", true),
        ];
        for (names, common_name, host, expected) in table {
            let certificate = certificate(&authority, names, common_name);
            assert_eq!(
                accepts(&full, &certificate, host),
                expected,
                "{names:?} {host}"
            );
            assert!(accepts(&chain_only, &certificate, host), "{names:?} {host}");
        }
    }

    #[test]
    fn a_certificate_of_another_authority_is_refused_in_every_verifying_mode() {
        let (ours, theirs) = (authority(), authority());
        let certificate = certificate(&theirs, &["db.example"], None);
        for check_name in [true, false] {
            assert!(!accepts(
                &verified(ours.der(), check_name),
                &certificate,
                "db.example"
            ));
        }
    }

    #[test]
    fn a_self_signed_certificate_can_be_its_own_root() {
        let mut params = CertificateParams::new(vec!["db.example".to_owned()]).unwrap();
        // What `openssl req -x509` makes.
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let own = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let verifier = verified(own.der(), true);
        assert!(accepts(&verifier, own.der(), "db.example"));
        assert!(!accepts(&verifier, own.der(), "other.example"));

        let mut old = CertificateParams::new(vec!["db.example".to_owned()]).unwrap();
        old.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let old = old.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert!(!accepts(
            &verified(old.der(), true),
            old.der(),
            "db.example"
        ));
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        let table = [
            ("*.example.com", "db.example.com", true),
            ("*.example.com", "a.db.example.com", false),
            ("*.example.com", "example.com", false),
            ("*.com", "example.com", false),
            ("*.0.0.1", "10.0.0.1", false),
            ("", "", false),
        ];
        for (pattern, host, expected) in table {
            assert_eq!(host_matches(pattern, host), expected, "{pattern} {host}");
        }
    }

    #[test]
    fn the_channel_is_bound_with_the_hash_of_the_certificates_signature() {
        let end_point = |key: &KeyPair| {
            let params = CertificateParams::new(vec!["h".to_owned()]).unwrap();
            let certificate = params.self_signed(key).unwrap();
            server_end_point(certificate.der()).map(|hash| (hash, certificate.der().to_vec()))
        };
        let (hash, der) = end_point(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(hash, Sha256::digest(der).to_vec());
        let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
        assert_eq!(end_point(&p384).unwrap().0.len(), 48);
        let ed25519 = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        assert!(end_point(&ed25519).is_none());
        assert_eq!(
            hash_with(rfc5912::SHA_1_WITH_RSA_ENCRYPTION, b"")
                .unwrap()
                .len(),
            32
        );
        assert_eq!(
            hash_with(rfc5912::SHA_512_WITH_RSA_ENCRYPTION, b"")
                .unwrap()
                .len(),
            64
        );
    }
}
