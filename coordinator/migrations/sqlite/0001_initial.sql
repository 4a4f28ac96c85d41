-- The coordinator's memory. The same tables as migrations/postgres; tests hold the two together.
-- Public keys, names, addresses and policy: there is no column for a private key.
-- Times are milliseconds since 1970; prefix, tag and endpoint lists are JSON arrays of text.

CREATE TABLE networks (
    id                BIGINT PRIMARY KEY NOT NULL,
    name              TEXT   NOT NULL UNIQUE,
    v4                TEXT   NOT NULL,
    v6                TEXT   NOT NULL,
    generation        BIGINT NOT NULL,
    policy_generation BIGINT NOT NULL,  -- when users or policy changed last
    next_node         BIGINT NOT NULL,  -- ids are never given twice
    next_host         BIGINT NOT NULL,  -- where the search for a free address starts
    audit_count       BIGINT NOT NULL,
    audit_head        BLOB   NOT NULL
);

CREATE TABLE policies (
    network BIGINT PRIMARY KEY NOT NULL REFERENCES networks (id),
    text    TEXT   NOT NULL             -- as written, with its comments
);

CREATE TABLE users (
    network BIGINT NOT NULL REFERENCES networks (id),
    login   TEXT   NOT NULL,
    created BIGINT NOT NULL,
    PRIMARY KEY (network, login)
);

CREATE TABLE tokens (
    hash      BLOB   PRIMARY KEY NOT NULL,  -- SHA-256 of the secret
    network   BIGINT NOT NULL REFERENCES networks (id),
    owner     TEXT   NOT NULL,              -- JSON: a user or tags
    reusable  BIGINT NOT NULL,
    ephemeral BIGINT NOT NULL,
    created   BIGINT NOT NULL,
    expires   BIGINT NOT NULL,
    uses      BIGINT NOT NULL
);

CREATE TABLE nodes (
    network     BIGINT NOT NULL REFERENCES networks (id),
    id          BIGINT NOT NULL,
    name        TEXT   NOT NULL,
    machine     BLOB   NOT NULL UNIQUE,     -- SHA-256 of the machine key's SubjectPublicKeyInfo
    node_key    BLOB   NOT NULL UNIQUE,     -- WireGuard public key
    host        BIGINT NOT NULL,            -- its address is the prefix plus this number
    owner       TEXT   NOT NULL,
    ephemeral   BIGINT NOT NULL,
    advertised  TEXT   NOT NULL,
    approved    TEXT   NOT NULL,
    endpoints   TEXT   NOT NULL,            -- as the node reported
    listen_port BIGINT NOT NULL,
    seen_addr   TEXT,                       -- where the coordinator saw it
    online_by   TEXT,                       -- the replica that holds its stream
    last_seen   BIGINT NOT NULL,
    created     BIGINT NOT NULL,
    changed     BIGINT NOT NULL,            -- generation of the last change
    PRIMARY KEY (network, id),
    UNIQUE (network, name),
    UNIQUE (network, host)
);
CREATE INDEX nodes_changed ON nodes (network, changed);

CREATE TABLE removals (
    network    BIGINT NOT NULL REFERENCES networks (id),
    node       BIGINT NOT NULL,
    generation BIGINT NOT NULL,
    PRIMARY KEY (network, node)
);
CREATE INDEX removals_generation ON removals (network, generation);

CREATE TABLE audit (
    network  BIGINT NOT NULL REFERENCES networks (id),
    number   BIGINT NOT NULL,
    at       BIGINT NOT NULL,
    actor    TEXT   NOT NULL,
    action   TEXT   NOT NULL,
    subject  TEXT   NOT NULL,
    before   TEXT   NOT NULL,
    after    TEXT   NOT NULL,
    previous BLOB   NOT NULL,
    hash     BLOB   NOT NULL,
    PRIMARY KEY (network, number)
);
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TABLE replicas (
    id          TEXT   PRIMARY KEY NOT NULL,
    alive_until BIGINT NOT NULL
);
