"""What a model folder may hold besides config.json and weights, and what becomes of it in the result.

The table `KINDS` decides. What is not carried over is left out with a sentence, so that a result never points
to files that are not there and never holds the weights of the model that it was made of. Nothing is followed
out of the folder but links to files, which is how the hub's cache is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from compress.errors import BadInput

MODULES = "modules.json"
"""The file of a sentence encoder that names the folders of its modules."""

PRUNED_FILE = "modeling_pruned.py"
"""The modelling file of a pruned model whose layers differ in shape, which is the only code that we write."""


@dataclass(frozen=True)
class Kind:
    """Files and folders that have one purpose.

    Attributes:
        what: they are, in words.
        fate: what becomes of them. What is dropped is missed by nobody, and so needs no sentence.
        names: patterns of their names in lower case, between spaces; those of folders end in a slash.
        why: the reason for which they are left out, as the end of a sentence.
    """

    what: str
    fate: Literal["carried over", "made anew", "dropped", "left out"]
    names: str
    why: str = ""

    @property
    def patterns(self) -> list[str]:
        return self.names.split()


KINDS = (
    Kind(
        "config, weights, card, lineage",
        "made anew",
        "config.json model.safetensors.index.json readme.md compression.json recipe.yaml",
    ),
    Kind(
        "hidden files, caches, and how weights were packed before",
        "dropped",
        ".* .*/ __pycache__/ demo.json gguf.json quantize_config.json quant_config.json hf_quant_config.json",
    ),
    Kind(
        "an adapter beside the weights",
        "left out",
        "adapter_config.json adapter_model* adapter/",
        "an adapter belongs to the model as it was, and transformers would load it onto the result",
    ),
    Kind(
        "Python code",
        "left out",
        "*.py requirements*.txt custom_generate/",
        "code is not carried over; the result uses the classes of transformers",
    ),
    Kind(
        "what training leaves behind",
        "left out",
        "optimizer* scheduler* scaler* rng_state* trainer_state.json training_args* *_results.json latest "
        "checkpoint-*/ global_step*/ runs/ wandb/ events.out.* imatrix* *.imatrix",
        "leftovers of training",
    ),
    Kind(
        "the same weights in other files or formats",
        "left out",
        "*.safetensors *.bin *.pt *.pth *.h5 *.msgpack *.ot *.ckpt* *.gguf *.onnx* *.npz *.tflite *.mlmodel "
        "*.index.json params.json consolidated* onnx/ openvino/ coreml/ *.mlpackage/ original/ metal/",
        "a form or a part of the model as it was",
    ),
    Kind(
        "tokenizer",
        "carried over",
        "tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt *.model *.spm *.tiktoken "
        "tekken.json bpe.codes *.bpe *.vocab *.tokenizer dict.txt",
    ),
    Kind("chat templates", "carried over", "*.jinja chat_template.json additional_chat_templates/"),
    Kind("settings of generation", "carried over", "generation_config*.json"),
    Kind("settings of processors", "carried over", "*processor_config.json"),
    Kind(
        "sentence encoder, with the folders that modules.json names",
        "carried over",
        f"{MODULES} config_sentence_transformers.json sentence_*_config.json",
    ),
    Kind(
        "licences and terms of use",
        "carried over",
        "licen[cs]e* notice* copying* *use_policy* *terms_of_use* third_party*",
    ),
    Kind("other settings", "carried over", "*.json *.txt"),
    Kind(
        "documents about the model as it was",
        "dropped",
        "*.md *.pdf *.png *.jpg *.jpeg *.gif *.svg *.webp *.mp4 *.yaml *.yml",
    ),
    Kind("anything else", "left out", "* */", "not known to this program"),
)
"""Every kind of companion. The first one that matches counts."""

STRANGE = Kind(
    "links to folders, links to nothing, and what is no file",
    "left out",
    "",
    "links to folders are not followed, and links to nothing cannot be",
)
"""What has the name of a companion and cannot be one."""

IN_MODULES = (".json", ".txt", ".model", ".jinja", ".safetensors")
"""The files that are carried over from the folder of a sentence encoder's module."""


@dataclass
class Companions:
    """What is in a model folder besides config and weights.

    Attributes:
        files: those that are carried over, relative to the folder.
        left_out: a sentence for each kind that is not.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def companions(folder: Path, weights: Collection[str] = ()) -> Companions:
    """Sort the companions in a model folder by what becomes of them.

    Args:
        folder: of the model.
        weights: the files that its tensors are read from, which are no companions.

    Raises:
        BadInput: modules.json is damaged, or the folder of a module is outside or has pickled weights only.
    """
    found, rest = Companions(), dict[Kind, list[str]]()
    modules, read = module_folders(folder), {Path(file).absolute() for file in weights}
    inside = {Path(name).parts[0] for name in modules}
    for path in sorted(folder.iterdir()):
        kind = kind_of(path)
        if path.name in inside or _holds(path.absolute(), read):
            continue
        if kind.fate == "left out":
            rest.setdefault(kind, []).append(path.name)
        elif kind.fate == "carried over":
            found.files += [file.relative_to(folder) for file in _files(path)]
    for name in modules:
        found.files += _module_files(folder, name)
    found.left_out = [f"{_listed(names)} left out: {kind.why}." for kind, names in rest.items()]
    if code := [str(file) for file in found.files if _without_code(folder / file) is not None]:
        found.left_out.append(
            f"auto_map in {_listed(code)} left out, because it names code; a tokenizer or processor that "
            "needs this code cannot be loaded from the result."
        )
    return found


def kind_of(path: Path) -> Kind:
    """The kind of a file or folder."""
    name = path.name.lower() + "/" * path.is_dir()
    kind = next(kind for kind in KINDS if _matches(name, kind.patterns))
    strange = path.is_symlink() if path.is_dir() else not path.is_file()
    return STRANGE if strange and kind.fate == "carried over" else kind


def copy_companions(folder: Path, target: Path) -> None:
    """Copy what is carried over, less the entries that name code which is not.

    Raises:
        BadInput: as `companions`.
    """
    for file in companions(folder).files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if (text := _without_code(folder / file)) is not None:
            (target / file).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(folder / file, target / file)


def module_folders(folder: Path) -> list[str]:
    """The folders, relative to the model's, that modules.json of a sentence encoder names.

    Raises:
        BadInput: the file is damaged, or a folder that it names is outside or is a link.
    """
    file = folder / MODULES
    if not file.is_file():
        return []
    try:
        names = [module["path"] for module in json.loads(file.read_text(encoding="utf-8"))]
        paths = [Path(name) for name in names if name]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{file} is damaged: it is not a list of modules with their paths.") from None
    for path in paths:
        links = (part for part in (path, *path.parents) if part.name and (folder / part).is_symlink())
        if not is_inside(str(path)) or any(links):
            raise BadInput(f"{file} names '{path}', which is outside of the model folder; move it inside.")
    return [path.as_posix() for path in paths]


def is_inside(name: str) -> bool:
    """Whether the relative path ``name`` stays inside the folder that it starts from."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def hub_patterns() -> tuple[list[str], list[str]]:
    """Patterns, for the hub's client, of the settings that a model may have, and of what is never fetched.

    Weights are in neither: `compress.storage.checkpoint.weight_patterns` says which of them are needed.
    """
    needed = ["config.json", "model.safetensors.index.json", "README.md", "compression.json", "recipe.yaml"]
    needed += ["adapter_config.json", "adapter/adapter_config.json"]
    wanted = [_anything_in(p) for kind in KINDS if kind.fate == "carried over" for p in kind.patterns]
    spellings = [*wanted, *(p.upper() for p in wanted), *(p.capitalize() for p in wanted)]
    refused = [_anything_in(p) for kind in KINDS if kind.fate == "left out" for p in kind.patterns]
    return [*needed, *spellings], [p for p in refused if not any(fnmatchcase(name, p) for name in needed)]


def _anything_in(pattern: str) -> str:
    return pattern + "*" * pattern.endswith("/")


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a name matches; patterns that end in a slash are for folders, the others for files."""
    folder = name.endswith("/")
    return any(fnmatchcase(name, pattern) for pattern in patterns if pattern.endswith("/") == folder)


def _holds(path: Path, files: Collection[Path]) -> bool:
    """Whether a path is one of the files, or a folder around one."""
    return any(path == file or path in file.parents for file in files)


def _files(path: Path) -> list[Path]:
    """A file itself, or the templates in a folder of them."""
    return [path] if path.is_file() else sorted(file for file in path.glob("*.jinja") if file.is_file())


def _module_files(folder: Path, name: str) -> list[Path]:
    """The files of a module that are carried over, relative to the model folder.

    Raises:
        BadInput: its weights are pickled.
    """
    walked = [Path(at) / name for at, _, names in os.walk(folder / name) for name in sorted(names)]
    found = [file for file in walked if file.suffix in IN_MODULES and file.is_file()]
    pickled = any(file.suffix in (".bin", ".pt", ".pth") for file in walked)
    if pickled and not any(file.suffix == ".safetensors" for file in found):
        raise BadInput(
            f"'{folder / name}' has only pickled weights, which can run code; convert them to safetensors "
            "(SentenceTransformer(...).save_pretrained does)."
        )
    return [file.relative_to(folder) for file in found]


def _without_code(path: Path) -> str | None:
    """The text of a JSON file without the entries of auto_map that name code in this folder.

    None if it has no such entries. Entries that name code in a repository of the hub stay.
    """
    if path.suffix != ".json" or b'"auto_map"' not in path.read_bytes():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(values, dict) or not (names := values.pop("auto_map", None)):
        return None
    there = {key: name for key, name in names.items() if "--" in str(name)} if isinstance(names, dict) else {}
    if there == names:
        return None
    return json.dumps(values | ({"auto_map": there} if there else {}), indent=2, ensure_ascii=False) + "\n"


def _listed(names: Sequence[str], most: int = 3) -> str:
    """``'a', 'b' and 'c' are``, or with more names ``'a', 'b', 'c' and 4 others are``."""
    shown = [f"'{name}'" for name in names[:most]]
    if (others := len(names) - len(shown)) > 0:
        shown.append(f"{others} other{'s' * (others > 1)}")
    together = " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
    return f"{together} {'is' if len(names) == 1 else 'are'}"
