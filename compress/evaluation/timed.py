"""One model in a process of its own, timed whenever it is asked: the child of `compress.evaluation.measure`.

    python -m compress.evaluation.timed FOLDER SETTINGS

loads a folder, writes one line of JSON when it is ready, and then answers each line of stdin with one of
stdout: ``["prefill", 512]`` and ``["decode", 64]`` with seconds, ``["joules"]`` with the energy of the
decodes so far, ``["state"]`` with memory and kernels. It ends with its stdin, so it does not outlive whoever
asks. Only a process that holds nothing else can tell how much memory a model takes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from compress.errors import CompressError
from compress.system.energy import EnergyMeter
from compress.system.memory import peak_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT_TOKENS = 32
"""Tokens in the prompt before a decode."""


class Settings(BaseModel):
    """How a model is loaded and run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: str = Field("auto", description="auto, reference, cpu, or cpu: and a path")
    activation_bits: Literal[16, 8] = Field(16, description="bits of the inputs of packed linears")
    head_bits: PositiveInt | None = Field(None, description="bits that a dense head is rounded to")
    memory: str | int | None = Field(None, description="largest size of a model that is stored in blocks")
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of what is not packed; None: as it is stored"
    )
    threads: PositiveInt | None = Field(None, description="None: torch decides")

    def load(self, folder: str | Path) -> PreTrainedModel:
        """The model of a folder, loaded and run in this way by this process.

        With ``auto``, a model without packed weights runs as stock transformers runs it, so that what is
        packed is compared with what users have today. A kernel that is named runs in any case.
        """
        import compress
        from compress.evaluation.foreign import Foreign, open_any

        opened = open_any(Path(folder))
        if isinstance(opened, Foreign):
            return opened.load(self.device, self.dtype)
        given = self.model_dump(exclude={"threads"})
        packed = self.head_bits is not None or "quantization_config" in opened.config
        if self.kernel == "auto" and not packed:
            given["kernel"] = "reference"
        return compress.load(folder, **given)


class Timed:
    """A model in this process, which should hold nothing else.

    Args:
        load: loads it.
        device: where it is.

    Attributes:
        longest: the most tokens it takes.
        generates: whether it generates text.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], device: str = "cpu") -> None:
        import torch
        import transformers.generation  # noqa: F401  every model needs it, so it belongs to the baseline

        from compress.engine.skeleton import longest_input

        self._device = torch.device(device)
        self._meter, self._joules = EnergyMeter(), list[float]()
        if self._device.type == "cuda":
            torch.cuda.init()
        self._baseline = peak_memory()
        self._model = load().eval()
        self.longest = longest_input(self._model)
        self.generates = bool(self._model.can_generate())

    def prefill(self, tokens: int) -> float:
        """Seconds of a forward pass over a prompt.

        If the model allows it, the head runs on the last position only, as in generation.
        """
        wanted: dict[str, Any] = {"use_cache": True} if self.generates else {}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            wanted["logits_to_keep"] = 1
        ids = self._token_ids(tokens)
        return self._seconds(lambda: self._model(input_ids=ids, **wanted))

    def decode(self, tokens: int) -> float:
        """Seconds in which so many tokens are generated greedily after a short prompt, which is not timed.

        Its energy is kept for `joules`.
        """
        import torch

        model: Any = self._model
        with torch.inference_mode():
            output = model(input_ids=self._token_ids(self.prompt_tokens), use_cache=True)

        def generate() -> None:
            nonlocal output
            for _ in range(tokens):
                token = output.logits[:, -1:].argmax(-1)
                # transformers 5.24 renamed it and warns about the old name, which 5.40 removes.
                cache = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118
                output = model(input_ids=token, use_cache=True, **{cache: output[cache]})

        before = self._meter.read() if self._device.type == "cpu" else []
        seconds, joules = self._seconds(generate), self._meter.since(before)
        self._joules += [] if joules is None else [joules / tokens]
        return seconds

    def joules(self) -> list[float]:
        """Joules per token of each decode so far; empty on a GPU, and where the machine does not tell."""
        return self._joules

    @property
    def prompt_tokens(self) -> int:
        """Tokens in the prompt before a decode."""
        return min(PROMPT_TOKENS, max(1, self.longest // 2))

    def state(self) -> dict[str, Any]:
        """Memory, kernels and machine, named as in `compress.report.scorecard.Measurement`."""
        import torch

        on_gpu = self._device.type == "cuda"
        return {
            "peak_resident_bytes": peak_memory(),
            "baseline_resident_bytes": self._baseline,
            "peak_device_bytes": torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            "threads": torch.get_num_threads(),
            "device": device_name(self._device),
            "kernel": kernels_of(self._model),
            "storage_dtype": storage_dtype(self._model),
        }

    def _token_ids(self, length: int) -> Tensor:
        return token_ids(self._model, length, self._device)

    def _seconds(self, work: Callable[[], object]) -> float:
        import torch

        def wait() -> None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        with torch.inference_mode():
            wait()
            start = time.perf_counter()
            work()
            wait()
            return time.perf_counter() - start


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


def serve(model: Timed, questions: TextIO, answers: TextIO) -> None:
    """Answer each line of ``questions`` with a line of ``answers``, after a first one about the model."""

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({name: getattr(model, name) for name in ("longest", "generates", "prompt_tokens")})
    for line in questions:
        what, *arguments = json.loads(line)
        answer(getattr(model, what)(*arguments))


def main() -> int:
    # stdout is for answers alone, whatever libraries print, native ones included.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, settings = sys.argv[1], Settings.model_validate_json(sys.argv[2])
    try:
        import torch

        import compress

        compress.load  # noqa: B018  its imports belong to the baseline
        if settings.threads:
            torch.set_num_threads(settings.threads)
        serve(Timed(lambda: settings.load(folder), settings.device), sys.stdin, answers)
    except CompressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (BrokenPipeError, KeyboardInterrupt):  # whoever asked has gone, or is about to go
        return 1
    return 0


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as the command line does
    sys.exit(main())
