-- The role dr-agent uses on the source: what it needs and nothing more. As a superuser, once per
-- replicated database; repeatable:
--
--   psql -d app -v owner=app_owner -f ops/sql/source-role.sql
--
-- owner: the role that owns the database's tables. PostgreSQL lets only a table's owner publish it
-- or change its replica identity, so dr_agent becomes a member; repeat for every further owner.
-- Afterwards set a password: \password dr_agent
\set ON_ERROR_STOP on
SELECT 'CREATE ROLE dr_agent LOGIN REPLICATION'
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'dr_agent') \gexec
-- The initial copy and pg_dump read every table; pg_monitor shows slots, settings and WAL.
GRANT pg_read_all_data, pg_monitor TO dr_agent;
-- Schema dr_agent (heartbeat, sequence positions) and the publication.
GRANT CREATE ON DATABASE :"DBNAME" TO dr_agent;
GRANT :"owner" TO dr_agent;
