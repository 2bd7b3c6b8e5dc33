//! The end-to-end tests, one binary: the real agent against real PostgreSQL servers.
//!
//! Each module's header says its goal and its method. How to run them: `dr_agent_tests`.

#![allow(
    clippy::unwrap_used,
    reason = "these are tests: a panic is how they fail"
)]

mod agent_role;
mod archive;
mod archive_ahead;
mod archive_alone;
mod archive_damage;
mod archive_history;
mod archive_keep;
mod archive_lives;
mod archive_s3;
mod archive_tidy;
mod archive_writers;
mod aws_refusals;
mod backup;
mod bad_input;
mod by_hand;
mod catch_up;
mod check;
mod check_roles;
mod check_start;
mod churn;
mod collations;
mod connection;
mod copy;
mod coverage;
mod databases;
mod ddl;
mod disturbances;
mod failover_archive;
mod failover_slots;
mod fencing;
mod golden;
mod harness;
mod healing;
mod init;
mod kill_campaign;
mod killed_starts;
mod kinesis;
mod lanes;
mod large;
mod late;
mod late_first;
mod late_kills;
mod late_large;
mod late_needs;
mod listed;
mod lost_slot;
mod made_of;
mod misfit;
mod moments;
mod narrowed;
mod observe;
mod oracle;
mod prefix;
mod promote;
mod promote_archive;
mod promote_campaign;
mod promote_contained;
mod promote_kinesis;
mod promote_sequences;
mod refused;
mod refused_start;
mod reload;
mod restore;
mod restore_target;
mod restore_told;
mod route_kinesis;
mod route_kinesis_bytes;
mod route_kinesis_check;
mod route_kinesis_gaps;
mod route_kinesis_oracle;
mod route_kinesis_senders;
mod route_kinesis_shared;
mod routed;
mod schema;
mod set_aside;
mod set_back;
mod settings;
mod shape_heal;
mod slot;
mod standing;
mod status;
mod store;
mod streaming;
mod tls;
mod truncate;
mod types;
mod values;
mod walsender;
mod wan;
