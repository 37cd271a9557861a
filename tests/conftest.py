"""Settings that all tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# HEADRACE_EXAMPLES=1000 searches longer than a normal run has time for.
settings.register_profile(
    "headrace",
    max_examples=int(os.environ.get("HEADRACE_EXAMPLES", "30")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("headrace")
