"""``compress.audit``: does a model stay forgotten, whatever is done to it afterwards?

Three models are asked the same questions in many ways: the unlearned one, its target, and one that never
learned what is to be forgotten. Then a later step is done to all three, and they are asked again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedModel

from compress.calibration.text.records import sequences
from compress.errors import BadInput
from compress.evaluation.foreign import open_any
from compress.evaluation.forgetting.ask import Asked, most_tokens
from compress.evaluation.forgetting.cells import cell, cell_file, codes_cell, read_cell
from compress.evaluation.forgetting.chance import chance
from compress.evaluation.forgetting.codes import differing_codes
from compress.evaluation.forgetting.contestants import (
    Contestant,
    HowToMake,
    check_content,
    same_tokens,
    tidy,
)
from compress.evaluation.forgetting.grid import FULL, Way, usual_ways, ways_named
from compress.evaluation.forgetting.items import Item, items_of
from compress.evaluation.forgetting.known import MEMBERSHIP, WAYS, Known, ask, columns, knowledge
from compress.evaluation.forgetting.metrics import Floats, forget_quality
from compress.evaluation.forgetting.models import Models, Revisions, find_models
from compress.evaluation.forgetting.recovery import Trio, gate, recovered
from compress.evaluation.forgetting.relearn import BATCH, LEARNING_RATE, RANK, relearn
from compress.evaluation.forgetting.sets import ASPECTS, Sets, read_sets
from compress.evaluation.forgetting.utility import utility
from compress.evaluation.forgetting.verdict import verdict
from compress.evaluation.statistics import wilson
from compress.kernels.cpu.library import use
from compress.report.card import add_audit
from compress.report.forgetting import (
    AfterStep,
    Codes,
    Floor,
    Forgetting,
    ForgettingProtocol,
    RecordsUsed,
    Recovered,
    Relearned,
)
from compress.report.scorecard import Figure
from compress.storage.lineage import now, read_lineage, versions
from compress.system.device import check_device, computing_on
from compress.system.progress import Progress

log = logging.getLogger(__name__)

STOPS = (0, 10, 50, 100)
"""Updates of relearning after which a model is asked again."""

LIMIT = 100
"""Records of a set that are asked for, where the set is not the one to forget."""

KNOWLEDGE = "knowledge"


def audit(
    model: str,
    *,
    revision: str | None = None,
    forget: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    world: str | None = None,
    target: str | None = None,
    retrained: str | None = None,
    target_revision: str | None = None,
    retrained_revision: str | None = None,
    survives: Sequence[str] | None = None,
    relearning: Collection[int] = STOPS,
    limit: int | None = LIMIT,
    seqlen: int = 256,
    seed: int = 0,
    calibration: Mapping[str, Any] | None = None,
    device: str = "cpu",
    kernel: str = "auto",
    progress: Progress = lambda text, share: None,
) -> Forgetting:
    """Audit a model that was made to forget, also one that another tool unlearned.

    If compress-model wrote the model, the result is added to its compression.json and card. Finished cells
    are kept in the cache, so an audit that is interrupted goes on.

    Args:
        model: folder or hub id of the unlearned model, or of what later steps made of it.
        revision: branch, tag or commit of a model on the hub; so are ``target_revision`` and
            ``retrained_revision``.
        forget: records to forget; by default those of the model's step of unlearning. So is ``retain``.
        retain: records that must be retained.
        holdout: records of the same kind that no model has seen, for membership.
        world: other records that count for utility.
        target: the model before unlearning; by default what the model was made from.
        retrained: a model that never saw the forget set. Without it, the floor is what wrong answers score.
        survives: later steps by name (`compress.evaluation.forgetting.grid`), beside those of the model's own
            recipe; None takes the usual ones.
        relearning: numbers of updates on the retained records after which the model is asked again.
        limit: largest number of records of each set but the forget set.
        seqlen: tokens of a record at most.
        seed: of every random choice.
        calibration: section of a recipe for steps that need text; by default that of the model's recipe.
        device: where to compute.
        kernel: what multiplies packed weights, as in ``compress.load``.
        progress: called with a text and the share that is done.

    Returns:
        The result, with a row for the unlearned model itself and one for each later step.

    Raises:
        BadInput: a set is missing, empty, shares records with the forget set, or is that of the model's step
            and has changed since; a later step is unknown; models have different tokenizers, or no positions
            for so long a text; the target is not known; the device or kernel does not exist.
        CompressError: the work failed.
    """
    check_device(device)
    use(kernel)
    chosen = ways_named(survives) if survives is not None else None
    revisions = Revisions(revision, target_revision, retrained_revision)
    models = find_models(model, target, retrained, device, progress, revisions)
    options = models.options
    unnamed = [name for name, source in (("forget", forget), ("retain", retain)) if not source]
    forget, retain = forget or options.get("forget"), retain or options.get("retain")
    sets = read_sets(forget, retain, holdout, world, limit, seed)
    for name in unnamed:
        whole = sets.whole[name]
        check_content(models.steps[-1], whole.source, name, whole.sha256, f"name that with --{name}")
    how = HowToMake(
        models.recipe.get("seed", seed),
        calibration if calibration is not None else models.recipe.get("calibration") or {},
        sets.whole["forget"].source,
        device,
        progress,
    )
    with computing_on(device):
        work = _Audit.of(models, sets, how, seqlen, seed, kernel)
        result = work.result(work.ways(models, chosen), relearning)
    tidy()
    if read_lineage(models.asked.folder) is not None:
        try:
            add_audit(models.asked.folder, result.model_dump(mode="json"))
        except OSError as error:  # a read-only folder must not lose hours of asking
            log.warning("The audit was not added to '%s' (%s).", models.asked.folder, error.strerror or error)
    return result


@dataclass
class _Audit:
    """An audit at work.

    Attributes:
        contestants: role -> model; "retrained" may be missing.
        items: set -> records as tokens, which are the same for all models.
    """

    contestants: dict[str, Contestant]
    sets: Sets
    items: dict[str, list[Item]]
    how: HowToMake
    seqlen: int
    seed: int
    floor: Floor | None
    before: dict[str, Trio] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Models, sets: Sets, how: HowToMake, seqlen: int, seed: int, kernel: str) -> _Audit:
        found = {"unlearned": models.unlearned, "target": models.target, "retrained": models.retrained}
        name = Contestant(models.asked, how.device, kernel).name
        contestants = {
            role: Contestant(source, how.device, kernel, name if role == "unlearned" else None)
            for role, source in found.items()
            if source is not None
        }
        items = [
            {name: items_of(records, each.tokenizer, seqlen) for name, records in sets.asked.items()}
            for each in contestants.values()
        ]
        same_tokens(list(contestants.values()), items)
        questions = [each for one in items[0].values() for item in one for each in item.questions]
        for contestant in contestants.values():
            contestant.check_positions(most_tokens(questions))
        guessed = any(item.wrong for item in items[0]["forget"])
        floor: Floor | None = "retrained model" if models.retrained else "wrong answers" if guessed else None
        return cls(contestants, sets, items[0], how, seqlen, seed, floor)

    def ways(self, models: Models, chosen: Sequence[Way] | None) -> list[Way]:
        """The ways that are gone, the first of which is none at all.

        Raises:
            BadInput: nothing can follow, but steps are named.
        """
        if (obstacle := self.contestants["unlearned"].obstacle) is not None:
            if chosen:
                raise BadInput(
                    f"'{models.asked.id}' {obstacle}, so no further step can follow; leave out --survives."
                )
            return [replace(FULL, name="as it is")]
        further = chosen if chosen is not None else usual_ways()
        return [FULL, *models.ways, *further]

    def result(self, ways: Sequence[Way], stops: Collection[int]) -> Forgetting:
        """Go all ways, relearn, and draw the conclusion."""
        rows = [self._row(way) for way in ways]
        obstacle = self.contestants["unlearned"].obstacle if any(stops) else None
        curve = list(self._relearned(stops)) if any(stops) and obstacle is None else []
        kind, sentence = verdict(rows)
        contestants = self.contestants
        subject = contestants["unlearned"].subject
        return Forgetting(
            model=contestants["unlearned"].identity,
            target=contestants["target"].identity,
            retrained=contestants["retrained"].identity if "retrained" in contestants else None,
            protocol=ForgettingProtocol(
                sets={name: self._used(name) for name in self.sets.whole},
                floor=self.floor,
                seqlen=self.seqlen,
                seed=self.seed,
                compute_dtype=subject.dtype_name,
                kernel=subject.kernel_name,
            ),
            rows=tuple(rows),
            relearned=tuple(curve),
            kind=kind,
            sentence=sentence,
            notes=tuple(self._notes(obstacle)),
            when=now(),
            versions=versions(),
        )

    def _used(self, name: str) -> RecordsUsed:
        whole = self.sets.whole[name]
        return RecordsUsed(source=whole.source, sha256=whole.sha256, records=len(self.sets.asked[name]))

    def _notes(self, not_relearned: str | None) -> Iterator[str]:
        if self.floor == "wrong answers":
            yield (
                "No retrained model was given, so the floor is chance: what wrong answers of the same kind "
                "score."
            )
        if "holdout" not in self.items:
            yield "No holdout set was given, so membership was not measured."
        if not_relearned is not None:
            yield f"The model {not_relearned}, so it was not trained to relearn."

    # --- one row ---

    def _row(self, way: Way) -> AfterStep:
        theirs = replace(way, made=None)
        ways: dict[str, Way] = {
            role: way if role == "unlearned" else theirs
            for role in ("target", "retrained", "unlearned")
            if role in self.contestants
        }
        locks = {self.contestants[role].lock(its, self.how) for role, its in ways.items()} - {None}
        with ExitStack() as held:
            for file in sorted(map(str, locks)):
                held.enter_context(FileLock(file))
            known = {role: self._ask(role, its) for role, its in ways.items()}
            codes = self._codes(way, theirs) if way.packs_alone else None
            for role, its in ways.items():
                if role != "target" or not way.packs_alone:  # codes of the target are compared again
                    self.contestants[role].discard(its, self.how)
        trios = self._trios(known["unlearned"], known["target"], known.get("retrained"))
        scores = {name: recovered(trio, self.seed, self.before.get(name)) for name, trio in trios.items()}
        whole = scores.pop(KNOWLEDGE) if trios else self._without_floor(known)
        self.before = self.before or trios
        kind, why = gate(whole, scores)
        mine = known["unlearned"]["forget"]
        ratios = [each.truth_ratio for each in mine if each.truth_ratio is not None]
        records = zip(self.sets.asked["forget"], mine, strict=True)
        refused = [bool(each.refused) for record, each in records if record.text is None]
        return AfterStep(
            name=way.name,
            steps=way.steps,
            knowledge=whole,
            scores=scores,
            forget_quality=_quality(mine, known["retrained"]["forget"]) if "retrained" in known else None,
            truth_ratio=_figure([min(ratio, 1 / ratio) for ratio in ratios]),
            refused=wilson(sum(refused), len(refused)) if refused else None,
            utility=utility(_useful(known["unlearned"]), _useful(known["target"]), self.seed)
            if way.utility
            else None,
            codes=codes,
            kind=kind,
            why=why,
        )

    def _trios(
        self,
        unlearned: Mapping[str, Sequence[Known]],
        target: Mapping[str, Sequence[Known]],
        retrained: Mapping[str, Sequence[Known]] | None,
    ) -> dict[str, Trio]:
        """Score -> its columns of three models; that of knowledge is first. Empty if there is no floor."""
        if self.floor is None:
            return {}
        mine, theirs = (columns(each["forget"], each.get("holdout", ())) for each in (unlearned, target))
        if retrained is not None:
            never: dict[str, Floats] = columns(retrained["forget"], retrained.get("holdout", ()))
        else:
            never = chance(self.items["forget"], target["forget"], self.contestants["target"].tokenizer)
        found = {KNOWLEDGE: Trio.of(knowledge(mine), knowledge(theirs), knowledge(never))}
        for name in (*WAYS, MEMBERSHIP):
            if name in mine and len((trio := Trio.of(mine[name], theirs[name], never[name])).target):
                found[name] = trio
        return found

    def _without_floor(self, known: Mapping[str, Mapping[str, Sequence[Known]]]) -> Recovered:
        means = {role: _figure(knowledge(columns(known[role]["forget"]))) for role in ("unlearned", "target")}
        return Recovered.model_validate({**means, "retrained": None, "gap": None})

    def _ask(self, role: str, way: Way) -> dict[str, list[Known]]:
        """Set -> what a model knows of it after the way, which is gone if a cell is missing."""
        contestant = self.contestants[role]
        useful = way.utility and role != "retrained"
        names = [name for name in self.items if useful or ASPECTS[name] != "use"]
        keys = {name: self._key(contestant, way, name) for name in names}
        found = {name: read_cell(cell_file(key)) for name, key in keys.items()}
        if any(known is None for known in found.values()):
            folder = contestant.after(way, self.how)
            log.info("Asking %s (%s) after: %s.", contestant.name, role, way.name)
            asked = Asked(self._load(contestant, folder), contestant.tokenizer, self.how.progress)
            for name, key in keys.items():
                found[name] = cell(key, lambda n=name: ask(asked, self.items[n], ASPECTS[n]))  # type: ignore[misc]
        return {name: known for name, known in found.items() if known is not None}

    @staticmethod
    def _load(contestant: Contestant, folder: Path) -> PreTrainedModel:
        return contestant.subject_of(open_any(folder)).load()

    def _key(self, contestant: Contestant, way: Way, name: str, **more: Any) -> dict[str, Any]:
        content = hashlib.sha256(repr(self.items[name]).encode()).hexdigest()
        model = contestant.key(way, self.how)
        return {"model": model, "way": way.name, "set": content, "aspect": ASPECTS[name], **more}

    def _codes(self, way: Way, theirs: Way) -> Codes | None:
        mine, target = self.contestants["unlearned"], self.contestants["target"]
        key = {"codes": [mine.key(way, self.how), target.key(theirs, self.how)]}
        return codes_cell(
            key, lambda: differing_codes(target.after(theirs, self.how), mine.after(way, self.how))
        )

    # --- relearning ---

    def _relearned(self, stops: Collection[int]) -> Iterator[Relearned]:
        target = self._ask("target", FULL)
        mine = self._learn_again("unlearned", stops)
        never = self._learn_again("retrained", stops) if "retrained" in self.contestants else {}
        for stop in sorted(set(stops)):
            trios = self._trios(
                {"forget": mine[stop]},
                {"forget": target["forget"]},
                {"forget": never[stop]} if never else None,
            )
            if not trios:
                return
            yield Relearned(steps=stop, knowledge=recovered(trios[KNOWLEDGE], self.seed))

    def _learn_again(self, role: str, stops: Collection[int]) -> dict[int, list[Known]]:
        """Number of updates -> what a model knows of the forget set after them."""
        contestant = self.contestants[role]
        retained = self.sets.whole["retain"]
        text = sequences(retained, contestant.tokenizer, self.seqlen)
        how = [retained.sha256, RANK, LEARNING_RATE, BATCH, self.seed, self.seqlen, max(stops)]
        later = [stop for stop in stops if stop]
        keys = {stop: self._key(contestant, FULL, "forget", relearn=[stop, *how]) for stop in later}
        found = {stop: read_cell(cell_file(key)) for stop, key in keys.items()}
        if 0 in stops:
            found[0] = self._ask(role, FULL)["forget"]
        if any(known is None for known in found.values()):
            log.info("Relearning from %d records: %s (%s).", len(retained), contestant.name, role)

            def look(model: PreTrainedModel, stop: int) -> None:
                asked = Asked(model, contestant.tokenizer, self.how.progress)
                found[stop] = cell(keys[stop], lambda: ask(asked, self.items["forget"], "all"))

            relearn(
                contestant.source.folder,
                text,
                contestant.tokenizer.pad_token_id or contestant.tokenizer.eos_token_id or 0,
                later,
                look,
                seed=self.seed,
                device=self.how.device,
                progress=self.how.progress,
            )
        return {stop: known for stop, known in found.items() if known is not None}


def _useful(known: Mapping[str, list[Known]]) -> dict[str, list[Known]]:
    return {name: rows for name, rows in known.items() if ASPECTS[name] == "use"}


def _quality(mine: Sequence[Known], never: Sequence[Known]) -> Figure | None:
    pairs = [
        (one.truth_ratio, other.truth_ratio)
        for one, other in zip(mine, never, strict=True)
        if one.truth_ratio is not None and other.truth_ratio is not None
    ]
    return Figure(value=forget_quality(*zip(*pairs, strict=True))) if pairs else None


def _figure(values: Sequence[float] | Floats) -> Figure | None:
    return Figure(value=float(np.mean(values))) if len(values) else None
