"""compress-model inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from compress.commands.common import common_options, make_table, print_json, revision_option, stdout


@click.command()
@click.argument("model")
@revision_option
@common_options
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show where MODEL comes from, its shapes, and how many bytes each part takes."""
    from compress.anatomy import layer_shapes
    from compress.engine.opening import open_checkpoint
    from compress.engine.shape import ModelShape
    from compress.sources.find import find_model, is_gguf
    from compress.sources.gguf import LOADS_WITH, gguf_checkpoint
    from compress.storage.checkpoint import Checkpoint
    from compress.storage.formats.stacks import STACKS, sizes
    from compress.storage.lineage import read_lineage

    file = Path(model).expanduser()
    checkpoint: Checkpoint
    if is_gguf(file) and revision is None:  # its header says all, so nothing is unpacked
        checkpoint = gguf = gguf_checkpoint(file)
        shape = ModelShape(gguf.config, gguf.packed, file)
        lineage = read_lineage(file)
        loads_with = LOADS_WITH
    else:
        folder = find_model(model, revision).folder
        checkpoint = open_checkpoint(folder)
        shape = ModelShape.of(checkpoint)
        lineage = read_lineage(folder)
        loads_with = str(shape.loads_with)
    parts = bytes_per_part(shape)
    method = shape.config.get("quantization_config", {}).get("quant_method")
    steps = sizes(checkpoint) if method in STACKS else []
    layers = [vars(layer) for layer in layer_shapes(shape.pretrained_config)]
    bits, stored = 8 * shape.nbytes / shape.parameters, dtypes(shape)
    document = {
        "model": model,
        "folder": str(checkpoint.folder),
        "architecture": shape.config.get("architectures"),
        "model_type": shape.config.get("model_type"),
        "parameters": shape.parameters,
        "bytes": shape.nbytes,
        "bits_per_parameter": bits,
        "loads_with": loads_with,
        "sizes": vars(shape.sizes),
        "layers": layers,
        "bytes_per_part": parts,
        "loads_in": {"smallest": steps[0], "largest": steps[-1], "sizes": len(steps)} if steps else None,
        "dtypes": stored,
        "lineage": lineage.model_dump(mode="json") if lineage else None,
    }
    if as_json:
        print_json(document)
        return
    click.echo(f"{model}: {shape.config['model_type']}, loads with {loads_with}")
    if lineage is not None and lineage.reload is not None and lineage.reload.promised is not None:
        click.echo(f"{lineage.reload.promised}")
    if lineage is not None and lineage.exported is not None:
        click.echo(f"exported as {lineage.exported.target}; {lineage.exported.verification}")
    click.echo(", ".join(f"{key} {value}" for key, value in vars(shape.sizes).items()))
    if shape.is_pruned:
        click.echo(f"layers differ: {spread(layers)}")
    table = make_table("part", "MB", "share")
    for name, nbytes in parts.items():
        table.add_row(name, f"{nbytes / 1e6:,.1f}", f"{nbytes / shape.nbytes:.1%}")
    table.add_row("all", f"{shape.nbytes / 1e6:,.1f}", f"{bits:.2f} bits per parameter")
    stdout().print(table)
    click.echo("stored as " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in stored.items()))
    if steps:
        click.echo(
            f"loads in any memory from {steps[0] / 1e6:,.1f} MB to {steps[-1] / 1e6:,.1f} MB "
            f"({len(steps):,} sizes)"
        )
    if lineage is None:
        click.echo("No lineage: compress-model did not write this model.")
        return
    for run in lineage.chain():
        parent = run.parent
        click.echo(
            f"{run.name}: made from {parent.id} (sha256 {parent.sha256[:16]}…) on "
            f"{run.created:%Y-%m-%d %H:%M} UTC"
        )
        for step in run.steps:
            options = ", ".join(f"{key}={value}" for key, value in step.options.items())
            click.echo(f"  {step.method} ({options}): {step.summary}")
    click.echo(f"{len(lineage.evaluations)} evaluation(s) on record")


def spread(layers: list[dict[str, int]]) -> str:
    """The widths of layers that differ, in words: ``num_key_value_heads 1 to 3, ...; no MLP in layer 4``."""
    widths, gone = [], []
    for name in layers[0]:
        sizes = [layer[name] for layer in layers if layer[name]]
        widths.append(f"{name} {min(sizes)} to {max(sizes)}" if sizes else f"{name} 0")
    for block, name in (("attention", "num_attention_heads"), ("MLP", "intermediate_size")):
        if missing := [str(index) for index, layer in enumerate(layers) if not layer[name]]:
            gone.append(f"no {block} in layers {', '.join(missing)}")
    return "; ".join([", ".join(widths), *gone])


def bytes_per_part(shape: Any) -> dict[str, int]:
    """Bytes of embeddings, attention, MLP, norms and the rest, packed tensors counted where they belong."""
    from compress.storage.adapter import is_adapter

    anatomy = shape.anatomy
    head = f"{anatomy.head}." if anatomy.head else None
    roles = {
        "attention": {anatomy.query, anatomy.key, anatomy.value, anatomy.attention_output},
        "mlp": {anatomy.up, anatomy.down} | ({anatomy.gate} if anatomy.gate else set()),
        "norms": set(anatomy.norm_paths),
    }
    parts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head", "adapter", "other"), 0)
    layers = anatomy.in_model(anatomy.layers) + "."
    for name, info in shape.tensors.items():
        if is_adapter(name):
            part = "adapter"
        elif name.startswith(layers):
            path = name.removeprefix(layers).partition(".")[2].rpartition(".")[0]
            part = next((role for role, paths in roles.items() if path in paths), "other")
        elif head and name.startswith(head):
            part = "head"
        elif any(name.startswith(f"{anatomy.in_model(table)}.") for table in anatomy.embeddings):
            part = "embeddings"
        elif anatomy.final_norm and name.startswith(f"{anatomy.in_model(anatomy.final_norm)}."):
            part = "norms"
        else:
            part = "other"
        parts[part] += info.nbytes
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def dtypes(shape: Any) -> dict[str, int]:
    """Bytes per stored dtype."""
    found: dict[str, int] = {}
    for info in shape.tensors.values():
        found[info.dtype] = found.get(info.dtype, 0) + info.nbytes
    return found
