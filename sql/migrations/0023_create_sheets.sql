-- Contact sheets that are asked for and not made yet. One that has been made is a file, whose idempotency key says of what.

create table sheets (
    id uuid constraint sheets_pkey primary key,
    user_id varchar(255) not null constraint sheets_owner references user_storage on delete cascade,
    -- Of the pictures' own digests, their order, and how they are to be laid out: the same is made once.
    digest bytea not null constraint sheets_digest_sha256 check (octet_length(digest) = 32),
    pictures uuid[] not null,
    sheet jsonb not null,
    -- What the file becomes, and who wished for it.
    details jsonb not null,
    actor jsonb,
    -- Why it cannot be made.
    problem jsonb,
    requested_at timestamptz not null default clock_timestamp(),
    constraint sheets_wish unique (user_id, digest)
);

create index sheets_old on sheets (requested_at);
