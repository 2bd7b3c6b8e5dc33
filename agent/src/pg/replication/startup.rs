//! Start-up packet and authentication of a walsender session.
//!
//! Clear text, MD5 and SCRAM-SHA-256, the last with channel binding where the stream is TLS and the
//! server offers it. PostgreSQL documentation, "Message Flow", "Start-up" and "SASL Authentication".
//!
//! # Invariants
//! - With `channel_binding=require` nothing but SCRAM-SHA-256-PLUS gets an answer.
//! - The server proves that it knows the password, too: SCRAM's last message is verified.

use bytes::BytesMut;
use fallible_iterator::FallibleIterator as _;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::AsyncWriteExt as _;

use super::ReplicationConnection;
use super::frames::{Frame, WalFrames};
use crate::pg::connect::{no_channel_binding, options_dropped, password_missing};
use crate::pg::conninfo::{ChannelBinding, ConnInfo, Host};
use crate::pg::stream::PgStream;
use crate::pg::{PgError, Session, settings};

/// What the start-up needs to know.
pub(super) struct Startup<'a> {
    pub(super) conninfo: &'a ConnInfo,
    pub(super) session: &'a Session,
    pub(super) host: &'a Host,
    pub(super) password: Option<&'a str>,
}

/// A stream on which messages are exchanged one by one.
struct Dialogue {
    stream: PgStream,
    frames: WalFrames,
}

impl Dialogue {
    async fn send(
        &mut self,
        build: impl FnOnce(&mut BytesMut) -> std::io::Result<()>,
    ) -> Result<(), PgError> {
        let mut out = BytesMut::new();
        build(&mut out).map_err(|error| PgError::Protocol(format!("start-up: {error}")))?;
        self.stream.write_all(&out).await.map_err(PgError::Io)?;
        self.stream.flush().await.map_err(PgError::Io)
    }

    async fn receive(&mut self) -> Result<Frame, PgError> {
        match self.frames.next(&mut self.stream).await? {
            Some(Frame::Error(error)) => Err(PgError::Server(error)),
            Some(frame) => Ok(frame),
            None => Err(PgError::Closed),
        }
    }

    async fn receive_authentication(&mut self) -> Result<Message, PgError> {
        match self.receive().await? {
            Frame::Authentication(message) => Ok(message),
            other => Err(other.unexpected("authentication")),
        }
    }
}

impl Startup<'_> {
    pub(super) async fn run(&self, stream: PgStream) -> Result<ReplicationConnection, PgError> {
        let mut dialogue = Dialogue {
            stream,
            frames: WalFrames::new(),
        };
        let options = self.session.options(self.conninfo);
        let parameters = vec![
            ("user", self.conninfo.user.as_str()),
            ("database", self.conninfo.dbname.as_str()),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", self.session.application_name.as_str()),
            ("options", options.as_str()),
        ];
        dialogue
            .send(|out| frontend::startup_message(parameters, out))
            .await?;
        self.authenticate(&mut dialogue).await?;

        let mut server_version = None;
        loop {
            match dialogue.receive().await? {
                Frame::ParameterStatus { name, value } if name == "server_version" => {
                    server_version = settings::version_number(&value);
                }
                Frame::ParameterStatus { name, value } if name == "DateStyle" => {
                    if !settings::were_taken(Some(&value)) {
                        return Err(options_dropped(self.host));
                    }
                }
                Frame::ParameterStatus { .. } | Frame::Done => {}
                Frame::Ready => break,
                other => return Err(other.unexpected("start-up")),
            }
        }
        let mut connection = ReplicationConnection {
            stream: dialogue.stream,
            frames: dialogue.frames,
            server_version: server_version.ok_or_else(|| {
                PgError::Protocol("the server does not tell its version".to_owned())
            })?,
            unanswered: false,
        };
        if let Some(sql) = settings::later(connection.server_version) {
            connection.send_query(sql).await?;
            connection.unanswered = true;
        }
        Ok(connection)
    }

    async fn authenticate(&self, dialogue: &mut Dialogue) -> Result<(), PgError> {
        match dialogue.receive_authentication().await? {
            Message::AuthenticationOk => return self.without_channel_binding(),
            Message::AuthenticationCleartextPassword => {
                self.without_channel_binding()?;
                let password = self.password()?;
                dialogue
                    .send(|out| frontend::password_message(password, out))
                    .await?;
            }
            Message::AuthenticationMd5Password(body) => {
                self.without_channel_binding()?;
                let user = self.conninfo.user.as_bytes();
                let hash = md5_hash(user, self.password()?, body.salt());
                dialogue
                    .send(|out| frontend::password_message(hash.as_bytes(), out))
                    .await?;
            }
            Message::AuthenticationSasl(body) => self.scram(dialogue, &body).await?,
            _ => {
                return Err(PgError::Password {
                    user: self.conninfo.user.clone(),
                    server: self.host.to_string(),
                    reason: "the server asks for GSSAPI, SSPI or Kerberos, which we do not speak; \
                             use scram-sha-256 or cert in pg_hba.conf"
                        .to_owned(),
                });
            }
        }
        match dialogue.receive_authentication().await? {
            Message::AuthenticationOk => Ok(()),
            _ => Err(PgError::Protocol(
                "a second authentication request".to_owned(),
            )),
        }
    }

    /// The client's half of RFC 5802 and RFC 7677.
    async fn scram(
        &self,
        dialogue: &mut Dialogue,
        body: &AuthenticationSaslBody,
    ) -> Result<(), PgError> {
        let (mut plain, mut plus) = (false, false);
        let mut mechanisms = body.mechanisms();
        while let Some(mechanism) = mechanisms.next().map_err(refused)? {
            plain |= mechanism == sasl::SCRAM_SHA_256;
            plus |= mechanism == sasl::SCRAM_SHA_256_PLUS;
        }
        let end_point = match self.conninfo.channel_binding {
            ChannelBinding::Disable => None,
            ChannelBinding::Prefer | ChannelBinding::Require => dialogue.stream.channel_binding(),
        };
        let (mechanism, binding) = match end_point {
            Some(end_point) if plus => (
                sasl::SCRAM_SHA_256_PLUS,
                sasl::ChannelBinding::tls_server_end_point(end_point),
            ),
            // "I could, you say you cannot": lets the server notice somebody between us who
            // took its offer away.
            Some(_) if plain => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            None if plain => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
            Some(_) | None => {
                return Err(PgError::Protocol(
                    "the server offers no SASL mechanism that we speak".to_owned(),
                ));
            }
        };
        if mechanism != sasl::SCRAM_SHA_256_PLUS {
            self.without_channel_binding()?;
        }

        let mut scram = sasl::ScramSha256::new(self.password()?, binding);
        dialogue
            .send(|out| frontend::sasl_initial_response(mechanism, scram.message(), out))
            .await?;
        match dialogue.receive_authentication().await? {
            Message::AuthenticationSaslContinue(body) => {
                scram.update(body.data()).map_err(refused)?;
            }
            _ => return Err(PgError::Protocol("SCRAM is not continued".to_owned())),
        }
        dialogue
            .send(|out| frontend::sasl_response(scram.message(), out))
            .await?;
        match dialogue.receive_authentication().await? {
            Message::AuthenticationSaslFinal(body) => scram.finish(body.data()).map_err(refused),
            _ => Err(PgError::Protocol("SCRAM is not finished".to_owned())),
        }
    }

    fn password(&self) -> Result<&[u8], PgError> {
        self.password
            .map(str::as_bytes)
            .ok_or_else(|| password_missing(self.conninfo, self.host))
    }

    fn without_channel_binding(&self) -> Result<(), PgError> {
        match self.conninfo.channel_binding {
            ChannelBinding::Require => Err(no_channel_binding(self.host)),
            ChannelBinding::Disable | ChannelBinding::Prefer => Ok(()),
        }
    }
}

fn refused(error: std::io::Error) -> PgError {
    PgError::Protocol(format!("SCRAM: {error}"))
}
