"""Models that are timed side by side: in turns, at the same lengths, in ways of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.errors import BadInput, CompressError
from compress.evaluation import bench as module
from compress.evaluation.bench import Contestant, bench, contestant
from compress.evaluation.statistics import median_of_pairs
from compress.evaluation.timed import Settings

STATE = {
    "peak_resident_bytes": 2000,
    "baseline_resident_bytes": 1000,
    "peak_device_bytes": None,
    "threads": 1,
    "device": "a processor",
    "kernel": "torch",
    "storage_dtype": "float32",
}


class Pretended:
    """A model process whose seconds are its own times how busy the machine is, which changes all the time."""

    log: list[tuple[str, str, int]]
    busy: float

    def __init__(self, folder: Path, settings: Settings, name: str) -> None:
        self.name, self.prompt_tokens = name, 32
        self.slowness = {"slow": 4.0}.get(name, 1.0)
        self.longest, self.generates = {"short": (40, True), "encoder": (512, False)}.get(name, (2048, True))

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append((self.name, "end", 0))

    def prefill(self, tokens: int) -> float:
        return self._work("prefill", tokens)

    def decode(self, tokens: int) -> float:
        return self._work("decode", tokens)

    def _work(self, kind: str, tokens: int) -> float:
        self.log.append((self.name, kind, tokens))
        # As busy for both models of a repetition, which begins with a prefill.
        Pretended.busy += 0.25 if kind == "prefill" and len(self.log) % 4 == 0 else 0
        return tokens * self.slowness * Pretended.busy

    def state(self) -> dict[str, Any]:
        return STATE


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    Pretended.log, Pretended.busy = [], 1.0
    monkeypatch.setattr(module, "ModelProcess", Pretended)
    return Pretended.log


def models(*names: str) -> list[Contestant]:
    return [Contestant(name, Path(name), Settings()) for name in names]


def test_models_take_turns_and_each_begins_a_repetition(log: list[tuple[str, str, int]]) -> None:
    found = bench(models("a", "b"), 100, 10, 2)
    turns = [("a", "prefill", 100), ("b", "prefill", 100), ("a", "decode", 10), ("b", "decode", 10)]
    warm_up = [("a", "prefill", 100), ("a", "decode", 4), ("b", "prefill", 100), ("b", "decode", 4)]
    other_way_round = [turns[index] for index in (1, 0, 3, 2)]
    assert log == [*warm_up, *turns, *other_way_round, ("b", "end", 0), ("a", "end", 0)]
    assert [len(model.decode.seconds) for model in found.models] == [2, 2]
    assert found.models[1].prefill.ratio.low is None  # two repetitions tell nothing


def test_ratios_are_taken_within_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine slows down from repetition to repetition, speeds are blurred and ratios are not."""
    busy = iter([1.0] * 4 + [by for by in range(1, 10) for _ in range(4)])
    monkeypatch.setattr(Pretended, "_work", lambda self, _, tokens: tokens * self.slowness * next(busy))
    first, slow = bench(models("fast", "slow"), 100, 10, 9).models
    assert (first.prefill.ratio, first.decode.ratio) == (None, None)
    assert first.prefill.speed.high > 2 * first.prefill.speed.low
    for ratio in (slow.prefill.ratio, slow.decode.ratio):
        assert (ratio.value, ratio.low, ratio.high) == (0.25, 0.25, 0.25)
    assert slow.peak_memory.value == 2000


def test_lengths_are_those_that_all_models_take(log: list[tuple[str, str, int]]) -> None:
    found = bench(models("a", "short"), 512, 32, 1)
    assert {(model.prefill.tokens, model.decode.tokens) for model in found.models} == {(40, 8)}


def test_an_encoder_is_only_prefilled() -> None:
    encoder, decoder = bench(models("encoder", "a"), 100, 10, 6).models
    assert (encoder.decode, decoder.decode.ratio) == (None, None)
    assert decoder.prefill.ratio.low == decoder.prefill.ratio.value or decoder.prefill.ratio.low > 0


def test_all_models_end_where_one_fails(log: list[tuple[str, str, int]], monkeypatch) -> None:
    def fail(*_: Any) -> float:
        raise CompressError("Measuring a failed: killed by signal 9.")

    monkeypatch.setattr(Pretended, "decode", fail)
    with pytest.raises(CompressError, match="signal 9"):
        bench(models("a", "b"), 100, 10, 2)
    assert log[-2:] == [("b", "end", 0), ("a", "end", 0)]


def test_a_model_may_have_settings_of_its_own(tmp_path: Path) -> None:
    shared = Settings(threads=2, kernel="cpu")
    assert contestant(str(tmp_path), shared) == Contestant(str(tmp_path), tmp_path, shared)
    name = f"{tmp_path}@kernel=cpu:avx2,head-bits=8,activation_bits=8,memory=90MB"
    own = contestant(name, shared)
    assert (own.name, own.folder) == (name, tmp_path)
    assert own.settings == Settings(
        threads=2, kernel="cpu:avx2", head_bits=8, activation_bits=8, memory="90MB"
    )
    (folder := tmp_path / "mine@kernel=none").mkdir()
    assert contestant(str(folder), shared).folder == folder


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("reference", "'reference' in '.*' is not NAME=VALUE; write MODEL@kernel=reference"),
        ("kernal=cpu", "There is no setting 'kernal'; did you mean 'kernel'"),
        ("threads=0", "In '.*', threads: Input should be greater than 0"),
        ("activation-bits=7", "In '.*', activation-bits: Input should be 16 or 8"),
        ("dtype=float", "In '.*', dtype: Input should be 'float32'"),
    ],
)
def test_settings_that_do_not_exist(own: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        contestant(f"{tmp_path}@{own}", Settings())


@pytest.mark.parametrize(
    ("count", "ends"), [(1, None), (5, None), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (20, (5, 14))]
)
def test_the_interval_of_the_sign_test(count: int, ends: tuple[int, int] | None) -> None:
    found = median_of_pairs([float(number) for number in reversed(range(count))])
    assert found.value == (count - 1) / 2
    assert (found.low, found.high) == (ends or (None, None))
