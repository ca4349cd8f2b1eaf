from __future__ import annotations

import logging
import signal
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from compress.errors import BadInput, CompressError
from compress.evaluation import measure as module
from compress.evaluation import timed
from compress.evaluation.measure import ModelProcess, measure, measured, repeat, time_decode, time_prefill
from compress.evaluation.timed import Settings, Timed, kernels_of, storage_dtype
from compress.system.memory import peak_memory


def tiny_llama(vocabulary: int = 64, dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(2**19, torch.float32).save_pretrained(path)  # two matrices of 32 MiB
    return path


def test_a_fresh_process_states_speed_and_memory(folder: Path):
    ballast = torch.ones(2**28)  # 1 GiB here, of which the child must know nothing
    found = measure(folder, Settings(threads=1), 512, 8, repetitions=3)
    assert found.prefill_tokens == 128  # the model has no more positions
    assert found.prefill_repetitions == 3
    assert found.prefill.low <= found.prefill.value <= found.prefill.high
    assert 4 <= found.decode_tokens <= 8
    assert found.decode.unit == "tokens/s"
    assert found.threads == 1
    assert found.kernel == "torch"
    assert found.storage_dtype == "float32"
    assert found.peak_device_bytes is None
    assert found.baseline_resident_bytes > 100e6  # torch and transformers
    assert 64 * 2**20 <= found.added_memory.value < 700e6  # the weights at least
    assert found.peak_resident_bytes < ballast.nbytes < peak_memory()


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> ModelProcess:
    process = ModelProcess("model", Settings())
    monkeypatch.setattr(process, "_command", [sys.executable, "-c", f"import os, signal, sys, time\n{code}"])
    return process


READY = """print('{"longest": 8, "generates": true, "prompt_tokens": 4}', flush=True)\n"""


@pytest.mark.parametrize("error", [BadInput, CompressError])
def test_a_failing_child_is_one_sentence(error: type[CompressError], monkeypatch: pytest.MonkeyPatch):
    code = f"print('noise\\nNo such model.', file=sys.stderr); sys.exit({error.exit_code})"
    with pytest.raises(CompressError) as caught, child(monkeypatch, code):
        pass
    assert type(caught.value) is error
    assert str(caught.value) == "Measuring model failed: No such model."


def test_what_a_child_says_when_it_fails(tmp_path: Path):
    with pytest.raises(BadInput) as caught:
        measure(tmp_path / "nowhere")
    assert str(caught.value) == (
        f"Measuring {tmp_path / 'nowhere'} failed: There is no model folder '{tmp_path / 'nowhere'}'."
    )


def test_a_child_that_is_killed_between_two_questions_says_so(monkeypatch: pytest.MonkeyPatch):
    with child(monkeypatch, f"{READY}sys.stdin.readline()\nos.kill(os.getpid(), signal.SIGKILL)") as model:
        assert (model.longest, model.prompt_tokens) == (8, 4)
        with pytest.raises(CompressError, match=r"killed by signal 9 .* it gave no reason"):
            model.prefill(4)
        with pytest.raises(CompressError, match="killed by signal 9"):  # the pipe to it is broken now
            model.decode(4)


def test_half_an_answer_is_none(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CompressError, match="it gave no reason"), child(monkeypatch, "sys.stdout.write('[')"):
        pass


def test_no_child_outlives_its_use(monkeypatch: pytest.MonkeyPatch):
    """Not even one that does not listen; one that says more than a pipe holds is not held up."""
    babbling = f"print('x' * 2**20, file=sys.stderr)\n{READY}time.sleep(600)"
    with pytest.raises(KeyboardInterrupt), child(monkeypatch, babbling) as model:
        raise KeyboardInterrupt
    assert model._child.returncode == -signal.SIGKILL
    loading = child(monkeypatch, "time.sleep(600)")
    monkeypatch.setattr(loading, "_answer", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), loading:
        pass
    assert loading._child.returncode == -signal.SIGKILL


def test_a_child_ends_with_its_questions(folder: Path):
    with ModelProcess(folder, Settings(threads=1)) as model:
        model._child.stdin.close()
        assert model._child.wait(60) == 0


def test_libraries_that_print_do_not_disturb_the_answers(monkeypatch: pytest.MonkeyPatch, folder: Path):
    code = "os.environ['X'] = '1'; from compress.evaluation import timed\n"
    code += "load = timed.Settings.load\n"
    code += "timed.Settings.load = lambda *of: (print('loud'), os.write(1, b'louder'), load(*of))[-1]\n"
    code += (
        f"sys.argv = ['', {str(folder)!r}, {Settings(threads=1).model_dump_json()!r}]\nsys.exit(timed.main())"
    )
    with child(monkeypatch, code) as model:
        assert model.longest == 128
        assert model.prefill(4) > 0


def test_numbers_below_one_are_refused():
    with pytest.raises(BadInput, match="at least 1"):
        measure("model", decode_tokens=0)


def test_an_encoder_is_only_prefilled():
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=42,
        pad_token_id=1,
    )
    found = measured(Timed(lambda: transformers.RobertaModel(config)), repetitions=3)
    assert (found.decode, found.decode_tokens, found.decode_repetitions) == (None, None, None)
    assert found.prefill_tokens == 40  # two of the 42 positions are for padding


@pytest.mark.parametrize(
    ("tokens_per_second", "prefill", "decode"),
    [(2**20, (128, 5), (96, 5)), (32, (128, 2), (80, 5)), (4, (32, 1), (10, 5)), (0.5, (32, 1), (4, 1))],
)
def test_a_slow_kernel_stays_near_the_budget(
    tokens_per_second: float, prefill: tuple, decode: tuple, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "BUDGET_SECONDS", 15.0)
    clock = [0.0]  # turned by the model: so many tokens a second
    model = tiny_llama()

    def turn(_module, _arguments, inputs: dict, _output) -> None:
        clock[0] += inputs["input_ids"].shape[1] / tokens_per_second

    model.register_forward_hook(turn, with_kwargs=True)
    monkeypatch.setattr(timed.time, "perf_counter", lambda: clock[0])
    found = measured(Timed(lambda: model), prefill_tokens=128, decode_tokens=100, repetitions=5)
    assert (found.prefill_tokens, found.prefill_repetitions) == prefill
    assert (found.decode_tokens, found.decode_repetitions) == decode
    assert found.prefill.value == pytest.approx(tokens_per_second)
    assert found.decode.value == pytest.approx(tokens_per_second)
    assert (found.prefill.low is None) == (found.prefill_repetitions < 3)


def test_repetitions_stop_at_the_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BUDGET_SECONDS", 15.0)
    assert repeat(lambda: 1.0, 5) == [1.0] * 5
    assert repeat(lambda: 4.0, 5) == [4.0] * 2
    assert repeat(lambda: 400.0, 5) == [400.0]


def test_decode_is_greedy_and_uses_the_cache():
    model, seen, cached = tiny_llama(dtype=torch.float32), [], []

    def watch(_module, _arguments, inputs: dict) -> None:
        seen.append(inputs["input_ids"])
        cache = inputs.get("cache", inputs.get("past_key_values"))  # 5.24 of transformers renamed it
        cached.append(0 if cache is None else cache.get_seq_length())

    model.register_forward_pre_hook(watch, with_kwargs=True)
    _, tokens = time_decode(Timed(lambda: model), 6, repetitions=1)
    assert tokens == 6
    assert [ids.shape[1] for ids in seen[-7:]] == [32, 1, 1, 1, 1, 1, 1]
    assert cached[-7:] == [0, 32, 33, 34, 35, 36, 37]
    found = torch.cat(seen[-7:], dim=1)
    everything = {"attention_mask": torch.ones(1, 32, dtype=torch.int64)}  # the prompt may hold the padding
    expected = model.generate(
        found[:, :32], **everything, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=None
    )
    assert found.tolist() == expected.tolist()


def test_decode_uses_nothing_that_transformers_warns_of(caplog: pytest.LogCaptureFixture, monkeypatch):
    transformers.logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level("WARNING"):
        warnings.simplefilter("always")
        time_decode(Timed(tiny_llama), 6, repetitions=1)
    assert [str(warning.message) for warning in warned] == []
    assert caplog.messages == []


def test_prefill_computes_the_head_for_the_last_position_only():
    model, shapes = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    _, tokens = time_prefill(Timed(lambda: model), 100, repetitions=2)
    assert tokens == 100
    assert set(shapes) == {(1, 1, 64)}


def test_a_dense_model_runs_as_transformers_runs_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Unless a kernel is named, or its head is packed."""
    used: list[str] = []
    monkeypatch.setattr("compress.load", lambda folder, **given: used.append(given["kernel"]))
    for settings in (Settings(), Settings(kernel="cpu"), Settings(head_bits=8)):
        settings.load(folder)
    assert used == ["reference", "cpu", "auto"]


def test_what_ran_and_what_is_stored_are_named():
    model = tiny_llama()
    model.model.layers[0].mlp.gate_proj.kernel = "cpu"
    model.model.layers[0].mlp.up_proj.kernel = "reference"
    model.model.layers[0].mlp.up_proj.register_buffer("packed", torch.zeros(4000, dtype=torch.int32))
    assert kernels_of(model) == "cpu + reference"
    assert storage_dtype(model) == "int32 + bfloat16"
