"""Which records a command of `headrace quarantine` is about, and who does what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getuser
from typing import TYPE_CHECKING, Any

from headrace.config import Project
from headrace.errors import HeadraceError, UserError
from headrace.keys import literal
from headrace.masking import MASK
from headrace.server import ask, is_running, read

if TYPE_CHECKING:
    from headrace.pipeline import Pipeline

OPEN = ("quarantined", "waiting", "blocked")

SHOWN_KEY = f"CASE WHEN key_is_masked THEN '{MASK}' ELSE key END"
"""A record's key as it is shown, in SQL: `redrive --key` takes the key itself."""
SHOWN_AWAITED = f"CASE WHEN key_is_masked AND waiting_on IS NOT NULL THEN '{MASK}' ELSE waiting_on END"
"""What a record waits for, as it is shown."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The records that the options of a command choose: all that meet each of them."""

    status: str = "open"
    model: str | None = None
    issue: str | None = None
    key: str | None = None
    txid: int | None = None
    where: str | None = None

    @property
    def condition(self) -> str:
        """The condition over headrace.quarantine, in SQL."""
        states = OPEN if self.status == "open" else (self.status,)
        parts = ["true" if self.status == "all" else f"status IN ({', '.join(map(literal, states))})"]
        texts = {"model": self.model, "issue": self.issue, "key": self.key}
        parts += [f"{name} = {literal(text)}" for name, text in texts.items() if text is not None]
        if self.txid is not None:
            parts.append(f"txid = {self.txid}")
        if self.where is not None:
            # On lines of its own: a comment in it ends with it.
            parts.append(f"(\n{self.where}\n)")
        return " AND ".join(parts)

    def is_narrow(self) -> bool:
        """Whether something but a model and a status narrows it."""
        return any(each is not None for each in (self.issue, self.key, self.txid, self.where))

    def refuse_unclear(self, verb: str, *, everything: bool) -> None:
        """Refuse what does not say which records are meant. Raises UserError."""
        unclear = everything == self.is_narrow() or (self.key is not None and self.model is None)
        if unclear:
            raise UserError(
                f"What to {verb} is not clear.",
                "Give some of: --issue ID; --model NAME --key KEY; --txid XID; --where SQL; or else --all.",
            )


def refuse_unknown(project: Project, chosen: Chosen) -> None:
    """Refuse what no record has ever been; nothing open of what there is, is no mistake."""
    everything = Chosen(
        "all", *(getattr(chosen, name) for name in ("model", "issue", "key", "txid", "where"))
    )
    if everything == Chosen("all"):
        return
    (found,) = read(project, [f"SELECT count(*) AS n FROM headrace.quarantine WHERE {everything.condition}"])
    if not found["n"][0].as_py():
        raise UserError("No record fits this.", "`headrace quarantine list` shows what there is.")


Asked = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def pipeline_for(project: Project) -> Iterator[Asked]:
    """Give what answers requests: the running pipeline, or one that is opened here for as long.

    Raises UserError with its words when it refuses.
    """
    if is_running(project):
        yield lambda request: {name: each for name, each in ask(project, request).items() if name != "ok"}
        return
    from headrace.pipeline import Pipeline

    pipeline = Pipeline(project)
    try:
        yield lambda request: _answer(pipeline, request)
    finally:
        pipeline.close()


def _answer(pipeline: Pipeline, request: dict[str, Any]) -> dict[str, Any]:
    """Do what the running pipeline would, and what its threads would do then."""
    if request["op"] == "archive":
        pipeline.lanes[0].destination.archive_issue(request["issue"], request["actor"])
        return {}
    lane = next((lane for lane in pipeline.lanes if lane.config.name == request["source"]), None)
    if lane is None:
        raise UserError(
            f"There is no [source.{request['source']}] any more.", "Its records stay as they are."
        )
    if request["op"] == "redrive":
        asked = {name: request[name] for name in ("dry_run", "each")}
        counts = lane.redrive(request["model"], request["keys"], **asked)
        while counts.get("rebuilding") and (lane.load() or lane.apply()):
            pass
        return counts
    from headrace.decisions import Decision

    decision = Decision.from_json(request["decision"])
    pipeline.project.refuse_reading_only(lane.config.name, f"headrace quarantine {decision.verb}")
    made = lane.decide(decision, dry_run=request["dry_run"])
    while not request["dry_run"] and (lane.load() or lane.apply()):
        pass
    return made


def actor_of(named: str | None) -> str:
    """Return who decides: as the user says, else the user of this process."""
    if named:
        return named
    try:
        return getuser()
    except (KeyError, OSError) as error:  # a container's user need not have a name
        raise HeadraceError("Nobody knows who you are.", "Say it with --actor NAME.") from error
