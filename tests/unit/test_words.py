"""What the pipeline says of errors that are not its own."""

from __future__ import annotations

import errno

import pytest

from headrace import outages


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/log.db"), "left on device: '/log.db'"),
        (OSError("ERROR: invalid input syntax for type integer: \"4111-1111\""), "OSError: "),
        (ValueError("bad value 4111-1111"), "ValueError: bad value"),
    ],
)  # fmt: skip
def test_an_error_is_told_without_the_cells_that_it_quotes(error: Exception, words: str) -> None:
    assert words in outages.words(error)
    assert "4111" not in outages.words(error)
