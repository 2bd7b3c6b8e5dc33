//! Goal: `sslmode` and its companions keep what they promise, and refuse whom they must.
//! Method: a server with a certificate of a throw-away authority; roles that only TLS, only a plain
//! connection or only a client certificate lets in; a second authority as the stranger.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use dr_agent::error::{Class, Classify as _, chain};
use dr_agent::pg::replication::ReplicationConnection;
use dr_agent::pg::{ConnInfo, PgError, Session, connect};
use dr_agent_tests::server::{PgServer, ServerOptions};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SignatureAlgorithm,
};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str, algorithm: &'static SignatureAlgorithm) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate_for(algorithm).unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// A certificate and its key, PEM.
    fn issue(&self, common_name: &str, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

/// A server named `db.example` with TLS, and the files of its clients.
struct Encrypted {
    server: PgServer,
    directory: tempfile::TempDir,
}

impl Encrypted {
    async fn start(algorithm: &'static SignatureAlgorithm) -> Self {
        let authority = Authority::new("ours", algorithm);
        let stranger = Authority::new("stranger", algorithm);
        let (certificate, key) = authority.issue("db.example", &["db.example", "127.0.0.1"]);
        let server = ServerOptions::source()
            .set("ssl", "on")
            .set("ssl_ca_file", "root.crt")
            .file("root.crt", authority.0.pem())
            .file("server.crt", certificate)
            .file("server.key", key)
            .hba("hostssl all certified 127.0.0.1/32 cert")
            .hba("hostssl all scram 127.0.0.1/32 scram-sha-256")
            .hba("hostssl all onlytls 127.0.0.1/32 trust")
            .hba("host all onlytls 127.0.0.1/32 reject")
            .hba("hostnossl all onlyplain 127.0.0.1/32 trust")
            .hba("host all onlyplain 127.0.0.1/32 reject")
            .hba("host all md5 127.0.0.1/32 md5")
            .start()
            .await;
        server
            .run(
                "postgres",
                "CREATE ROLE certified LOGIN REPLICATION; CREATE ROLE onlytls LOGIN REPLICATION;
                 CREATE ROLE onlyplain LOGIN REPLICATION;
                 CREATE ROLE scram LOGIN REPLICATION PASSWORD 'pw';
                 SET password_encryption = 'md5'; CREATE ROLE md5 LOGIN REPLICATION PASSWORD 'pw'",
            )
            .await;
        let encrypted = Self {
            server,
            directory: tempfile::tempdir().unwrap(),
        };
        encrypted.file("root.crt", &authority.0.pem());
        encrypted.file("stranger.crt", &stranger.0.pem());
        for (name, issuer, role) in [
            ("client", &authority, "certified"),
            ("other-role", &authority, "somebody"),
            ("forged", &stranger, "certified"),
        ] {
            let (certificate, key) = issuer.issue(role, &[]);
            encrypted.file(&format!("{name}.crt"), &certificate);
            encrypted.file(&format!("{name}.key"), &key);
        }
        encrypted
    }

    fn file(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `host` goes by name; the address is always that of the server.
    fn conninfo(&self, user: &str, host: &str, parameters: &str) -> ConnInfo {
        let port = self.server.port();
        let parameters = parameters.replace("DIR", &self.directory.path().display().to_string());
        let url =
            format!("postgres://{user}:pw@{host}:{port}/postgres?hostaddr=127.0.0.1&{parameters}");
        ConnInfo::parse(&url, None).unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    /// Opens both kinds of session; returns whether they are encrypted.
    async fn encrypted(&self, conninfo: &ConnInfo) -> Result<bool, PgError> {
        let session = Session::new("x");
        let sql = "SELECT ssl::text FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let ordinary = match connect(conninfo, &session).await {
            Ok(client) => Ok(client.query_one(sql, &[]).await?.get::<_, String>(0)),
            Err(error) => Err(error),
        };
        let walsender = match ReplicationConnection::connect(conninfo, &session).await {
            Ok(mut walsender) => Ok(walsender.simple_query(sql).await?[0][0].clone().unwrap()),
            Err(error) => Err(error),
        };
        match (ordinary, walsender) {
            (Ok(one), Ok(other)) => {
                assert_eq!(one, other);
                Ok(one == "true")
            }
            (Err(one), Err(other)) => {
                assert_eq!(
                    chain(&one),
                    chain(&other),
                    "the two kinds of session disagree"
                );
                Err(one)
            }
            (one, other) => panic!("the two kinds of session disagree: {one:?} {other:?}"),
        }
    }

    async fn accepts(&self, user: &str, host: &str, parameters: &str) -> bool {
        let conninfo = self.conninfo(user, host, parameters);
        self.encrypted(&conninfo)
            .await
            .unwrap_or_else(|error| panic!("{user}@{host}?{parameters}: {}", chain(&error)))
    }

    async fn refuses(&self, user: &str, host: &str, parameters: &str) -> PgError {
        let conninfo = self.conninfo(user, host, parameters);
        match self.encrypted(&conninfo).await {
            Ok(_) => panic!("{user}@{host}?{parameters} was let in"),
            Err(error) => error,
        }
    }
}

fn expect_tls_error(error: &PgError, text: &str) {
    assert!(matches!(error, PgError::Tls { .. }), "{error:?}");
    assert!(error.to_string().contains(text), "{error}");
    assert_eq!(error.class(), Class::Definite);
}

#[tokio::test]
async fn verification_accepts_the_right_server_and_refuses_the_wrong_one() {
    let server = Encrypted::start(&PKCS_ECDSA_P256_SHA256).await;
    let ours = "sslrootcert=DIR/root.crt";
    let strangers = "sslrootcert=DIR/stranger.crt";
    for mode in ["require", "verify-ca", "verify-full"] {
        let parameters = format!("sslmode={mode}&{ours}");
        assert!(
            server.accepts("onlytls", "db.example", &parameters).await,
            "{mode}"
        );
        // libpq's rule: with root certificates at hand `require` verifies the chain, too.
        let error = server
            .refuses(
                "onlytls",
                "db.example",
                &format!("sslmode={mode}&{strangers}"),
            )
            .await;
        expect_tls_error(&error, "none of the authorities in sslrootcert");
    }
    assert!(
        server
            .accepts(
                "onlytls",
                "127.0.0.1",
                &format!("sslmode=verify-full&{ours}")
            )
            .await
    );
    assert!(
        server
            .accepts(
                "onlytls",
                "other.example",
                &format!("sslmode=verify-ca&{ours}")
            )
            .await
    );
    let error = server
        .refuses(
            "onlytls",
            "other.example",
            &format!("sslmode=verify-full&{ours}"),
        )
        .await;
    expect_tls_error(&error, "another host name");
}

#[tokio::test]
async fn weak_modes_take_what_the_server_allows_and_strong_ones_insist() {
    let server = Encrypted::start(&PKCS_ECDSA_P256_SHA256).await;
    let table = [
        ("onlytls", "disable", None),
        ("onlytls", "allow", Some(true)),
        ("onlytls", "prefer", Some(true)),
        ("onlytls", "require", Some(true)),
        ("onlyplain", "disable", Some(false)),
        ("onlyplain", "allow", Some(false)),
        ("onlyplain", "prefer", Some(false)),
        ("onlyplain", "require", None),
    ];
    for (user, mode, expected) in table {
        let parameters = format!("sslmode={mode}");
        match expected {
            Some(encrypted) => {
                let found = server.accepts(user, "db.example", &parameters).await;
                assert_eq!(found, encrypted, "{user} {mode}");
            }
            None => {
                let error = server.refuses(user, "db.example", &parameters).await;
                assert_eq!(error.sqlstate(), Some("28000"), "{user} {mode}: {error}");
            }
        }
    }

    let plain = ServerOptions::source().start().await;
    let url = |mode: &str| {
        ConnInfo::parse(&format!("{}?sslmode={mode}", plain.url("postgres")), None).unwrap()
    };
    for mode in ["disable", "allow", "prefer"] {
        assert!(!server.encrypted(&url(mode)).await.unwrap(), "{mode}");
    }
    let error = server.encrypted(&url("require")).await.unwrap_err();
    expect_tls_error(&error, "offers no TLS");
}

#[tokio::test]
async fn a_client_certificate_lets_in_the_role_it_names() {
    let server = Encrypted::start(&PKCS_ECDSA_P256_SHA256).await;
    let with = |name: &str| {
        format!(
            "sslmode=verify-full&sslrootcert=DIR/root.crt&sslcert=DIR/{name}.crt&sslkey=DIR/{name}.key"
        )
    };
    assert!(
        server
            .accepts("certified", "db.example", &with("client"))
            .await
    );

    let error = server
        .refuses("certified", "db.example", &with("other-role"))
        .await;
    assert_eq!(error.sqlstate(), Some("28000"), "{error}");
    let none = "sslmode=verify-full&sslrootcert=DIR/root.crt";
    let error = server.refuses("certified", "db.example", none).await;
    assert_eq!(error.sqlstate(), Some("28000"), "{error}");
    let error = server
        .refuses("certified", "db.example", &with("forged"))
        .await;
    expect_tls_error(&error, "the server ended the handshake");
}

#[tokio::test]
async fn channel_binding_is_used_where_it_is_required() {
    for algorithm in [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384] {
        let server = Encrypted::start(algorithm).await;
        for binding in ["disable", "prefer", "require"] {
            let parameters = format!("sslmode=require&channel_binding={binding}");
            assert!(
                server.accepts("scram", "db.example", &parameters).await,
                "{binding}"
            );
        }
        let required = "sslmode=require&channel_binding=require";
        for user in ["md5", "onlytls"] {
            let error = server.refuses(user, "db.example", required).await;
            expect_tls_error(&error, "channel_binding=require");
        }
        let plain = "sslmode=disable&channel_binding=require";
        let error = server.refuses("md5", "db.example", plain).await;
        expect_tls_error(&error, "not encrypted");
    }
}

#[tokio::test]
async fn pg_dump_gets_in_with_the_environment_we_give_it() {
    let server = Encrypted::start(&PKCS_ECDSA_P256_SHA256).await;
    let info = server.conninfo(
        "scram",
        "db.example",
        "sslmode=verify-full&sslrootcert=DIR/root.crt&channel_binding=require",
    );
    let output = tokio::process::Command::new(server.server.program("pg_dump"))
        .arg("--schema-only")
        .envs(info.libpq_environment())
        .output()
        .await
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("PostgreSQL database dump complete"));
}

#[tokio::test]
async fn a_large_stream_passes_through_tls_unharmed() {
    let server = Encrypted::start(&PKCS_ECDSA_P256_SHA256).await;
    let info = server.conninfo("scram", "db.example", "sslmode=require");
    let mut walsender = ReplicationConnection::connect(&info, &Session::new("x"))
        .await
        .unwrap();
    let rows = walsender
        .simple_query("SELECT repeat(chr(64 + i % 26), i * 997) FROM generate_series(1, 300) i")
        .await
        .unwrap();
    assert_eq!(rows.len(), 300);
    for (index, row) in rows.iter().enumerate() {
        let text = row[0].as_deref().unwrap();
        let letter = char::from(64 + u8::try_from((index + 1) % 26).unwrap());
        assert_eq!(text.len(), (index + 1) * 997);
        assert!(text.chars().all(|c| c == letter), "row {index}");
    }
}

#[tokio::test]
async fn a_certificate_file_that_is_missing_is_named() {
    let server = Encrypted::start(&PKCS_ECDSA_P256_SHA256).await;
    let parameters = "sslmode=require&sslcert=DIR/client.crt&sslkey=DIR/no-such.key";
    let error = server.refuses("certified", "db.example", parameters).await;
    let path = server.path("no-such.key");
    expect_tls_error(&error, &format!("sslkey {}", path.display()));
    // Also where a session without TLS would have been possible.
    let parameters = "sslmode=prefer&sslrootcert=DIR/no-such.crt";
    let error = server.refuses("onlyplain", "db.example", parameters).await;
    expect_tls_error(&error, "no-such.crt");
}
