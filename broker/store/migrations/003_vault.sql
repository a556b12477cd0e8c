-- Credentials of users, sealed; nothing beside the blob is secret. Bytes 5 to 8 of a blob name its key.

CREATE TABLE vault (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    sequence    INTEGER NOT NULL,
    canary      BLOB NOT NULL
) STRICT;

CREATE TABLE credentials (
    user        TEXT NOT NULL,
    provider    TEXT NOT NULL,
    version     INTEGER NOT NULL,
    kind        TEXT NOT NULL,
    mode        TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    sealed      BLOB NOT NULL,
    expires_at  REAL NOT NULL DEFAULT 0,
    problem     TEXT NOT NULL DEFAULT '',
    failures    INTEGER NOT NULL DEFAULT 0,
    retry_at    REAL NOT NULL DEFAULT 0,
    created_at  REAL NOT NULL,
    updated_at  REAL NOT NULL,
    PRIMARY KEY (user, provider)
) STRICT;
CREATE INDEX credentials_by_key ON credentials (substr(sealed, 5, 4));
