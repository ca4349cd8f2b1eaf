"""All methods by name. They are imported when asked for, never at start-up."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, CompressError, unknown

if TYPE_CHECKING:
    from compress.method import Family, Method

# family -> name -> "module:Class". Third parties add theirs through the entry-point group
# ``compress_model.methods`` (name = "module:Class"); their family is the one the class declares.
METHODS: dict[Family, dict[str, str]] = {
    "unlearning": {
        "dpo": "compress.unlearning.dpo:DPO",
        "gradient-difference": "compress.unlearning.gradient_difference:GradientDifference",
        "harry-potter": "compress.unlearning.harry_potter:HarryPotter",
        "key-space": "compress.unlearning.key_space:KeySpace",
        "neuron-adjust": "compress.unlearning.neuron_adjust:NeuronAdjust",
        "npo": "compress.unlearning.npo:NPO",
        "rmu": "compress.unlearning.rmu:RMU",
        "s3t": "compress.unlearning.s3t:S3T",
        "simnpo": "compress.unlearning.simnpo:SimNPO",
        "sure": "compress.unlearning.sure:Sure",
        "undial": "compress.unlearning.undial:Undial",
    },
    "pruning": {
        "blockpruner": "compress.pruning.blockpruner:BlockPruner",
        "flap": "compress.pruning.flap:Flap",
        "kprune": "compress.pruning.kprune:KPrune",
        "magnitude": "compress.pruning.magnitude:Magnitude",
        "replaceme": "compress.pruning.replaceme:ReplaceMe",
        "shortgpt": "compress.pruning.shortgpt:ShortGPT",
        "wanda-sp": "compress.pruning.wanda_sp:WandaSp",
    },
    "quantization": {
        "apiq": "compress.quantization.apiq:ApiQ",
        "awq": "compress.quantization.awq:AWQ",
        "bitstack": "compress.quantization.bitstack:BitStack",
        "float": "compress.quantization.round_to_float:RoundToFloat",
        "gptq": "compress.quantization.gptq:GPTQ",
        "hqq": "compress.quantization.hqq:HQQ",
        "llm-int8": "compress.quantization.llm_int8:LLMInt8",
        "llm-qat": "compress.quantization.llm_qat:LLMQAT",
        "nested": "compress.quantization.nested:Nested",
        "nf4": "compress.quantization.nf4:NF4",
        "rtn": "compress.quantization.round_to_nearest:RoundToNearest",
    },
}
GROUP = "compress_model.methods"

log = logging.getLogger(__name__)


@cache
def method_names() -> dict[str, str]:
    """Name -> "module:Class" of every method, ours and third parties'."""
    ours = {name: path for family in METHODS.values() for name, path in family.items()}
    return {point.name: point.value for point in entry_points(group=GROUP)} | ours


def methods_of(family: Family) -> list[str]:
    """The names of a family's methods, with those of other packages that can be imported."""
    found = list(METHODS[family])
    for name in method_names().keys() - {ours for methods in METHODS.values() for ours in methods}:
        try:
            if find_method(name).family == family:
                found.append(name)
        except CompressError as error:
            log.debug("%s", error)
    return sorted(found)


def find_method(name: str, family: Family | None = None) -> Method[Any]:
    """The method (an instance) of that name.

    Raises:
        BadInput: there is none, or it belongs to another family than ``family``.
        CompressError: a third party's method cannot be imported, or is not one.
    """
    names = method_names()
    if name not in names:
        others = [known for known in names if family is None or _our_family(known) in (family, None)]
        raise unknown("method", name, others)
    module, _, attribute = names[name].partition(":")
    try:
        method = getattr(import_module(module), attribute)()
    except Exception as error:  # a third party's module may do anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CompressError(
            f"The method '{name}' cannot be imported from {names[name]}: {reason}."
        ) from error
    if getattr(method, "name", None) != name or getattr(method, "family", None) not in METHODS:
        raise CompressError(
            f"The method '{name}' is broken: {names[name]} must be a Method with this name and a family "
            f"among {', '.join(METHODS)}."
        )
    if family is not None and method.family != family:
        raise BadInput(
            f"'{name}' is a method of {method.family}, not of {family}; the methods of {family} here are: "
            f"{', '.join(methods_of(family))}."
        )
    return method


def _our_family(name: str) -> str | None:
    """The family of a method of ours; None for third parties', whose class would have to be imported."""
    return next((family for family, methods in METHODS.items() if name in methods), None)
