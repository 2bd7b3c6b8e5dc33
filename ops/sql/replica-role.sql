-- The role dr-agent uses on the replica. As a superuser, once per server; repeatable:
--
--   psql -d postgres -v owner=app_owner -f ops/sql/replica-role.sql
--
-- owner: the role that will own the tables; roles are not replicated, so it is created here (without
-- LOGIN; give it what it has on the source before the bad day). Repeat for every further owner.
-- Afterwards set a password: \password dr_agent
\set ON_ERROR_STOP on
-- CREATEDB: the agent creates the replicated databases, and as their owner guards them
-- (ALTER DATABASE … SET default_transaction_read_only) until the promotion.
SELECT 'CREATE ROLE dr_agent LOGIN CREATEDB'
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'dr_agent') \gexec
SELECT format('CREATE ROLE %I', :'owner')
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'owner') \gexec
GRANT :"owner" TO dr_agent;
-- Promotion ends sessions that write to the replica behind our back.
GRANT pg_signal_backend, pg_monitor TO dr_agent;
-- Triggers and foreign keys fired on the source already; applying must not fire them again.
-- PostgreSQL 14 lets only a superuser set this.
SELECT current_setting('server_version_num')::int >= 150000 AS can_grant_set \gset
\if :can_grant_set
    GRANT SET ON PARAMETER session_replication_role TO dr_agent;
\else
    ALTER ROLE dr_agent SUPERUSER;
\endif
