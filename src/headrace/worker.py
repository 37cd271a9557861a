"""What workers are forked from, run as `python -m headrace.worker SOCKET` by `headrace.scaling.local`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from headrace.change import Offset, TableId
from headrace.memory import economise
from headrace.parts import PartSpec, Staged
from headrace.prepared import Prepared
from headrace.preparing import Whole, prepare_part
from headrace.scaling.worker import Answers, serve
from headrace.staging.delta import DeltaStaging
from headrace.transform.engine import engine
from headrace.transform.model import RowModel
from headrace.transform.python.process import keep_spare, on_progress

_MOST_MODELS = 32


class Preparer:
    """Prepares parts, of whichever source, from raw tables that another process writes."""

    def __init__(self, progress: Callable[[], None] = lambda: None) -> None:
        self._progress = progress
        self._whole = Whole()
        self._stagings: dict[Staged, DeltaStaging] = {}
        self._seen: dict[tuple[Staged, TableId], Offset] = {}
        self._models: dict[str, RowModel] = {}

    def prepare(self, part: PartSpec) -> Prepared:
        """Return the outcome of a part. Raises whatever is wrong with it."""
        is_new = part.model_id not in self._models
        model = self._model(part)
        staging = self._staging(part, model.table, again=is_new)
        self._progress()
        return prepare_part(staging, part, model, self._whole, self._progress)

    def _model(self, part: PartSpec) -> RowModel:
        """Return a part's model: the one that was here before, whose process may run, if it is the same."""
        assert isinstance(part.model, RowModel)
        model = self._models.pop(part.model_id, part.model)
        self._models[part.model_id] = model
        if len(self._models) > _MOST_MODELS:
            gone = self._models.pop(next(iter(self._models)))
            if gone.python is not None:
                gone.python.close()
        return model

    def _staging(self, part: PartSpec, table: TableId, *, again: bool) -> DeltaStaging:
        """Return the raw tables, with all that the part is to see of its own; looked at `again` for a model
        that may read columns which have come since."""
        staging = self._stagings.get(part.staged)
        needed = max(part.through, part.newest)
        if staging is None:
            of = part.staged
            staging = self._stagings[of] = DeltaStaging(Path(of.root), of.source, of.log_id, read_only=True)
        elif again or needed > self._seen.get((part.staged, table), 0):
            staging.refresh([table])
        self._seen[part.staged, table] = max(needed, self._seen.get((part.staged, table), 0))
        return staging


def main(control: int) -> None:
    """Be the workers that a pool asks for."""
    economise()

    def opened(answers: Answers) -> Callable[[PartSpec], Prepared]:
        on_progress(answers.progress)
        engine().execute("SET threads = 1")  # it is workers that there are several of
        return Preparer(answers.progress).prepare

    serve(control, opened, keep_spare)


if __name__ == "__main__":
    main(int(sys.argv[1]))
