-- How nodes are found through relays, and what signs the permits to use them.

ALTER TABLE nodes ADD COLUMN disco BYTEA;  -- public key that probes of its paths are sealed for
ALTER TABLE nodes ADD COLUMN home BIGINT;  -- the region whose relay it is connected to

-- The one key of all coordinators of this database; relays hold its public half. It is no node's,
-- and opens nothing that passes between nodes.
CREATE TABLE permit_signer (
    number  BIGINT PRIMARY KEY NOT NULL CHECK (number = 1),
    seed    BYTEA  NOT NULL,
    created BIGINT NOT NULL
);
