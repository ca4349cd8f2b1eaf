"""Bits for every linear, chosen by measured sensitivity: for a recipe, or for a step that asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress.calibration.text.prepare import prepare_calibration
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.kernels.codes.packing import BITS
from compress.method import Method, MethodOptions, StepContext
from compress.pipeline.plan import open_model
from compress.pipeline.recipe import Recipe
from compress.quantization.parts.choices import Mix
from compress.quantization.parts.ladder import CodesLadder, Ladder, Tables
from compress.quantization.parts.layout import plan_layout, plan_packed
from compress.quantization.parts.mixing import WINDOWS, mix, pieces, split
from compress.quantization.parts.options import WeightOptions
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import Format
from compress.storage.formats.mlx import SIZES, MLXFormat, check_architecture
from compress.system.device import check_device, computing_on
from compress.system.files import write_atomically
from compress.system.progress import Progress

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that a step may give to a linear."""

ENTRY = 300
"""Bytes that a tensor may take in the heads of safetensors files and in their index; names are shorter."""

OURS, COMPRESSED_TENSORS, MLX = "compress-model", "compressed-tensors", "mlx"
"""Who is to load the result: only we, so that every tensor is packed in any width; other programs too;
or mlx-lm, when the result has been exported."""


def mix_bits(
    method: Method, options: MethodOptions, model: Checkpoint, context: StepContext
) -> MethodOptions:
    """The options of a step, with the bits of every linear chosen if the step asks for that (``mix``).

    What was chosen is kept in the step's folder, so that a run that was interrupted goes on with it.

    Raises:
        BadInput: see `mix`.
    """
    if not isinstance(options, WeightOptions) or not options.mix:
        return options
    chosen = context.folder / "mixed.json"
    if chosen.exists():
        return type(options).model_validate_json(chosen.read_text(encoding="utf-8"))
    room = context.folder / "mixing"
    room.mkdir(exist_ok=True)
    shape = ModelShape.of(model)
    # Every width is measured as it will be stored beside the others.
    symmetric = plan_layout(shape, options).default.symmetric
    options = options.model_copy(update={"mix": False, "symmetric": symmetric})
    ladder = CodesLadder(shape, options, WIDTHS, calibrated=method.needs_calibration)
    streamed = StreamedModel(model, context.device, context.progress)
    windows = pieces(context.calibration, WINDOWS, streamed.anatomy.kind == "decoder")
    found = mix(streamed, ladder, plan_packed(shape, options).nbytes, windows, context.seed, room)
    options = ladder.options_for(found.kinds)
    write_atomically(chosen, options.model_dump_json())
    shutil.rmtree(room)  # the Fisher information is as large as the model
    return options


@dataclass(frozen=True)
class Budget:
    """How large a model may become: one of the two is given.

    Attributes:
        nbytes: of all tensors, or with ``file`` of the file that holds them.
        bits: of all tensors, per parameter of the model.
        file: whether the head of the file counts as well.
    """

    nbytes: int | None = None
    bits: float | None = None
    file: bool = False

    def of(self, shape: ModelShape, tensors: int) -> int:
        """Bytes that all tensors may take.

        Args:
            shape: of the dense model.
            tensors: number of tensors of the result.
        """
        if self.nbytes is None:
            assert self.bits is not None
            return int(self.bits * shape.parameters / 8)
        return self.nbytes - (ENTRY * tensors if self.file else 0)


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a recipe.

    Attributes:
        mix: the types, with prediction and measurement.
        recipe: the recipe with these types.
        loads_with: who can load the result.
    """

    mix: Mix
    recipe: Recipe
    loads_with: str


@dataclass(frozen=True)
class ChosenForGGUF:
    """What was chosen for a GGUF file.

    Attributes:
        mix: the types, with prediction and measurement; its bytes are at least those of the file.
        types: name of a tensor in the file -> type.
    """

    mix: Mix
    types: dict[str, str]


def choose_types(
    recipe: Recipe,
    target: str,
    kinds: Sequence[str] | None,
    budget: Budget,
    folder: Path,
    *,
    device: str = "cpu",
    progress: Progress = lambda text, share: None,
) -> Chosen:
    """Choose the type of every tensor for the one quantization step of a recipe, in ``folder`` (see `mix`).

    Args:
        recipe: of one quantization step.
        target: `OURS`, `COMPRESSED_TENSORS` or `MLX`.
        kinds: types to choose from; None for all that the target has.
        budget: how large the result may be.
        folder: for work; empty, or of an earlier choice for the same recipe, target and types.
        device: where to compute.
        progress: called with a text and the share that is done.

    Raises:
        BadInput: the recipe is another one, a type is none of the target's, or as `mix`.
    """
    method, options = _step(recipe)
    widths = [_width(kind) for kind in kinds] if kinds is not None else list(WIDTHS)
    check_device(device)
    checkpoint = open_model(recipe)[1]
    shape = ModelShape.of(checkpoint)
    tables: Tables = "all"
    stored_as = None
    if target == MLX:
        check_architecture(shape.anatomy.model_type)
        if options.group_size not in ("auto", *SIZES) or not set(widths) <= set(MLXFormat.widths):
            raise BadInput(
                f"mlx has codes of {', '.join(map(str, MLXFormat.widths))} bits in groups of "
                f"{', '.join(map(str, SIZES))}; choose from these with --types and "
                f"--set steps.0.group_size={SIZES[0]}."
            )
        stored_as = as_in_mlx
    elif target == COMPRESSED_TENSORS:
        # The library reads several widths only with fixed zero points, and no packed embedding beside them.
        if options.symmetric is False or options.format != COMPRESSED_TENSORS:
            raise BadInput(
                "Several widths load in compressed-tensors only if they are symmetric and in its own format; "
                f"leave out 'symmetric' and 'format', or use --format {OURS}."
            )
        tables = "head"
    symmetric = options.symmetric if options.symmetric is not None else tables == "head"
    options = options.model_copy(update={"mix": False, "symmetric": symmetric})
    ladder = CodesLadder(
        *(shape, options, widths), tables=tables, stored_as=stored_as, calibrated=method.needs_calibration
    )
    memory = budget.of(shape, ladder.tensors)
    found = _mix(recipe, checkpoint, ladder, memory, folder, device, progress)
    options = ladder.options_for(found.kinds)
    chosen = recipe.model_copy(update={"steps": [(method, options)]})
    if target == MLX:
        return Chosen(found, chosen, "mlx-lm, once 'export --format mlx' has written it")
    planned = plan_packed(shape, options)
    return Chosen(replace(found, nbytes=planned.nbytes), chosen, str(planned.loads_with))


def choose_for_gguf(
    recipe: Recipe,
    kinds: Sequence[str] | None,
    budget: Budget,
    folder: Path,
    *,
    device: str = "cpu",
    progress: Progress = lambda text, share: None,
) -> ChosenForGGUF:
    """Choose the GGUF type of every tensor of a recipe's model.

    Args and errors are as for `choose_types`. Of the recipe only the model and the calibration count, because
    a file's blocks are rounded when it is written.
    """
    from compress.quantization.parts.gguf_ladder import GGUFLadder

    _step(recipe)
    check_device(device)
    checkpoint = open_model(recipe)[1]
    shape = ModelShape.of(checkpoint)
    ladder = GGUFLadder(shape, kinds, folder / "blocks")
    memory = replace(budget, file=False).of(shape, 0)  # all that is in the file counts anyway
    found = _mix(recipe, checkpoint, ladder, memory, folder, device, progress)
    return ChosenForGGUF(found, ladder.types_for(found.kinds))


def as_in_mlx(form: Format) -> Format:
    """What `compress.export.mlx` writes for a form."""
    return MLXFormat(form.bits, form.group_size)


def _step(recipe: Recipe) -> tuple[Method, WeightOptions]:
    """The one step of a recipe.

    Raises:
        BadInput: there are others, or its widths cannot be chosen.
    """
    if len(recipe.steps) != 1 or not isinstance(recipe.steps[0][1], WeightOptions):
        raise BadInput(
            "Types can be chosen for a recipe of one step, whose method takes bits and a group size (rtn, "
            "hqq, awq, gptq or apiq); run other steps first, and start from their result."
        )
    method, options = recipe.steps[0][0], recipe.steps[0][1]
    if options.set:
        raise BadInput(
            "The bits of every tensor are chosen here, so 'set' does not apply; leave the option out."
        )
    return method, options


def _mix(
    recipe: Recipe,
    checkpoint: Checkpoint,
    ladder: Ladder,
    memory: int,
    folder: Path,
    device: str,
    progress: Progress,
) -> Mix:
    """Prepare the recipe's text, and choose types by what is measured on it."""
    with computing_on(device):
        windows = prepare_calibration(
            recipe.calibration, recipe.seed, checkpoint, device, progress, recipe.text_size
        )
        model = StreamedModel(checkpoint, device, progress)
        measured, held_out = split(windows, model.anatomy.kind == "decoder")
        return mix(model, ladder, memory, measured, recipe.seed, folder, held_out=held_out)


def _width(kind: str) -> int:
    if not kind.isdecimal() or int(kind) not in BITS:
        raise BadInput(f"There are no codes of type '{kind}'; use {', '.join(map(str, BITS))}.")
    return int(kind)
