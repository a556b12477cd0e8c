"""Durable state: SQLite in WAL mode, one writer."""
