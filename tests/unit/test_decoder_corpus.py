"""The decoder against what fuzzing found worth keeping, and against what real servers sent."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

CORPUS = Path(__file__).parent / "corpus"
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz_decoder.py"


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_decoder", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_input_of_the_corpus_is_survived(fuzzer: ModuleType) -> None:
    assert fuzzer.replay(CORPUS) > 50


def test_what_real_servers_sent_is_understood(fuzzer: ModuleType) -> None:
    for path in CORPUS.glob("seed-*-1-0"):
        decoder = fuzzer.Decoder()
        messages = fuzzer.messages_of(path.read_bytes())
        assert len(messages) > 20
        for message in messages:
            decoder.push(message)
        transactions, _ = decoder.take()
        assert len(transactions) > 8


def test_changed_messages_are_survived(fuzzer: ModuleType) -> None:
    seeds = [path.read_bytes() for path in sorted(CORPUS.glob("seed-*"))]
    mutator, chance = fuzzer.Mutator(seeds), random.Random(7)
    data = chance.choice(seeds)
    for n in range(1500):
        data = mutator.mutate(data, fuzzer.LONGEST, n)
        fuzzer.run(data)
        if n % 20 == 0:
            data = chance.choice(seeds)


def test_a_decoder_that_does_wrong_is_caught(fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(CORPUS.glob("seed-*-1-0")).read_bytes()

    class Forgetful:
        """A decoder that drops the first event of each take."""

        def __init__(self, **limits: int) -> None:
            self._decoder = decoder(**limits)

        def __getattr__(self, name: str) -> object:
            return getattr(self._decoder, name)

        def take(self) -> tuple[list[object], list[object]]:
            transactions, events = self._decoder.take()
            return transactions, events[1:]

    decoder = fuzzer.Decoder
    monkeypatch.setattr(fuzzer, "Decoder", Forgetful)
    with pytest.raises(AssertionError):
        fuzzer.run(seed)
