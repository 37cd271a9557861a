"""Connections to a Postgres source, all with the same pinned settings.

Copy, stream and verify must give the same text for the same value, whatever the server's or the
role's defaults are. Text comes as UTF-8, from a database of encoding SQL_ASCII as the bytes that it holds:
see `undecodable`.
"""

from __future__ import annotations

import re
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import psycopg
from psycopg import conninfo

from headrace.errors import SourceUnavailable, UserError
from headrace.secret import without_passwords

PINNED = {
    "TimeZone": "UTC",
    "DateStyle": "ISO,YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "client_encoding": "UTF8",
    "xmloption": "content",
    "lc_monetary": "C",
    "search_path": "pg_catalog",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "application_name": "headrace",
}
_CONNECT_TIMEOUT = 10

# A database of this encoding holds bytes of any kind: asked for UTF-8, it would break off at what is none.
BYTES_AS_THEY_ARE = (
    "SELECT pg_catalog.set_config('client_encoding', 'SQL_ASCII', false) "
    "WHERE pg_catalog.current_setting('server_encoding') = 'SQL_ASCII'"
)
LOCK_TIMEOUT = "2s"
"""How long a statement of an ordinary connection waits for a lock: what waits stands in the queue, and
whatever conflicts with it queues behind it. A bulk read waits, since nothing but DDL queues behind that."""


def pinned_conninfo(url: str, **extra: str) -> str:
    """Return the connection string of `url` with every pinned setting and keepalives; of `extra`, `options`
    are added to those of the url, the others replace the url's."""
    given = conninfo.conninfo_to_dict(url)
    options = " ".join(f"-c {name}={value}" for name, value in PINNED.items() if name != "client_encoding")
    settings: dict[str, Any] = {
        "connect_timeout": str(_CONNECT_TIMEOUT),
        "keepalives_idle": "15",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        **given,
        "client_encoding": "UTF8",
        **extra,
        "options": " ".join((str(given.get("options", "")), options, extra.get("options", ""))).strip(),
    }
    return conninfo.make_conninfo("", **settings)


def connect(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    """Open an ordinary connection in autocommit mode, whose statements wait for locks 2 s at most.

    Raises SourceUnavailable where waiting may help, UserError where it will not (a wrong password,
    no such database).
    """
    try:
        return psycopg.connect(
            pinned_conninfo(url, options=f"-c lock_timeout={LOCK_TIMEOUT}"), autocommit=True
        )
    except psycopg.OperationalError as error:
        raise refusal(url, error) from error


def connect_replication(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection that speaks the replication protocol; raises what `connect` raises."""
    try:
        db = psycopg.connect(pinned_conninfo(url, replication="database"), autocommit=True)
        db.execute(BYTES_AS_THEY_ARE)
    except psycopg.OperationalError as error:
        raise refusal(url, error) from error
    return db


def connect_copy(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection in autocommit mode that reads rows as the stream sends them, and waits for locks.

    Its statements go out as bytes: psycopg would take those of a database of encoding SQL_ASCII for ASCII.
    Raises SourceUnavailable.
    """
    try:
        db = psycopg.connect(pinned_conninfo(url), autocommit=True)
        db.execute(BYTES_AS_THEY_ARE)
    except psycopg.Error as error:
        raise SourceUnavailable(without_password(str(error))) from error
    return db


def connect_bulk(url: str) -> Any:
    """Open an ADBC connection, in which every statement belongs to one transaction until commit.

    Raises SourceUnavailable.
    """
    info = conninfo.conninfo_to_dict(pinned_conninfo(url))
    text = " ".join(f"{key}='{_escaped(str(value))}'" for key, value in info.items())
    try:
        connection = adbc.connect(text)
        with connection.cursor() as cursor:
            cursor.execute(BYTES_AS_THEY_ARE)
            cursor.fetchall()
        connection.commit()
    except adbc.Error as error:
        raise SourceUnavailable(without_password(str(error))) from error
    return connection


def refusal(url: str, error: Exception) -> SourceUnavailable | UserError:
    """Turn a failed connection into what it means for the user."""
    where = place(url)
    words = without_password(str(error)).strip().splitlines()
    text = words[-1] if words else "no reason given"
    if "password authentication failed" in text or "no password supplied" in text or "authentication" in text:
        return UserError(
            f"{where} refuses the login: {text}",
            "Check user and password in the source's url, and pg_hba.conf.",
        )
    if re.search(r'(database|role) ".*" does not exist', text):
        return UserError(f"{where}: {text}", "Check the source's url.")
    if "certificate" in text:
        return SourceUnavailable(
            f"{where} cannot be trusted: {text}",
            "Check in the source's url sslrootcert (who signed the server's certificate), the host (to whom "
            "it was made out) and sslcert; Headrace keeps trying.",
        )
    return SourceUnavailable(
        f"{where} cannot be reached: {text}",
        "Check that the server runs and the url is right; Headrace keeps trying.",
    )


def broke_off(url: str, error: Exception) -> SourceUnavailable:
    """Turn the end of a connection that was open into what it means for the user."""
    return SourceUnavailable(f"{place(url)} broke off: {without_password(str(error)).strip()}")


def place(url: str) -> str:
    """Name a server for people, without any secret."""
    info = conninfo.conninfo_to_dict(url)
    host = info.get("host") or info.get("hostaddr") or "local socket"
    port = f":{info['port']}" if info.get("port") else ""
    return f"Postgres {info.get('dbname') or ''} at {host}{port}".replace("  ", " ")


def without_password(text: str) -> str:
    """Remove whatever looks like a password from a driver's message."""
    return without_passwords(text)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")
