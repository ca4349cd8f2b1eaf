"""The inputs of linears, kept while a stream goes through a layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.anatomy import weight
from compress.engine.activations import Activations
from compress.engine.stream import Layer, Observer, Seen, Stream


def advance_keeping(
    stream: Stream,
    layer: Layer,
    paths: list[str],
    folder: Path,
    observe: Mapping[str, Observer] | None = None,
) -> dict[str, Activations]:
    """Take a stream through a layer, and keep the inputs of some of its linears.

    Args:
        stream: before the layer.
        layer: in memory.
        paths: the linears.
        folder: inputs go into files there if all of them together exceed the memory limit.
        observe: as in `Stream.advance`.

    Returns:
        Path of a linear -> its inputs [N, S, in].

    Raises:
        CompressError: the layer puts out NaN or infinite values.
    """
    observe, (count, length) = observe or {}, stream.windows.tokens.shape
    kept = {
        path: Activations(
            (count, length, weight(layer.linears[path]).shape[1]), folder / path, len(paths), stream.device
        )
        for path in paths
    }

    def observer(path: str) -> Observer:
        def show(seen: Seen) -> None:
            if path in kept:
                kept[path].write(seen.start, seen.inputs)
            if path in observe:
                observe[path](seen)

        return show

    stream.advance(layer, {path: observer(path) for path in {**kept, **observe}})
    for inputs in kept.values():
        inputs.flip()
    return kept
