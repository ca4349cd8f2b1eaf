"""Speed and memory of one model, alone in a fresh process.

    python -m compress.evaluation.measure FOLDER --json

loads the folder with :func:`compress.load`, times a prefill and a greedy decode at batch size 1, and prints
one JSON document. :func:`measure` runs exactly that as a child process, because only a process that holds
nothing else can say how much memory a model takes.
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
from typing import TYPE_CHECKING

from compress.errors import BadInput, CompressError
from compress.report.scorecard import Figure, Measurement
from compress.system.memory import peak_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT_TOKENS = 32
"""Length of the prompt before a decode."""

BUDGET_SECONDS = 8.0
"""For the prefill with its warm-up, and again for the decode. What does not fit is cut: of the prefill the
repetitions first, because its speed depends on its length, and of the decode the tokens first."""

FEWEST_DECODE_TOKENS = 4


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
        folder: what ``compress.load`` takes; the model keeps the dtype it is stored in.
        device: a torch device.
        prefill_tokens, decode_tokens: wanted lengths in tokens; the result states those really timed.
        repetitions: timed runs of each, after an untimed one.
        threads: of torch in the child; by default torch decides.
        memory: bytes that a model stored in blocks is loaded in.

    Raises:
        BadInput: the child refused its input (it exited with code 2).
        CompressError: the child failed; the message carries the last line it wrote to stderr.
    """
    if min(prefill_tokens, decode_tokens, repetitions, threads or 1) < 1:
        raise BadInput("Tokens, repetitions and threads of a measurement are at least 1.")
    # -P: a folder named "compress" where the user stands must not be taken for this package.
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
    reason = lines[-1] if lines else "it wrote no reason"
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
    """Load a model and measure it in this process, which should hold nothing else."""
    import torch
    import transformers.generation  # noqa: F401  what every model needs belongs to the baseline

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.init()
    baseline = peak_memory()
    with torch.inference_mode():
        model = load().eval()
        prefill_seconds, prefill_tokens = time_prefill(model, device, prefill_tokens, repetitions)
        decoded = {}
        if model.can_generate():
            decode_seconds, decode_tokens = time_decode(model, device, decode_tokens, repetitions)
            decoded = {
                "decode": speed(decode_tokens, decode_seconds),
                "decode_tokens": decode_tokens,
                "decode_repetitions": len(decode_seconds),
            }
    return Measurement(
        peak_resident_bytes=peak_memory(),
        baseline_resident_bytes=baseline,
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        prefill=speed(prefill_tokens, prefill_seconds),
        prefill_tokens=prefill_tokens,
        prefill_repetitions=len(prefill_seconds),
        threads=torch.get_num_threads(),
        device=device_name(device),
        kernel=kernel_name(model),
        storage_dtype=storage_dtype(model),
        **decoded,
    )


def time_prefill(
    model: PreTrainedModel, device: torch.device, tokens: int, repetitions: int
) -> tuple[list[float], int]:
    """Seconds of each repetition, and the length of the prompt.

    As in generation, the head runs on the last position only where the model allows that.
    """
    from compress.engine.skeleton import longest_input

    wanted = {"use_cache": True} if model.can_generate() else {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        wanted["logits_to_keep"] = 1
    tokens = min(tokens, longest_input(model))

    def prefill(length: int) -> float:
        ids = token_ids(model, length, device)
        return seconds(lambda: model(input_ids=ids, **wanted), device)

    probe = min(PROMPT_TOKENS, tokens)
    prefill(probe)  # the first call of all pays for allocations and caches
    per_token = prefill(probe) / probe
    tokens = max(probe, min(tokens, int(BUDGET_SECONDS / 2 / per_token)))
    return repeat(lambda: prefill(tokens), repetitions), tokens


def time_decode(
    model: PreTrainedModel, device: torch.device, tokens: int, repetitions: int
) -> tuple[list[float], int]:
    """Seconds of each repetition, and how many tokens each one generated after a short prompt."""
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
                # transformers renamed it in 5.24 and warns of the old name, which goes in 5.40.
                cache = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118
                output = model(input_ids=token, use_cache=True, **{cache: output[cache]})

        return seconds(generate, device)

    probe = min(FEWEST_DECODE_TOKENS, tokens)
    per_token = decode(probe) / probe
    tokens = max(probe, min(tokens, int(BUDGET_SECONDS / (repetitions + 1) / per_token)))
    return repeat(lambda: decode(tokens), repetitions), tokens


def repeat(run: Callable[[], float], repetitions: int) -> list[float]:
    """Seconds of as many runs as repetitions and budget allow, after a warm-up if there is time for two."""
    timed = [run()]
    while len(timed) <= repetitions and sum(timed) + timed[-1] <= BUDGET_SECONDS:
        timed.append(run())
    return timed[1:] or timed


def seconds(work: Callable[[], object], device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def speed(tokens: int, timed: list[float]) -> Figure:
    """Tokens per second: the median with the interquartile range (none with fewer than three runs)."""
    rates = sorted(tokens / each for each in timed)
    low, median, high = None, statistics.median(rates), None
    if len(rates) >= 3:
        low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
        low, high = min(low, median), max(high, median)  # equal rates: interpolation may round past them
    return Figure(value=median, low=low, high=high, unit="tokens/s", spread="interquartile range")


def token_ids(model: PreTrainedModel, length: int, device: torch.device) -> Tensor:
    """[1, length]: drawn once for all, since what the tokens say does not change what they cost."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, length), generator=generator).to(device)


def kernel_name(model: PreTrainedModel) -> str:
    """What ran the layers: the ``kernel`` each low-bit module names, ``torch`` where none does."""
    names = {getattr(module, "kernel", None) for module in model.modules()}
    return " + ".join(sorted(name for name in names if isinstance(name, str))) or "torch"


def storage_dtype(model: PreTrainedModel) -> str:
    """The dtypes that hold at least a hundredth of the model's bytes in memory, largest share first."""
    held = Counter()
    for tensor in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values():
        held[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return " + ".join(dtype for dtype, size in held.most_common() if size >= held.total() / 100)


def device_name(device: torch.device) -> str:
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
        prog="python -m compress.evaluation.measure", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document (the default is a line)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", help="load no more blocks of a model than fit, such as 90MB")
    arguments = parser.parse_args()

    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries the one document
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
