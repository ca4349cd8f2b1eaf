"""Interrupt run, evaluate and plan at random moments, and check how they end.

    python scripts/benchmarks/interrupts.py --trials 300

Every trial starts a command on a tiny random model and sends SIGINT to its process group, as a terminal does:
half of them within the first second, the others at any moment of its length, every fourth a second time
within 20 ms. The command must end with 130 and one sentence, or be done. A run is resumed by the next trial;
its output must be absent, or equal to that of a run that was never interrupted. Trials that were done are
kept in ``out/bench-interrupts/trials.jsonl`` and not done again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import Sheet, parser, write_recipe

from compress.system.files import file_sha256

STEPS = [{"method": "gptq", "bits": 4, "group_size": 32}]
WORDS = 200
DOUBLED_WITHIN = 0.02
"""Seconds between the two signals of a doubled interrupt, at most."""


def write_model(folder: Path, layers: int = 6) -> Path:
    """A random Llama whose tokenizer knows ``w0`` to ``w199``, with a text to calibrate on beside it."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    tokens = {"vocab_size": WORDS + 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **tokens, num_attention_heads=4)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number + 2 for number in range(WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )
    choose = random.Random(0)
    text = " ".join(f"w{choose.randrange(WORDS)}" for _ in range(4000))
    folder.with_name("text.txt").write_text(text)
    return folder


class Bench:
    """The commands, how long they take when nobody interrupts them, and what a whole result holds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.output = folder, folder / "model", folder / "result"
        if not self.model.exists():
            write_model(self.model)
        text = folder / "text.txt"
        recipe = write_recipe(
            *(folder / "recipe.yaml", self.model, STEPS),
            calibration={"source": str(text), "nsamples": 8, "seqlen": 64},
        )
        self.commands: dict[str, list[Any]] = {
            "run": ["run", recipe, "-o", self.output, "--resume"],
            "evaluate": ["evaluate", self.model, "--text", text, "--context", "64", "--windows", "2"],
            "plan": ["plan", self.model, recipe],
        }
        for left in (self.output, self.output.with_name(f".{self.output.name}.partial")):
            shutil.rmtree(left, ignore_errors=True)
        self.lengths = {name: self.length(name) for name in self.commands}
        self.whole = self.files()
        shutil.rmtree(self.output)

    def start(self, name: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own; unlike a background job it heeds Ctrl-C."""
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("compress-model")), *map(str, self.commands[name])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def length(self, name: str) -> float:
        """Seconds that a command takes undisturbed."""
        began = time.monotonic()
        started = self.start(name)
        _, errors = started.communicate()
        if started.returncode:
            sys.exit(f"{name} fails without being interrupted: {errors}")
        return time.monotonic() - began

    def files(self) -> dict[str, str]:
        """The hash of every file of the output that decides what the model computes."""
        names = json.loads((self.output / "compression.json").read_text())["result"]["files"]
        return {name: file_sha256(self.output / name) for name in names}

    def trial(self, number: int) -> dict[str, Any]:
        """Interrupt one command once or twice, and say how it ended."""
        choose = random.Random(number)
        name = list(self.commands)[number % len(self.commands)]
        early = number // len(self.commands) % 2 == 0
        moment = choose.uniform(*((0.0, 1.0) if early else (1.0, max(1.5, self.lengths[name]))))
        second = choose.uniform(0.0, DOUBLED_WITHIN) if choose.random() < 0.25 else None
        started = self.start(name)
        time.sleep(moment)
        send(started)
        if second is not None:
            time.sleep(second)
            send(started)
        _, errors = started.communicate()
        row = {"number": number, "command": name, "early": early, "moment": moment, "second": second}
        verdict = judged(started.returncode, errors)
        if name == "run" and self.output.exists():
            verdict = verdict if self.files() == self.whole else "failures"
            shutil.rmtree(self.output)
        return row | {"code": started.returncode, "verdict": verdict, "errors": errors[-3000:]}


def send(started: subprocess.Popen[str]) -> None:
    """Send SIGINT to the process group of a command, if it has not ended."""
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGINT)


def judged(code: int, errors: str) -> str:
    """The column in which a trial counts, by the exit code and what was written to stderr."""
    sentences = sum(line.startswith("Error: ") for line in errors.splitlines())
    if code == 130 and sentences == 1 and errors.rstrip().endswith(".") and "Traceback" not in errors:
        return "interrupted"
    if code == 0 and not sentences and "Traceback" not in errors:
        return "done"
    ours = f"{os.sep}compress{os.sep}"
    return "before" if not sentences and ours not in errors else "failures"


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of the trials of one row."""
    counts = Counter(row["verdict"] for row in rows)
    doubled = sum(row["second"] is not None for row in rows)
    kinds = {name: counts[name] for name in ("interrupted", "done", "before", "failures")}
    return {key: {"value": n} for key, n in {"trials": len(rows), "doubled": doubled, **kinds}.items()}


def main() -> None:
    options = parser(__doc__, "interrupts")
    options.add_argument("--trials", type=int, default=300)
    arguments = options.parse_args()
    sheet = Sheet(arguments, "interrupts")
    file = sheet.folder / "trials.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    bench = Bench(sheet.folder)
    with file.open("a") as log:
        for number in sorted(set(range(arguments.trials)) - {row["number"] for row in rows}):
            rows.append(bench.trial(number))
            print(json.dumps(rows[-1]), file=log, flush=True)
    for name in bench.commands:
        for early, moment in ((True, "within the first second"), (False, "later")):
            these = [row for row in rows if (row["command"], row["early"]) == (name, early)]
            sheet.row(f"{name}, {moment}", lambda these=these: {"figures": figures(these)})
    sheet.show()


if __name__ == "__main__":
    main()
