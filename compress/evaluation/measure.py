"""Measure the speed and memory of a model that is alone in a fresh process.

    python -m compress.evaluation.measure FOLDER --json

loads the folder with :func:`compress.load`, times a prefill and a greedy decode at batch size 1, and prints
one JSON document. :func:`measure` does the same in a child process, because only a process that holds nothing
else can tell how much memory a model takes.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import inspect
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, CompressError
from compress.report.scorecard import Figure, Measurement
from compress.system.memory import peak_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT_TOKENS = 32
"""Tokens in the prompt before a decode."""

BUDGET_SECONDS = 8.0
"""Seconds for the prefill with its warm-up, and as many for the decode. If time is short, the prefill loses
repetitions first, because its speed depends on its length, and the decode loses tokens first."""

FEWEST_DECODE_TOKENS = 4
"""Tokens that a decode generates however slow the model is."""


def measure(
    folder: str | Path,
    device: str = "cpu",
    prefill_tokens: int = 512,
    decode_tokens: int = 128,
    repetitions: int = 5,
    threads: int | None = None,
    memory: int | None = None,
) -> Measurement:
    """Measure a model folder in a child process.

    Args:
        folder: a folder for ``compress.load``; the model keeps the dtype it is stored in.
        device: a torch device.
        prefill_tokens, decode_tokens: wanted lengths in tokens; the result states the lengths that were
        timed.
        repetitions: number of timed repetitions of each, after one that is not timed.
        threads: threads of torch in the child; by default torch decides.
        memory: largest number of bytes that a model stored in blocks is loaded into.

    Raises:
        BadInput: a number is below 1, or the child refused its input (it exited with code 2).
        CompressError: the child failed; the message has the last line that it wrote to stderr.
    """
    if min(prefill_tokens, decode_tokens, repetitions, threads or 1) < 1:
        raise BadInput("Tokens, repetitions and threads of a measurement must be at least 1.")
    # -P: a folder named "compress" in the working directory must not be taken for this package.
    command = [
        sys.executable,
        "-P",
        "-m",
        "compress.evaluation.measure",
        str(folder),
        "--json",
        f"--device={device}",
    ]
    command += [f"--prefill-tokens={prefill_tokens}", f"--decode-tokens={decode_tokens}"]
    command += [f"--repetitions={repetitions}"]
    command += [f"--threads={threads}"] if threads else []
    command += [f"--memory={memory}"] if memory is not None else []
    child = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if child.returncode == 0:
        return Measurement.model_validate_json(child.stdout)
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else "it gave no reason"
    if child.returncode < 0:
        reason = f"killed by signal {-child.returncode} (9 is usually out of memory); last line: {reason}"
    error = BadInput if child.returncode == BadInput.exit_code else CompressError
    raise error(f"Measuring {folder} failed: {reason}")


def measure_model(
    load: Callable[[], PreTrainedModel],
    device: str = "cpu",
    prefill_tokens: int = 512,
    decode_tokens: int = 128,
    repetitions: int = 5,
) -> Measurement:
    """Load a model and measure it in this process, which should hold nothing else.

    Args:
        load: loads the model.
        device: a torch device.
        prefill_tokens, decode_tokens, repetitions: as for `measure`.
    """
    import torch
    import transformers.generation  # noqa: F401  every model needs it, so it belongs to the baseline

    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.init()
    baseline = peak_memory()
    with torch.inference_mode():
        model = load().eval()
        prefill_seconds, prefill_tokens = time_prefill(model, place, prefill_tokens, repetitions)
        decoded: dict[str, Any] = {}
        if model.can_generate():
            decode_seconds, decode_tokens = time_decode(model, place, decode_tokens, repetitions)
            decoded = {
                "decode": speed(decode_tokens, decode_seconds),
                "decode_tokens": decode_tokens,
                "decode_repetitions": len(decode_seconds),
            }
    return Measurement(
        peak_resident_bytes=peak_memory(),
        baseline_resident_bytes=baseline,
        peak_device_bytes=torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
        prefill=speed(prefill_tokens, prefill_seconds),
        prefill_tokens=prefill_tokens,
        prefill_repetitions=len(prefill_seconds),
        threads=torch.get_num_threads(),
        device=device_name(place),
        kernel=kernels_of(model),
        storage_dtype=storage_dtype(model),
        **decoded,
    )


def time_prefill(
    model: PreTrainedModel, device: torch.device, tokens: int, repetitions: int
) -> tuple[list[float], int]:
    """Seconds of each repetition, and the length of the prompt in tokens.

    If the model allows it, the head runs on the last position only, as in generation.
    """
    from compress.engine.skeleton import longest_input

    wanted: dict[str, Any] = {"use_cache": True} if model.can_generate() else {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        wanted["logits_to_keep"] = 1
    tokens = min(tokens, longest_input(model))

    def prefill(length: int) -> float:
        ids = token_ids(model, length, device)
        return seconds(lambda: model(input_ids=ids, **wanted), device)

    probe = min(PROMPT_TOKENS, tokens)
    prefill(probe)  # the first call takes longer, because it fills caches
    per_token = prefill(probe) / probe
    tokens = max(probe, min(tokens, int(BUDGET_SECONDS / 2 / per_token)))
    return repeat(lambda: prefill(tokens), repetitions), tokens


def time_decode(
    model: PreTrainedModel, device: torch.device, tokens: int, repetitions: int
) -> tuple[list[float], int]:
    """Seconds of each repetition, and how many tokens each of them generated after a short prompt."""
    from compress.engine.skeleton import longest_input

    longest = longest_input(model)
    prompt = token_ids(model, min(PROMPT_TOKENS, max(1, longest // 2)), device)
    tokens = max(1, min(tokens, longest - prompt.shape[1]))

    def decode(length: int) -> float:
        output = model(input_ids=prompt, use_cache=True)

        def generate() -> None:
            nonlocal output
            for _ in range(length):
                token = output.logits[:, -1:].argmax(-1)
                # transformers 5.24 renamed it and warns about the old name, which 5.40 removes.
                cache = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118
                output = model(input_ids=token, use_cache=True, **{cache: output[cache]})

        return seconds(generate, device)

    probe = min(FEWEST_DECODE_TOKENS, tokens)
    per_token = decode(probe) / probe
    tokens = max(probe, min(tokens, int(BUDGET_SECONDS / (repetitions + 1) / per_token)))
    return repeat(lambda: decode(tokens), repetitions), tokens


def repeat(once: Callable[[], float], repetitions: int) -> list[float]:
    """Seconds of as many repetitions as the budget allows, after a warm-up if there is time for two."""
    timed = [once()]
    while len(timed) <= repetitions and sum(timed) + timed[-1] <= BUDGET_SECONDS:
        timed.append(once())
    return timed[1:] or timed


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes on a device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def speed(tokens: int, timed: list[float]) -> Figure:
    """Tokens per second: the median with the interquartile range, which needs three repetitions."""
    rates = sorted(tokens / each for each in timed)
    low, median, high = None, statistics.median(rates), None
    if len(rates) >= 3:
        low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
        low, high = min(low, median), max(high, median)  # of equal rates, interpolation may round past them
    return Figure(value=median, low=low, high=high, unit="tokens/s", spread="interquartile range")


def token_ids(model: PreTrainedModel, length: int, device: torch.device) -> Tensor:
    """Random token ids [1, length], always the same, because their meaning does not change their cost."""
    import torch

    embedding: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(embedding.num_embeddings, (1, length), generator=generator).to(device)


def kernels_of(model: PreTrainedModel) -> str:
    """The kernels of the low-bit layers, from their attribute ``kernel``; ``torch`` if there are none."""
    names = {getattr(module, "kernel", None) for module in model.modules()}
    return " + ".join(sorted(name for name in names if isinstance(name, str))) or "torch"


def storage_dtype(model: PreTrainedModel) -> str:
    """The dtypes of at least a hundredth of the model's bytes in memory, largest share first."""
    held: Counter[str] = Counter()
    for tensor in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values():
        held[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return " + ".join(dtype for dtype, size in held.most_common() if size >= held.total() / 100)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compress.evaluation.measure",
        description="Measure the speed and memory of a model that is alone in a fresh process.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of a line of text"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--memory", help="load only as many blocks of a model as fit into this much memory, for example 90MB"
    )
    arguments = parser.parse_args()

    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the document alone
            import torch

            import compress

            if arguments.threads:
                torch.set_num_threads(arguments.threads)
            load = compress.load  # its imports belong to the baseline
            found = measure_model(
                lambda: load(arguments.folder, device=arguments.device, memory=arguments.memory),
                arguments.device,
                arguments.prefill_tokens,
                arguments.decode_tokens,
                arguments.repetitions,
            )
    except CompressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(found.model_dump_json())
    else:
        decode = f", decode {found.decode}" if found.decode else ""
        print(f"prefill {found.prefill}{decode}, peak memory {found.peak_memory}")
    return 0


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as the command line does
    sys.exit(main())
