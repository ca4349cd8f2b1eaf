#!/usr/bin/env python
"""How fast compressed models decode and prefill, beside the dense model in transformers and llama.cpp.

All rows of a model and a number of threads are timed in one run of `compress.evaluation.bench`: each in a
process of its own, taking turns, so that a busy machine hits all of them alike.

    python scripts/benchmarks/decode.py [--models demo random] [--threads 1 2] [--activation-bits 16 8]

- dense: bfloat16, as transformers runs it;
- ours: round-to-nearest at 4 bits in groups of 64; the head (of the demo model also the token table, which is
  the same) at 8 bits;
- llama.cpp: Q4_0 by its own quantizer, made of the same dense weights. It runs where llama-cpp-python is
  installed: here, or in ``--llama-cpp FOLDER``, which ``pip install --no-deps --target FOLDER
  llama-cpp-python diskcache`` has filled. On processors with AMX its own build crashes; give it
  ``CMAKE_ARGS="-DGGML_NATIVE=OFF"`` and the instructions to use, such as ``-DGGML_AVX512=ON
  -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON``. Where it is not, its rows are left out and a line says so.

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import Sheet, compressed, dense_model, parser
from elsewhere import Elsewhere
from llama_files import gguf_file
from streaming import write_model

from compress.evaluation.bench import Bench, Contestant, TimedModel, bench
from compress.evaluation.timed import Settings
from compress.export.run import WEIGHTS

# The shape of TinyLlama.
RANDOM_LAYERS = 22
RANDOM = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
STEP = {"method": "rtn", "bits": 4, "group_size": 64}
HEAD = {"demo": {"embedding_bits": 8}, "random": {"lm_head_bits": 8}}
NAMES = {"demo": "SmolLM2-135M", "random": "random Llama, 1.1 B"}


def random_model(folder: Path) -> Path:
    """The random model in bfloat16, made once in ``folder``."""
    output = folder / "random"
    if not (output / "tokenizer.json").exists():  # which is written last
        write_model(output, RANDOM_LAYERS, RANDOM)
    return output


DENSE: dict[str, Callable[[Path], Path]] = {"demo": dense_model, "random": random_model}


def contestants(kind: str, threads: int, folder: Path, arguments: argparse.Namespace) -> Iterator[Contestant]:
    """The rows of one model; the dense one is the first, which the others are compared with."""
    dense = DENSE[kind](folder)
    yield Contestant("dense, bfloat16", dense, Settings(threads=threads))
    ours = folder / f"{kind}-int4"
    compressed(ours, dense, [{**STEP, **HEAD[kind]}])
    for bits in arguments.activation_bits:
        name = "4 bits, head 8" + (", inputs 8" if bits == 8 else "")
        yield Contestant(name, ours, Settings(threads=threads, kernel=arguments.kernel, activation_bits=bits))
    if find_spec("llama_cpp"):  # --llama-cpp is on the path by now
        file = gguf_file(dense, folder, "Q4_0", arguments.llama_cpp)
        yield Elsewhere("llama.cpp Q4_0", file, Settings(threads=threads), "gguf", arguments.llama_cpp)
    else:
        print("llama-cpp-python is not here, so its rows are left out (see --help).", file=sys.stderr)


def size(path: Path) -> int:
    """Bytes of the weights: of a GGUF file, or of those in a folder."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in WEIGHTS]
    return sum(file.stat().st_size for file in files)


def figures(row: TimedModel, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"size": {"value": size(path), "unit": "bytes"}}
    if path.is_dir():  # that of llama.cpp has torch in it for nothing
        found["memory"] = row.peak_memory.model_dump(mode="json")
    for kind, times in (("prefill", row.prefill), ("decode", row.decode)):
        if times is None:  # it does not generate
            continue
        found[kind] = times.speed.model_dump(mode="json")
        if times.ratio is not None:
            found[f"{kind}_ratio"] = times.ratio.model_dump(mode="json")
    return found


def main() -> None:
    options = parser(__doc__, "decode")
    options.add_argument("--models", nargs="+", default=["demo", "random"], choices=list(DENSE))
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--activation-bits", type=int, nargs="+", default=[16], choices=[16, 8])
    options.add_argument("--kernel", default="auto", help="of ours")
    options.add_argument("--prefill-tokens", type=int, default=512)
    options.add_argument("--decode-tokens", type=int, default=64)
    options.add_argument("--repetitions", type=int, default=9)
    options.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where pip --target put it")
    arguments = options.parse_args()
    if arguments.llama_cpp:
        sys.path.append(str(arguments.llama_cpp))
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    sheet = Sheet(arguments, "decode")
    for kind in arguments.models:
        for threads in arguments.threads:
            rows = list(contestants(kind, threads, sheet.folder, arguments))
            title = f"{NAMES[kind]}, {threads} thread{'s' if threads > 1 else ''}"
            found = timed(f"{kind}-{threads}", rows, sheet.folder, arguments)
            for row, contestant in zip(found.models, rows, strict=True):
                measured = {
                    "figures": figures(row, contestant.folder),
                    "facts": {"kernel": row.kernel},
                }
                sheet.row(f"{title}: {row.name}", lambda measured=measured: measured)
    sheet.show()


def timed(name: str, rows: list[Contestant], folder: Path, arguments: argparse.Namespace) -> Bench:
    """The rows timed side by side, as far as that has not been done yet."""
    file = folder / f"{name}.bench.json"
    if file.exists():
        found = Bench.model_validate_json(file.read_text())
        if [row.name for row in found.models] == [row.name for row in rows]:
            return found

    def progress(text: str, share: float) -> None:
        print(f"{name}: {text} {share:.0%}", file=sys.stderr, flush=True)

    sizes = (arguments.prefill_tokens, arguments.decode_tokens, arguments.repetitions)
    found = bench(rows, *sizes, progress)
    file.write_text(found.model_dump_json())
    return found


if __name__ == "__main__":
    main()
