#!/usr/bin/env python3
"""Feeds the pgoutput decoder with changed messages of real servers, and says when it does what it must not.

    fuzz_decoder.py record FOLDER           write the seeds: what Postgres 16 and 18 sent for a workload
    fuzz_decoder.py replay FOLDER           run every file of a corpus once
    fuzz_decoder.py fuzz FOLDER [OPTION]    fuzz; libFuzzer's options, such as -max_total_time=600

An input is two bytes (rows to a batch, messages between two calls of `take`), then messages, each behind its
length in four bytes; its number is its LSN. Allowed is: a message that is put aside, MalformedMessage, from
then on for every push, and whole Arrow arrays from every take. Not allowed is any other exception, a crash, a
hang, a wrong count.

`fuzz` needs atheris. It sees into native code only if the decoder was built for it; with clang:

    CC="clang -O1 -fsanitize=fuzzer-no-link,address" LDSHARED="gcc -shared" cythonize -i -3 …/pgoutput.pyx
    LD_PRELOAD=…/asan_with_fuzzer.so ASAN_OPTIONS=detect_leaks=0 fuzz_decoder.py fuzz …
"""

from __future__ import annotations

import logging
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from headrace.change import TableId
from headrace.errors import MalformedMessage
from headrace.sources.postgres.events import Malformed, Rows
from headrace.sources.postgres.pgoutput import Decoder
from headrace.sources.postgres.undecodable import Undecodable

LENGTH = struct.Struct(">I")
DATA = struct.Struct(">cqqq")
HEAD = 2
LONGEST = 1 << 16


def messages_of(data: bytes) -> list[bytes]:
    """Cut an input into its messages; a length past the end means all that is left."""
    found, at = [], HEAD
    while at + LENGTH.size <= len(data):
        (size,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        found.append(data[at : at + size])
        at += size
    return found


def joined(head: bytes, messages: list[bytes]) -> bytes:
    """Make an input of messages."""
    return head + b"".join(LENGTH.pack(len(message)) + message for message in messages)


def run(data: bytes) -> None:
    """Decode an input; raises whatever the decoder may not do."""
    head = data[:HEAD].ljust(HEAD, b"\0")
    decoder = Decoder(max_batch_rows=head[0] + 1, max_batch_bytes=1 << (head[0] % 16 + 4))
    failed = False
    rows = 0
    for n, message in enumerate(messages_of(data)):
        before = decoder.pending_rows
        try:
            if head[0] % 2:
                decoder.push_data(DATA.pack(b"w", n, n, 0) + message)
            else:
                decoder.push(message, n)
        except MalformedMessage:
            failed = True
            assert decoder.pending_rows == before, "a message that failed was kept"
        else:
            assert not failed, "a decoder that failed went on"
            rows += decoder.pending_rows - before
        if head[1] and n % head[1] == 0:
            rows -= taken(decoder)
    rows -= taken(decoder)
    assert rows == 0, f"{rows} rows were lost or doubled"


def taken(decoder: Decoder) -> int:
    """Take all there is, look at every byte of it, and count the rows."""
    pending = decoder.pending_rows
    transactions, events = decoder.take()
    assert decoder.pending_rows == decoder.pending_bytes == 0, "take left something behind"
    serials = [transaction.serial for transaction in transactions]
    assert serials == sorted(set(serials)), "transactions out of order"
    rows = 0
    for event in events:
        if isinstance(event, Malformed):
            event.batch.validate(full=True)
            assert all(row["why"] for row in event.batch.to_pylist()), "put aside without a reason"
        if isinstance(event, Rows):
            batch = Undecodable().escape(TableId("", ""), event.batch)
            batch.validate(full=True)
            batch.to_pylist()
            assert batch.num_rows > 0, "an empty batch"
            lsns = batch.column(3).to_pylist()
            assert lsns == sorted(set(lsns)), "LSNs that are not those of the messages"
            rows += batch.num_rows
    assert rows == pending, "pending_rows is not what take gives"
    return rows


# -- mutations that know what a message is -------------------------------------------------------------


class Mutator:
    """Changes inputs message by message, so that lengths stay right and most of a session makes sense."""

    def __init__(self, seeds: list[bytes]) -> None:
        self.known = [message for seed in seeds for message in messages_of(seed)] or [b"B"]

    def mutate(self, data: bytes, limit: int, seed: int) -> bytes:
        """See libFuzzer's LLVMFuzzerCustomMutator."""
        chance = random.Random(seed)
        head = bytearray(data[:HEAD].ljust(HEAD, b"\0"))
        messages = messages_of(data) or [chance.choice(self.known)]
        for _ in range(chance.randint(1, 3)):
            self._once(chance, messages, head)
        while len(made := joined(bytes(head), messages)) > limit and len(messages) > 1:
            messages.pop(chance.randrange(len(messages)))
        return made[:limit]

    def _once(self, chance: random.Random, messages: list[bytes], head: bytearray) -> None:
        at = chance.randrange(len(messages))
        match chance.randrange(9):
            case 0:
                messages.insert(at, chance.choice(self.known))
            case 1:
                messages[at] = chance.choice(self.known)
            case 2 if len(messages) > 1:
                messages.pop(at)
            case 3:
                other = chance.randrange(len(messages))
                messages[at], messages[other] = messages[other], messages[at]
            case 4:
                head[chance.randrange(HEAD)] = chance.randrange(256)
            case 5:
                messages[at] = messages[at][: chance.randrange(len(messages[at]) + 1)]
            case 6:
                messages[at] = self._number(chance, messages[at])
            case _:
                messages[at] = self._bytes(chance, messages[at])

    def _number(self, chance: random.Random, message: bytes) -> bytes:
        """Put a number on which arithmetic may trip where one of two or four bytes may stand."""
        size = chance.choice((2, 4))
        if len(message) < size + 1:
            return message
        at = chance.randrange(1, len(message) - size + 1)
        edges = (
            0,
            1,
            -1,
            2 ** (8 * size - 1) - 1,
            -(2 ** (8 * size - 1)),
            len(message),
            len(message) - at - size,
        )
        value = chance.choice(edges) % (1 << 8 * size)
        return message[:at] + value.to_bytes(size, "big") + message[at + size :]

    def _bytes(self, chance: random.Random, message: bytes) -> bytes:
        """Replace, insert or remove a few bytes."""
        at = chance.randrange(len(message) + 1)
        new = bytes(chance.choice(b"\0\1\xffnutKONBCIUDTRSEcA") for _ in range(chance.randrange(4)))
        return message[:at] + new + message[at + chance.randrange(4) :]


# -- seeds ---------------------------------------------------------------------------------------------

WORKLOAD = """
CREATE TABLE one (id int PRIMARY KEY, v text, n numeric(12,2), "größe" text[], b bytea);
CREATE TABLE two (a text, b int, v text, PRIMARY KEY (b, a)); ALTER TABLE two REPLICA IDENTITY FULL;
CREATE TYPE mood AS ENUM ('sad'); CREATE TABLE three (id int PRIMARY KEY, m mood);
ALTER TABLE one ALTER v SET STORAGE EXTERNAL;
CREATE PUBLICATION p FOR ALL TABLES;
SELECT pg_create_logical_replication_slot('s', 'pgoutput');
INSERT INTO one VALUES (1, repeat('x', 3000), 1.5, '{a,NULL}', '\\x00ff'), (2, '', NULL, NULL, NULL);
UPDATE one SET n = 2; UPDATE one SET id = 5 WHERE id = 1; DELETE FROM one WHERE id = 2;
BEGIN; INSERT INTO two VALUES ('🚰', 1, 'v'); UPDATE two SET v = NULL; SAVEPOINT s;
INSERT INTO two SELECT 'n', n, 'v' FROM generate_series(2, 900) n; ROLLBACK TO s;
DELETE FROM two; INSERT INTO three VALUES (1, 'sad'); COMMIT;
TRUNCATE one, two RESTART IDENTITY CASCADE;
SELECT pg_logical_emit_message(true, 'app', 'a'), pg_logical_emit_message(false, '', '\\x00'::bytea);
BEGIN; INSERT INTO one SELECT n, 'r' FROM generate_series(1, 600) n; SAVEPOINT a; DELETE FROM one;
ROLLBACK TO a; ALTER TABLE one ADD COLUMN more text; UPDATE one SET more = 'm' WHERE id < 4; COMMIT;
ALTER TABLE one RENAME TO renamed; INSERT INTO renamed (id) VALUES (-1);
"""
LIMITS = {1: "'messages', 'true'", 2: "'streaming', 'on'", 4: "'streaming', 'parallel'"}


def record(folder: Path) -> None:
    """Write what two servers send for the workload, in three versions of the protocol."""
    import tempfile

    import psycopg

    from headrace.testing.postgres import PostgresServer

    folder.mkdir(parents=True, exist_ok=True)
    for version in (16, 18):
        with tempfile.TemporaryDirectory() as place:
            settings = {"logical_decoding_work_mem": "64kB"}
            with PostgresServer(Path(place) / "pg", version, settings) as server:
                server.psql(WORKLOAD)
                with psycopg.connect(server.url) as db:
                    for protocol, more in LIMITS.items():
                        rows = db.execute(
                            "SELECT data FROM pg_logical_slot_peek_binary_changes('s', NULL, NULL, "
                            f"'proto_version', '{protocol}', 'publication_names', 'p', {more})"
                        ).fetchall()
                        for n, part in enumerate(_short(row[0] for row in rows)):
                            (folder / f"seed-{version}-{protocol}-{n}").write_bytes(joined(b"\7\5", part))


def _short(messages: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Leave out most of many messages of one kind in a row, and cut where an input grows too long."""
    part: list[bytes] = []
    kind, repeated = b"", 0
    for message in messages:
        repeated = repeated + 1 if message[:1] == kind else 0
        kind = message[:1]
        if repeated < 4:
            part.append(message)
        if sum(map(len, part)) > LONGEST // 4:
            yield part
            part = []
    yield part


def replay(folder: Path) -> int:
    """Run every file of a corpus; returns how many there were."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        try:
            run(path.read_bytes())
        except BaseException:
            print(f"{path} is not survived", file=sys.stderr)
            raise
    return len(files)


def fuzz(folder: Path, options: list[str]) -> None:
    """Fuzz until libFuzzer ends the process."""
    import atheris

    mutator = Mutator([path.read_bytes() for path in sorted(folder.glob("seed-*"))])
    atheris.Setup(
        [sys.argv[0], *options, f"-max_len={LONGEST}", str(folder)], run, custom_mutator=mutator.mutate
    )
    atheris.Fuzz()


def main() -> None:
    """Run the command line."""
    logging.disable()
    match sys.argv[1:]:
        case ["record", folder]:
            record(Path(folder))
        case ["replay", folder]:
            print(f"{replay(Path(folder))} inputs, nothing wrong")
        case ["fuzz", folder, *options]:
            fuzz(Path(folder), options)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
