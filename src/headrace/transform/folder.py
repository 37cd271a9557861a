"""The folder of model files, looked at again while a pipeline runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from headrace.alarms import resolve, trigger
from headrace.errors import HeadraceError, ModelError, UserError
from headrace.mart import Mart
from headrace.transform.header import model_paths
from headrace.transform.mart import SUFFIXES, read_file, version_in
from headrace.transform.names import Fold, name_faults, source_faults
from headrace.transform.python.text import SUFFIX, helper_paths
from headrace.transform.sql import ModelText

logger = logging.getLogger("headrace.models")

_LOOK_EVERY = 1.0
_SETTLE = 0.05

_Listing = tuple[tuple[str, int, int], ...]


class ModelFolder:
    """The models of a project as their files are now. Safe to share between threads."""

    def __init__(
        self,
        path: Path,
        sources: Collection[str],
        fold: Fold,
        dialect: str = "duckdb",
        versions: Path | None = None,
    ) -> None:
        """Read every model in `path`, which need not exist; `sources` are those a model may read, `fold` is
        what the destination makes of their names, `dialect` its SQL, in which marts are written. In the
        folder `versions` each version is kept as NAME/VERSION.sql, or .py.

        Raises ModelError for the first file that does not parse or cannot have its name, UserError for one
        of no source, and for a source that cannot have its name.
        """
        self._path = path
        self._sources = sources
        self._fold = fold
        self._dialect = dialect
        self._versions = versions
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._listing = self._seen = self._list()
        self._texts = {Path(name).stem: self._read(name) for name, _, _ in self._listing}
        for what, remedy in source_faults(sources):
            raise UserError(f"{what[0].upper()}{what[1:]}.", remedy)
        for _, fault in self._misnamed(self._texts):
            raise fault
        self._broken: dict[str, str] = {}
        self._current, self._marts = self._sorted()

    def _misnamed(
        self, texts: Mapping[str, ModelText | Mart], known: Collection[str] = ()
    ) -> Iterator[tuple[str, ModelError]]:
        for name, what, remedy in name_faults(texts, self._sources, self._fold, known):
            yield name, ModelError(f"{what[0].upper()}{what[1:]}.", remedy)

    def marts(self) -> tuple[Mart, ...]:
        """Return the marts, as of when `current` looked last; the same tuple while none has changed."""
        return self._marts

    def _sorted(self) -> tuple[tuple[ModelText, ...], tuple[Mart, ...]]:
        models = tuple(text for text in self._texts.values() if isinstance(text, ModelText))
        return models, tuple(text for text in self._texts.values() if isinstance(text, Mart))

    def current(self, *, now: bool = False) -> tuple[ModelText, ...]:
        """Return the models; the same tuple as before while no file has changed.

        Looks at most once a second, at once if `now`. A change counts when two looks in a row agree,
        so that a file being written is not taken half. A file that does not parse leaves its old
        version in force and is alerted once.
        """
        with self._lock:
            if not now and time.monotonic() - self._looked < _LOOK_EVERY:
                return self._current
            self._looked = time.monotonic()
            listing = self._list()
            while now and listing not in (self._listing, self._seen):
                self._seen = listing
                time.sleep(_SETTLE)
                listing = self._list()
            if listing != self._listing and listing == self._seen:
                self._reload(listing)
            self._seen = listing
            return self._current

    def _list(self) -> _Listing:
        found = []
        for path in model_paths(self._path):
            # A helper may be of any Python model: reading it tells whether it has another version.
            with suppress(OSError):
                parts = [path, *(helper_paths(self._path) if path.suffix == SUFFIX else ())]
                seen = [part.stat() for part in parts]
                found.append((path.name, sum(s.st_mtime_ns for s in seen), sum(s.st_size for s in seen)))
        return tuple(found)

    def _read(self, name: str) -> ModelText | Mart:
        text = read_file(self._path / name, self._dialect)
        for twin in {f"{text.name}{suffix}" for suffix in SUFFIXES} - {name}:
            if (self._path / twin).is_file():
                raise ModelError(f"{name} and {twin} would be one model.", "Rename one of them.")
        self._keep(self._path / name, text.version)
        if isinstance(text, ModelText) and text.source not in self._sources:
            raise UserError(
                f"Model {text.name} reads raw.{text.source}.{text.table}, but there is no "
                f"[source.{text.source}].",
                f"Sources are: {', '.join(sorted(self._sources))}.",
            )
        return text

    def _keep(self, path: Path, version: str) -> None:
        """Keep a version's text, so that it can be gone back to."""
        if (
            self._versions is None
            or (kept := self._versions / path.stem / f"{version}{path.suffix}").exists()
        ):
            return
        try:
            content = path.read_bytes()
            if version_in(path, content.decode()) == version:  # it may have been written to since
                kept.parent.mkdir(parents=True, exist_ok=True)
                making = kept.with_suffix(".new")
                making.write_bytes(content)
                making.rename(kept)
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("version %s of %s is not kept: %s", version, path.name, type(error).__name__)

    def _reload(self, listing: _Listing) -> None:
        before = dict.fromkeys(self._listing)
        texts: dict[str, ModelText | Mart] = {}
        for entry in listing:
            name = Path(entry[0]).stem
            known = self._texts.get(name)
            if known is not None and entry in before and name not in self._broken:
                texts[name] = known
                continue
            try:
                texts[name] = self._read(entry[0])
                if self._broken.pop(name, None):
                    resolve("unreadable", name, "RESOLVED model %s can be read again", name, model=name)
            except Exception as error:  # what a half-finished file may raise must not stop a pipeline
                self._alert(name, error, kept=known is not None)
                if known is not None:
                    texts[name] = known
        for name, fault in [*self._misnamed(texts, self._texts)]:
            self._alert(name, fault, kept=False)
            del texts[name]
        for name in [name for name in self._broken if name not in {Path(each[0]).stem for each in listing}]:
            del self._broken[name]
            resolve("unreadable", name, "RESOLVED model %s has no file any more", name, model=name)
        self._listing = listing
        if texts != self._texts:
            self._texts = texts
            models, marts = self._sorted()
            self._current = self._current if models == self._current else models
            self._marts = self._marts if marts == self._marts else marts

    def _alert(self, name: str, error: Exception, *, kept: bool) -> None:
        fault = error if isinstance(error, HeadraceError) else ModelError(f"{name}: {type(error).__name__}.")
        words = fault.paragraph()
        if self._broken.get(name) != words:
            what = "the version before stays in force" if kept else "it is left out"
            told = "MODEL %s cannot be read, %s: %s"
            trigger("unreadable", name, told, name, what, words, model=name)
        self._broken[name] = words
