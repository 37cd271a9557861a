"""Where rows arrive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.config import DestinationConfig
    from headrace.destinations.publishing import Publisher
    from headrace.protocols import Destination


def open_destination(config: DestinationConfig, *, spill: Path | None = None) -> Destination:
    """Return the destination that a project names; nothing is reached before it is used.

    A local engine puts what does not fit into memory into the folder `spill`.
    """
    # Each imports its own engine.
    if config.type == "postgres":
        from headrace.destinations.postgres import PostgresDestination

        assert config.url is not None, "the configuration is checked"
        return PostgresDestination(
            config.url,
            schema=config.schema,
            lock_timeout=config.lock_timeout,
            statement_timeout=config.statement_timeout,
        )
    from headrace.destinations.duckdb import DuckDBDestination

    return DuckDBDestination(config.path, spill=spill, published=config.publish)


def open_publisher(config: DestinationConfig, destination: Destination) -> Publisher | None:
    """Return what keeps the copy for readers that a project asks for, or None if it asks for none."""
    if config.publish is None:
        return None
    from headrace.destinations.duckdb import DuckDBDestination
    from headrace.destinations.publishing import Publisher

    assert isinstance(destination, DuckDBDestination), "the configuration is checked"
    return Publisher(destination, config.publish, config.publish_every)
