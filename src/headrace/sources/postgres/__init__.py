"""Postgres 14 to 18 as a source, by logical replication."""
