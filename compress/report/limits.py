"""What a model is not known to do, for its card."""

from __future__ import annotations

from compress.storage.lineage import Lineage


def limits(lineage: Lineage, base: str) -> list[str]:
    """The limits of a model that its record tells, in sentences.

    Args:
        lineage: of the model.
        base: the id of the model that it was made from.
    """
    found = [f"The limits, biases and terms of use of `{base}` hold for this model too."]
    links = lineage.chain()
    if not lineage.evaluations:
        found.append("What the changes cost was not measured on this model.")
    else:
        found.append("The figures above hold for the texts and tasks that they name, and for no others.")
    if sources := dict.fromkeys(link.calibration["source"] for link in links if link.calibration):
        names = " and ".join(f"`{source}`" for source in sources)
        found.append(f"It was calibrated on {names}; text of other kinds or languages may lose more.")
    unlearned = any(step.family == "unlearning" for link in links for step in link.steps)
    if unlearned and not lineage.audits:
        found.append("Whether it stays forgotten was not audited.")
    if code := [name for name in lineage.result.files if name.endswith(".py")]:
        found.append(
            f"Loading it with transformers runs `{code[0]}` of this repository (`trust_remote_code=True`); "
            "compress-model loads it without."
        )
    return found
