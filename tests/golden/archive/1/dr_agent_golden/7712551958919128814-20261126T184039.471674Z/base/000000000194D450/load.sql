-- Fills the tables of this base backup. Run by psql in the directory that holds it,
-- between pre-data.sql and post-data.sql; zstd must be on the PATH.
\set ON_ERROR_STOP on
SET client_encoding = 'UTF8';
SET DateStyle = 'ISO';
SET IntervalStyle = 'postgres';
SET TimeZone = 'UTC';
SET extra_float_digits = '3';
SET bytea_output = 'hex';
SET lc_monetary = 'C';
SET xmloption = 'content';
SET search_path = 'pg_catalog';
SET row_security = 'off';
SET standard_conforming_strings = 'on';
BEGIN;
\copy "public"."account" ("id", "balance", "note") FROM PROGRAM 'zstd -dcq data/00001.copy.zst'
COMMIT;
BEGIN;
\copy "public"."entry" ("id", "account", "v") FROM PROGRAM 'zstd -dcq data/00004.copy.zst'
COMMIT;
BEGIN;
\copy "public"."bag" ("v") FROM PROGRAM 'zstd -dcq data/00006.copy.zst'
COMMIT;
