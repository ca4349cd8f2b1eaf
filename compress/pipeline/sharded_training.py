"""Training an S3T ensemble: from a model and records to a model folder.

All work happens in a hidden folder beside the output, one file for each finished stage. A killed training
leaves only that folder behind, and the same command goes on with the first stage that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import compress
from compress.calibration.text.records import read_records, sequences
from compress.engine.config import config_of
from compress.engine.loading import load
from compress.engine.opening import open_checkpoint
from compress.engine.shape import ModelShape
from compress.engine.skeleton import check_positions, skeleton
from compress.engine.stream import StreamedModel
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput, CompressError
from compress.kernels.cpu.library import REFERENCE
from compress.method import StepContext
from compress.pipeline.artefact import check_output, write_model
from compress.pipeline.reload import PARITY, RESOLUTION
from compress.pipeline.workspace import Workspace
from compress.report.card import source_metadata, write_lineage
from compress.sources.find import ModelSource, find_model
from compress.storage.checkpoint import Checkpoint
from compress.storage.companions import companions
from compress.storage.draft import Draft
from compress.storage.lineage import (
    Lineage,
    LoaderTrial,
    Parent,
    ReloadCheck,
    Result,
    Step,
    now,
    read_lineage,
    versions,
)
from compress.storage.sharded import (
    KEY,
    Example,
    Served,
    Shard,
    Sharded,
    prefix_sha256,
    read_served,
    stage_folder,
    stage_name,
    write_examples,
    write_sharded,
)
from compress.system.device import check_device, computing_on, peak_device_memory
from compress.system.files import write_atomically
from compress.system.memory import peak_memory
from compress.system.progress import Progress
from compress.unlearning.parts.stages import (
    HowToTrainAStage,
    Trainee,
    kind_of,
    layer_groups,
    machine,
    reproducible,
    stage_seed,
)
from compress.unlearning.parts.training import whole_model
from compress.unlearning.s3t import (
    S3T,
    check_model,
    orders_of,
    partition,
    sequences_of,
    served,
    train_orders,
)

PROBE = (2, 24)
"""Rows and tokens of the check that the written folder computes what was trained."""


def _silent(text: str, share: float) -> None:
    """Report progress to nobody."""


def train(
    model: str,
    data: str,
    output: Path,
    options: S3T.Options,
    *,
    revision: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    resume: bool | None = None,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> Sharded:
    """Train an ensemble by S3T, and write it as a model folder.

    Args:
        model: folder, hub id or ``demo``.
        data: the training records (see `compress.calibration.text.records`).
        output: a folder that does not exist, is empty, or may be replaced (``overwrite``).
        options: of the method.
        revision: of a hub model.
        seed: of every random choice.
        device: where to compute.
        resume: True goes on with an interrupted training, False throws it away, None goes on if it is the
            same and refuses otherwise.
        overwrite: whether to replace the output if it is not empty.
        progress: told a text and the share that is done.

    Raises:
        BadInput: model, data, options and output do not fit each other.
        CompressError: the training diverged, or the written folder computes something else.
    """
    workspace = Workspace(output.absolute())
    output = workspace.output
    check_output(output, overwrite)
    check_device(device)
    if find_spec("peft") is None:
        raise BadInput("The method s3t needs peft: pip install 'compress-model[peft]'.")
    source = find_model(model, revision)
    if source.is_inside(output):
        raise BadInput(f"The output '{output}' holds the model to train; use another -o.")
    checkpoint = open_checkpoint(source.folder)
    shape = ModelShape.of(checkpoint)
    check_model(shape, options)
    examples, pad = _examples(source.folder, data, options.seqlen)
    longest = max(len(tokens) for example in examples.values() for tokens, _ in example.sequences)
    check_positions(skeleton(config_of(checkpoint)), longest, "use a smaller seqlen")
    priors = _priors(options.priors, examples) if options.priors is not None else None
    nothing, here = Served(prefix=[], sha256=prefix_sha256([])), machine(device)
    shards = [
        Shard(
            generation=0,
            slices=slices,
            orders=orders_of(slices, priors, options),
            dead=[],
            stages={},
            served=nothing,
            machine=here,
        )
        for slices in partition(list(examples), priors, options, seed)
    ]
    state = Sharded(
        base=checkpoint.sha256,
        options=options.model_dump(mode="json"),
        seed=seed,
        groups=layer_groups(shape.num_layers, options.slices),
        scaling=Trainee.scaling(options.rank),
        pad=pad,
        priors=priors,
        examples="records-0.jsonl",
        deleted=[],
        shards=shards,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with workspace.locked():
        workspace.tidy()
        check_output(output, overwrite)
        if resume is False:
            workspace.discard()
        lora = 4 * options.rank * sum(sum(sizes) for sizes in shape.linears().values())
        workspace.check_disk(2 * shape.nbytes + options.shards * options.orders * lora)
        with computing_on(device):
            return _train(state, here, examples, source, checkpoint, workspace, device, progress)


def _train(
    state: Sharded,
    here: dict[str, Any],
    examples: Mapping[str, Example],
    source: ModelSource,
    checkpoint: Checkpoint,
    workspace: Workspace,
    device: str,
    progress: Progress,
) -> Sharded:
    begun = workspace.folder.exists()
    workspace.enter(_fingerprint(state, here, examples, checkpoint))
    try:
        kept = workspace.folder / "machine.json"  # the stages that are there were trained with these threads
        if kept.exists():
            here = json.loads(kept.read_text())
        else:
            write_atomically(kept, json.dumps(here))
        started, stages = time.perf_counter(), workspace.folder / "stages"
        total = sum(len(prefixes(shard.orders)) for shard in state.shards)
        lessons = Lessons(state, examples, checkpoint, workspace.folder / "work", device, progress, total)
        with reproducible(here["threads"]):
            for number, shard in enumerate(state.shards):
                shard.machine = here
                shard.stages = lessons.train(number, shard, stages)
                shard.served = served(shard)
        seconds = time.perf_counter() - started
        workspace.clear_artefact()
        progress("writing the model", 0.0)
        _write(state, examples, source, checkpoint, workspace, lessons, seconds, begun)
    except BadInput:
        if not begun:
            workspace.discard()
        raise
    return state


def _fingerprint(
    state: Sharded, here: Mapping[str, Any], examples: Mapping[str, Example], checkpoint: Checkpoint
) -> dict[str, Any]:
    """What must be the same for an interrupted training to be continued."""
    data = repr([(each.id, each.sequences) for each in examples.values()])
    return {
        "compress-model": compress.__version__,
        "model": checkpoint.sha256,
        "options": {**state.options, "seed": state.seed, "priors": state.priors},
        "data": hashlib.sha256(data.encode()).hexdigest(),
        "machine": kind_of(here),
    }


class Lessons:
    """Trains stages of a state, with one base model in memory, which is read when it is needed first."""

    def __init__(
        self,
        state: Sharded,
        examples: Mapping[str, Example],
        checkpoint: Checkpoint,
        work: Path,
        device: str,
        progress: Progress,
        total: int,
    ) -> None:
        self.state, self.examples, self.checkpoint = state, examples, checkpoint
        self.work, self.device, self.progress = work, device, progress
        options = S3T.Options(**state.options).model_dump()  # with defaults of options that are new
        names = HowToTrainAStage.__dataclass_fields__.keys() & options.keys()
        self.how = HowToTrainAStage(**{name: options[name] for name in names})
        self.total, self.done = total, 0
        self._trainee: Trainee | None = None

    @property
    def trainee(self) -> Trainee:
        """The model that learns."""
        if self._trainee is None:
            streamed = StreamedModel(self.checkpoint, self.device, self.progress)
            whole = whole_model(streamed, self._context(self.state.seed))
            how = self.how
            self._trainee = Trainee(whole, self.state.groups, how.rank, how.gradient_checkpointing)
        return self._trainee

    def train(
        self, number: int, shard: Shard, folder: Path, orders: Sequence[Sequence[int]] | None = None
    ) -> dict[str, str]:
        """Train all orders of a shard, or other ones, below ``folder``: name of a stage -> sha256."""

        def learn(prefix: Sequence[int], earlier: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            name = stage_name(prefix)
            seed = stage_seed(self.state.seed, number, shard.generation, name)
            learned = sequences_of(shard.slices, shard.dead, prefix, self.examples)
            if not learned:
                raise CompressError(f"Nothing is left to train the stage {name} of shard {number} on.")
            label = f"shard {number}, stage {name}"
            found = self.trainee.learn(
                len(prefix) - 1, earlier, learned, self.state.pad, self.how, self._context(seed), label
            )
            shutil.rmtree(self.work, ignore_errors=True)
            return found

        before = self.done
        wanted = shard.orders if orders is None else orders
        found = train_orders(
            wanted, folder / stage_folder(number, shard.generation), learn, self._count(before)
        )
        self.done = before + len(prefixes(wanted))
        return found

    def _count(self, before: int) -> Callable[[int], None]:
        def count(finished: int) -> None:
            self.done = before + finished
            self.progress("training", self.done / max(1, self.total))

        return count

    def _context(self, seed: int) -> StepContext:
        def within(text: str, share: float) -> None:
            self.progress("training", (self.done + share) / max(1, self.total))

        draft = Draft(self.checkpoint, self.work)
        return StepContext(draft, None, seed, self.work, self.device, within)


def base_of(checkpoint: Checkpoint) -> Checkpoint:
    """The base model in the folder of an ensemble."""
    config = {key: value for key, value in checkpoint.config.items() if key != KEY}
    return Checkpoint(checkpoint.folder, config, checkpoint.tensors, checkpoint.sources)


def prefixes(orders: Sequence[Sequence[int]]) -> set[str]:
    """The names of the stages of orders, each once."""
    return {stage_name(order[:size]) for order in orders for size in range(1, len(order) + 1)}


def _examples(folder: Path, data: str, seqlen: int) -> tuple[dict[str, Example], int]:
    """The training records as they are learned, by id, and the token that fills up batches."""
    tokenizer = load_tokenizer(folder)
    records = read_records(data, "training")
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for piece in sequences(records, tokenizer, seqlen):
        found.setdefault(piece.id, []).append((piece.tokens, piece.labels))
    for record in records.entries:
        if record.id not in found:
            raise BadInput(f"The record '{record.id}' has too few tokens to learn from; leave it out.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {r.id: Example(r.id, r.hash, tuple(found[r.id])) for r in records.entries}, int(pad or 0)


def _priors(source: str, examples: Mapping[str, Example]) -> dict[str, float]:
    """The chance of each record to be deleted, from a JSON file."""
    path = Path(source).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"The priors '{source}' cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise BadInput(f"The priors '{source}' are not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise BadInput(f"The priors '{source}' are not a JSON object of ids and chances.")
    for name, chance in found.items():
        if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
            raise BadInput(f"The prior of '{name}' in '{source}' is {chance!r}, not a chance from 0 to 1.")
    if missing := [name for name in examples if name not in found]:
        raise BadInput(f"The priors '{source}' lack the record '{missing[0]}' ({len(missing)} are missing).")
    if strange := [name for name in found if name not in examples]:
        raise BadInput(f"The priors '{source}' name '{strange[0]}', which is not in the training data.")
    if not any(found.values()):
        raise BadInput(f"The priors '{source}' are all 0; without --priors all records are equally likely.")
    return {name: float(found[name]) for name in examples}


def _write(
    state: Sharded,
    examples: Mapping[str, Example],
    source: ModelSource,
    checkpoint: Checkpoint,
    workspace: Workspace,
    lessons: Lessons,
    seconds: float,
    resumed: bool,
) -> None:
    """Put the model folder together, check that it computes what was trained, and publish it."""
    folder, before = workspace.artefact, ModelShape.of(checkpoint)
    config = {**checkpoint.config, KEY: KEY}
    described = Checkpoint(checkpoint.folder, config, checkpoint.tensors, checkpoint.sources)
    recipe = {"model": source.id, "s3t": state.options, "seed": state.seed}
    files = write_model(described, source.folder, folder, recipe)
    shutil.copytree(workspace.folder / "stages", folder / KEY, copy_function=_link)
    write_examples(folder / KEY / state.examples, examples.values())
    written = open_checkpoint(folder)
    state.base = base_of(written).sha256
    write_sharded(folder, state)
    difference = _difference(folder, state, lessons)
    inherited, options = read_lineage(source.folder), S3T.Options(**state.options)
    lora = sum(file.stat().st_size for file in folder.glob(f"{KEY}/shard-*/*"))
    summary = (
        f"trained {options.shards} shards of {options.slices} slices in {options.orders} orders on "
        f"{len(examples)} records."
    )
    lineage = Lineage(
        name=workspace.output.name,
        created=now(),
        parent=Parent(
            id=source.id,
            revision=source.revision,
            sha256=checkpoint.sha256,
            bytes=before.nbytes,
            parameters=before.parameters,
            lineage=inherited and inherited.model_copy(update={"evaluations": []}),
        ),
        dtype=None,
        seed=state.seed,
        calibration=None,
        steps=[
            Step(
                method=S3T.name,
                family=S3T.family,
                paper=str(S3T.paper),
                options=state.options,
                summary=summary,
                details={"stages": lessons.total, "records": len(examples), "lora_bytes": lora},
                seconds=round(seconds, 3),
                peak_memory_bytes=peak_memory(),
                peak_device_memory_bytes=peak_device_memory(lessons.device),
                resumed=resumed,
            )
        ],
        result=Result(
            bytes=before.nbytes,
            predicted_bytes=before.nbytes,
            parameters=before.parameters,
            bits_per_parameter=8 * before.nbytes / before.parameters,
            layers=before.num_layers,
            loads_with=str(ModelShape.of(written).loads_with),
            files=files,
        ),
        reload=ReloadCheck(
            loaded_by="compress-model",
            max_difference=difference,
            tokens=PROBE[0] * PROBE[1],
            promised=LoaderTrial(loader=f"compress-model {compress.__version__}", difference=difference),
        ),
        left_out=companions(source.folder, {where.file for where in checkpoint.sources.values()}).left_out,
        card=source_metadata(source.folder),
        device=lessons.device,
        versions=versions(),
    )
    write_lineage(folder, lineage)
    workspace.publish()


def _link(source: str, target: str) -> None:
    """Give a file a second name; copy it where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@torch.no_grad()
def _difference(folder: Path, state: Sharded, lessons: Lessons) -> float:
    """The largest difference between the logits of the written folder and those that peft computes.

    Raises:
        CompressError: it is more than rounding.
    """
    lessons.progress("reloading the model", 0.0)
    loaded = load(folder, lessons.device, torch.float32, kernel=REFERENCE)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, loaded.config.vocab_size, PROBE, generator=generator).to(lessons.device)
    trainee, expected = lessons.trainee, []
    trainee.model.eval()
    for tensors in read_served(folder, state):
        trainee.show(tensors)
        expected.append(trainee.model(input_ids=tokens).logits)
    mean = torch.stack(expected).mean(0)
    difference = float((loaded(input_ids=tokens).logits - mean).abs().max())
    if not difference <= PARITY * float(mean.std(correction=0)) + RESOLUTION * float(mean.abs().max()):
        raise CompressError(
            f"The written model does not compute what was trained (logits differ by {difference:.3g}); "
            "nothing was published."
        )
    return difference
