"""Whether the alerts of a project reach somebody."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.authoring.files import model_file, read_files
from headrace.config import Project
from headrace.errors import HeadraceError
from headrace.sources.postgres.preflight import Finding


def routes(project: Project) -> Iterator[Finding]:
    """Yield what there is to say of the channels, and of each model's route to them."""
    names = [channel.name for channel in project.alerts.channels]
    if names:
        yield Finding("ok", f"alerts go to {', '.join(names)} (headrace alerts test)")
    else:
        yield Finding("ok", "alerts are lines of the log: there is no channel [alerts.NAME]")
    for name, text in read_files(project):
        if isinstance(text, HeadraceError):
            continue
        if unknown := [channel for channel in text.alerts.route if channel not in names]:
            yield Finding(
                "warn",
                f"model {name} routes its alerts to {', '.join(unknown)}, and there is no such channel",
                f"Mend route in models/{model_file(project, name).name}; "
                f"the channels are: {', '.join(names) or 'none'}.",
            )
