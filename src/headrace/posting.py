"""Posting to an address of the web that may hold a token: what fails is told without it."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from urllib.error import HTTPError, URLError

from headrace.secret import Secret

_TIMEOUT = 10.0


class PostFailed(Exception):
    """A post did not arrive; says why, without the address. `retry_after` is in seconds, 0 if not said."""

    def __init__(self, why: str, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses what leads elsewhere: a POST would come there as a GET, without its body."""

    def redirect_request(self, *_: object) -> None:
        return None


def post(url: Secret, body: bytes, headers: Mapping[str, str]) -> None:
    """Post a body. Raises PostFailed for any answer but 2xx, and for none within ten seconds."""
    try:
        request = urllib.request.Request(url.reveal(), data=body, headers=dict(headers))
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_TIMEOUT):
            pass
    except HTTPError as error:
        error.close()
        after = error.headers.get("Retry-After", "")
        raise PostFailed(f"it answered {error.code}", float(after) if after.isdecimal() else 0.0) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise PostFailed(f"{type(reason).__name__} before it answered") from None
