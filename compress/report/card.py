"""Write the model card from the lineage of a model, with the metadata that the hub reads."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from compress.errors import BadInput
from compress.storage.lineage import LINEAGE, RECIPE, Lineage, read_lineage, record_of
from compress.system.files import write_atomically

log = logging.getLogger(__name__)

CARD = "README.md"

LIBRARIES = {"gguf": "gguf", "mlx": "mlx", "onnx": "onnx"}
"""Target of an export -> the library that the hub names for it; transformers for all others."""

DENSE = {"huggingface", "nemotron-nas", "onnx"}
"""The targets of an export that round no weights."""

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "tags")
"""The metadata of a source's card that hold for what is made of it, too."""


@dataclass(frozen=True)
class Base:
    """The nearest model on the hub that a model was made from.

    Attributes:
        id: of the model.
        relation: what the hub calls the way from there to here (its ``base_model_relation``): "quantized" or
            "finetune", which stands for all other changes of weights; None if nothing was changed.
    """

    id: str
    relation: str | None


def base_of(lineage: Lineage) -> Base | None:
    """The nearest model on the hub that a model was made from; None if there is none on record."""
    made: list[Lineage] = []
    for link in reversed(lineage.chain()):
        made.append(link)
        if link.parent.revision is not None:
            return Base(link.parent.id, relation_of(made))
        if cached := IN_HUB_CACHE.search(link.parent.id):
            return Base(cached["id"].replace("--", "/"), relation_of(made))
    return None


IN_HUB_CACHE = re.compile(r"/models--(?P<id>[^/]+)/snapshots/[0-9a-f]{40}/?$")
"""The folder of a hub model in the cache of the hub's client."""


def relation_of(links: list[Lineage]) -> str | None:
    """What the hub calls the way that these runs went."""
    steps = [step.family for link in links for step in link.steps]
    targets = {link.exported.target for link in links if link.exported}
    if "quantization" in steps or targets - DENSE:
        return "quantized"
    return "finetune" if steps else None


def source_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of the model card in a folder that hold for what is made of the model, too.

    Empty if the folder has no card, or none that can be read.
    """
    card = folder / CARD
    try:
        found = metadata_load(card) if card.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        log.warning("The metadata of '%s', such as the licence, cannot be read and are left out.", card)
        return {}
    return {name: found[name] for name in KEPT if found.get(name)}


def add_evaluations(model: Path, evaluations: list[dict[str, Any]]) -> None:
    """Append scorecards to the lineage of a model, and write its card again.

    Raises:
        BadInput: the model has no record.
    """
    lineage = _recorded(model)
    lineage.evaluations += evaluations
    write_lineage(model, lineage)


def add_audit(model: Path, audit: dict[str, Any]) -> None:
    """Append an audit of forgetting to the lineage of a model, and write its card again.

    Raises:
        BadInput: the model has no record.
    """
    lineage = _recorded(model)
    lineage.audits.append(audit)
    write_lineage(model, lineage)


def _recorded(model: Path) -> Lineage:
    lineage = read_lineage(model)
    if lineage is None:
        raise BadInput(f"'{model}' was not written by compress-model: it has no {record_of(model).name}.")
    return lineage


def write_lineage(model: Path, lineage: Lineage) -> None:
    """Write the record of a model and, in a folder, the card (README.md) that is made from it."""
    text = lineage.model_dump_json(indent=2)
    if model.is_file():
        write_atomically(record_of(model), text)
        return
    card = render_card(lineage, (model / RECIPE).read_text(encoding="utf-8"))
    write_atomically(record_of(model), text)
    write_atomically(model / CARD, card)


def render_card(lineage: Lineage, recipe: str | None, base: Base | None = None, record: str = LINEAGE) -> str:
    """The model card of a lineage: Markdown with the front matter of the hub.

    Args:
        lineage: of the model.
        recipe: the text of its recipe.yaml; None if there is none.
        base: the model on the hub that it was made from; None takes it from the lineage.
        record: the name of the file that holds the lineage.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from compress.report.compare import newest_side_by_side
    from compress.report.forgetting import newest_audit
    from compress.report.forgetting import to_markdown as audit_to_markdown
    from compress.report.limits import limits
    from compress.report.render import escaped, to_markdown
    from compress.report.scorecard import Scorecard

    cards = [Scorecard.model_validate_json(json.dumps(card)) for card in lineage.evaluations]
    table = newest_side_by_side(cards) if cards else None
    verdicts = [
        (card.when, card.harness.verdict.sentence)
        for card in (row.scorecard for row in (table.rows if table else []))
        if card.harness and card.harness.verdict
    ]
    audit = newest_audit(lineage)
    base = base or base_of(lineage)
    environment = Environment(
        loader=PackageLoader("compress.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("card.md.jinja").render(
        metadata=yaml.safe_dump(_metadata(lineage, base), sort_keys=False, allow_unicode=True),
        lineage=lineage,
        recipe=recipe,
        evaluation=to_markdown(table) if table else None,
        verdict=escaped(max(verdicts)[1]) if verdicts else None,
        audit=audit,
        audit_sentence=escaped(audit.sentence) if audit else None,
        audit_tables=audit_to_markdown(audit) if audit else None,
        limits=limits(lineage, base.id if base else lineage.chain()[0].parent.id),
        papers=_papers(lineage),
        record=record,
    )


def _metadata(lineage: Lineage, base: Base | None) -> dict[str, Any]:
    """The front matter of a card, as the hub reads it."""
    origin = {}
    if base is not None:
        origin = {"base_model": base.id}
        origin |= {"base_model_relation": base.relation} if base.relation else {}
    families = [step.family for link in lineage.chain() for step in link.steps]
    tags = [tag for tag in _as_list(lineage.card.get("tags")) if tag not in ("compress-model", *families)]
    target = lineage.exported.target if lineage.exported else None
    library = {"library_name": LIBRARIES[target]} if target in LIBRARIES else {}
    return {
        **origin,
        "library_name": "transformers",
        **lineage.card,
        **library,
        "tags": list(dict.fromkeys([*tags, "compress-model", *families])),
    }


def _papers(lineage: Lineage) -> list[str]:
    """The papers behind the steps, with links that the hub connects with its pages of papers."""
    papers = dict.fromkeys(step.paper for link in lineage.chain() for step in link.steps)
    return [re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper) for paper in papers]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []
