"""Keeping marts as their inputs are: made again after an apply that changed one, in the order of what they
read."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from headrace.alarms import resolve, trigger
from headrace.cells import json_of
from headrace.mart import Mart, MartState
from headrace.protocols import Destination
from headrace.transform.folder import ModelFolder
from headrace.transform.mart import in_order, inputs_of

logger = logging.getLogger("headrace.marts")


class MartKeeper:
    """The marts of a project. One thread calls `step`."""

    def __init__(self, folder: ModelFolder, destination: Destination) -> None:
        self._folder = folder
        self._destination = destination
        self._marts = destination.marts
        self._files: tuple[Mart, ...] = ()
        self._order: list[Mart] = []
        self._circles: set[str] = set()
        self._states: dict[str, MartState] = {}
        self._inputs: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._tried: dict[str, str] = {}
        """Of each mart that this process has made, or tried to, how often its inputs had changed by then."""
        self._made: dict[str, float] = {}
        self._commits = -1

    def step(self, *, now: bool = False) -> None:
        """Make what is due: a mart that is new or has changed, and a table an input of which has changed, at
        most every `refresh_every` unless `now`. Raises what the destination raises of its own.
        """
        try:
            self._step(now=now)
        except BaseException:
            self._commits = -1  # whatever was to be done is still to be done
            raise

    def _step(self, *, now: bool) -> None:
        files, commits = self._folder.marts(), self._destination.commits
        if files is not self._files:
            self._take_over(files)
        elif self._commits == commits and not any(map(self._waits, self._order)):
            return
        if not self._order and not self._states:
            self._commits = commits
            return
        models, self._counts = self._marts.look()
        known = {*models, *(mart.name for mart in self._order)}
        for mart in self._order:
            self._inputs[mart.name] = inputs_of(mart, known, self._destination.main)
            if self._is_due(mart, now=now):
                self._make(mart)
                _, self._counts = self._marts.look()
            self._flag(mart, models)
        for name in self._states.keys() - {mart.name for mart in files}:
            self._retire(name)
        self._commits = commits

    def suspended(self) -> dict[str, str]:
        """Return the marts that cannot be made, with their reasons."""
        found = {state.name: state.reason for state in self._states.values() if state.state == "suspended"}
        for circle in self._circles:
            found |= dict.fromkeys(circle.split(" → "), f"reads itself: {circle}")
        return found

    def _take_over(self, files: tuple[Mart, ...]) -> None:
        self._states = self._marts.all() if files or self._files else {}
        self._order, circles = in_order(files, self._destination.main)
        for circle in set(circles) - self._circles:
            words = "MARTS read each other in a circle, and stand still: %s. Break it in one."
            trigger("mart_circle", circle, words, circle)
        for circle in self._circles - set(circles):
            resolve("mart_circle", circle, "RESOLVED marts read each other in a circle no more: %s", circle)
        self._circles = set(circles)
        self._files = files

    def _changes(self, mart: Mart) -> str:
        return json_of({name: self._counts.get(name, 0) for name in sorted(self._inputs.get(mart.name, ()))})

    def _waits(self, mart: Mart) -> bool:
        """Whether a mart has inputs that have changed since it was made."""
        state = self._states.get(mart.name)
        can_wait = mart.kind == "table" or (state is not None and state.state == "suspended")
        if not can_wait:
            return False
        tried = self._tried.get(mart.name, state.inputs if state else "")
        return self._changes(mart) != tried

    def _is_due(self, mart: Mart, *, now: bool) -> bool:
        known = self._states.get(mart.name)
        if known is None or known.version != mart.version or known.state == "retired":
            return True
        is_time = now or time.monotonic() - self._made.get(mart.name, 0.0) >= mart.refresh_every
        return is_time and self._waits(mart)

    def _make(self, mart: Mart) -> None:
        former, changes = self._states.get(mart.name), self._changes(mart)
        state = self._marts.make(mart, former, self._inputs[mart.name])
        self._states[mart.name] = state
        self._tried[mart.name] = state.inputs if state.state == "ok" else changes
        self._made[mart.name] = time.monotonic()
        if state.state == "suspended" and (former is None or former.reason != state.reason):
            trigger(
                "mart", mart.name,
                "SUSPENDED mart %s: %s. What there is of it stays. Mend models/%s.sql.",
                mart.name, state.reason.rstrip("."), mart.name, model=mart.name,
            )  # fmt: skip
        elif state.state == "ok" and (former is None or former.state != "ok"):
            logger.info("mart %s is made", mart.name)

    def _flag(self, mart: Mart, models: dict[str, str]) -> None:
        """Say what is missing in a mart's inputs, if anything is."""
        state, found = self._states[mart.name], []
        for name in self._inputs[mart.name]:
            other = self._states.get(name)
            missing = other.missing if other is not None else models.get(name, "")
            found += [missing] if missing else []
        if state.state == "suspended":
            found.append(f"{mart.name} is suspended")
        text = "; ".join(dict.fromkeys(found))
        if text != state.missing:
            self._states[mart.name] = replace(state, incomplete=bool(text), missing=text)
            self._marts.save(self._states[mart.name])

    def _retire(self, name: str) -> None:
        state = self._states.pop(name)
        if state.state != "retired":
            logger.info("%s is no longer a mart of this project: what there is of it stays", name)
            self._marts.save(replace(state, state="retired"))
