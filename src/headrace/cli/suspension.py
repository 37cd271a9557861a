"""`headrace suspend` and `headrace resume`: one model stands still, or goes on, in the running pipeline or
without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.config import load_project
from headrace.server import ask, is_running

_FOLDER = Parameter(help="The project's folder.")


def suspend(
    model: str,
    *,
    reason: Annotated[str, Parameter(help="Why, for those who read `headrace status`.")] = "",
    project: Annotated[Path, _FOLDER] = Path(),
) -> None:
    """Let a model stand still, over restarts and whatever becomes of its file, until it is resumed.

    Its table stays as it is. What changes meanwhile is captured and staged as ever, and waits for it; the
    other models go on, and the log is not held.

    Parameters
    ----------
    model
        The model's name, or that of a mirrored table: shop.orders.
    """
    _change(project, model, reason)
    print(f"{model} is suspended: headrace resume {model}")


def resume(model: str, *, project: Annotated[Path, _FOLDER] = Path()) -> None:
    """Let a suspended model go on from where it stands, whoever has suspended it.

    One that its breaker has suspended is tried with one part of what waits: where too much of it fails again,
    it is suspended again.

    Parameters
    ----------
    model
        The model's name, or that of a mirrored table: shop.orders.
    """
    _change(project, model, None)
    print(f"{model} goes on from where it stands")


def _change(project: Path, model: str, reason: str | None) -> None:
    """Suspend a model with a reason, or resume it."""
    settings = load_project(project)
    if is_running(settings):
        request = {"op": "resume"} if reason is None else {"op": "suspend", "reason": reason}
        ask(settings, {**request, "model": model})
        return
    from headrace.pipeline import Pipeline

    pipeline = Pipeline(settings)
    try:
        lane = pipeline.lane_of(model)
        lane.release(model) if reason is None else lane.hold(model, reason)
    finally:
        pipeline.close()
