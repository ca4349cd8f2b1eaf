"""Settings that hold for every test, and tiny models that several files of tests need."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from compress.storage.lineage import Step

# pytest-xdist tells its workers how wide its own terminal is; tables of our commands do not depend on that.
os.environ.pop("COLUMNS", None)
# As the command line does: spinning threads lose whole time slices on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
atexit.register(gc.freeze)
# An example that takes long on a busy machine is not wrong.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# A command that is run in this process ends with it, but the process goes on. It closes what handlers of
# libraries write to, and absl's writes to what pytest had for stderr when absl was imported.
logging.shutdown = lambda *_: None
# What test files share lies in modules beside them, whose assertions also say what they saw.
pytest.register_assert_rewrite("tests.unit", "tests.conformance")

WORDS = (
    *("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue", "who", "where"),
    *(".", ",", "?", "un", "##happi", "##ness"),
)


TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


@pytest.fixture(scope="session", autouse=True)
def users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache, into which tests write nothing but compiled kernels, which are the same for all runs.

    The demo model, which takes long to make, lies there too; only the tests in ``e2e`` need it.
    """
    from compress.system.cache import CACHE_VARIABLE, cache_folder

    users, own = cache_folder(), tmp_path_factory.mktemp("cache")
    (users / "kernels").mkdir(mode=0o700, parents=True, exist_ok=True)
    (own / "kernels").symlink_to(users / "kernels", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(own))
        yield users


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """No test's random numbers depend on the tests before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """No test leaves the process with what a command that it ran, such as one with ``--quiet``, logs."""
    root, ours = logging.getLogger(), logging.getLogger("compress")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(autouse=True)
def same_kernel() -> Iterator[None]:
    """No test leaves the process with another kernel than the best."""
    yield
    if library := sys.modules.get("compress.kernels.cpu.library"):
        library.use("auto")


@pytest.fixture(autouse=True)
def no_other_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked ``loaders`` start the programs that the reload check runs in a process of their own,
    which takes some seconds at every run; for all others these are not installed."""
    promise = sys.modules.get("compress.pipeline.promise")
    if promise is None or request.node.get_closest_marker("loaders"):
        return
    found = promise._version
    monkeypatch.setattr(
        promise, "_version", lambda name: found(name) if name in promise.IN_THIS_PROCESS else None
    )


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Callable[..., Path]:
    """Writes an encoder with random weights that matter, and a WordPiece tokenizer that knows ``WORDS``.

    It is called with the name of a transformers class, and settings of its config.
    """
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    def make(architecture: str, name: str = "model", seed: int = 0, **settings: Any) -> Path:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        core = Tokenizer(
            models.WordPiece({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]")
        )
        core.normalizer = normalizers.Lowercase()
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=core,
            **dict(
                zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True)
            ),
        )
        cls = getattr(hf, architecture)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        if cls.config_class is hf.DistilBertConfig:
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        sizes |= {"vocab_size": len(WORDS) + 5, "max_position_embeddings": 40, "pad_token_id": 0}
        config = cls.config_class(**sizes | settings, architectures=[architecture])
        torch.manual_seed(seed)
        model = cls._from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def write_decoder() -> Callable[..., Path]:
    """Writes a causal language model with random weights that matter and a tokenizer of bytes, and a text
    beside them.

    It is called with the folder, the name of a transformers class, and settings of its config.
    """
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def write(
        folder: Path,
        architecture: str = "LlamaForCausalLM",
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> Path:
        cls = getattr(hf, architecture)
        sizes = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
        if cls is hf.OPTForCausalLM:
            sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 256}
        elif cls is not hf.GPT2LMHeadModel:
            sizes |= {"intermediate_size": 96}
        if hasattr(cls.config_class(), "num_key_value_heads"):
            sizes |= {"num_key_value_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls(cls.config_class(**sizes | special | settings))
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape)
        model.to(dtype).save_pretrained(folder)
        symbols = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        core = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
        (folder.parent / "text.txt").write_text(TEXT)
        return folder

    return write


@pytest.fixture
def tiny_decoder(tmp_path: Path, write_decoder: Callable[..., Path]) -> Callable[..., Path]:
    """What `write_decoder` writes, in a folder of the test's own that it may change."""

    def make(architecture: str = "LlamaForCausalLM", name: str = "dense", **settings: Any) -> Path:
        return write_decoder(tmp_path / name, architecture, **settings)

    return make


@pytest.fixture(scope="session")
def shared_decoder(
    tmp_path_factory: pytest.TempPathFactory, write_decoder: Callable[..., Path]
) -> Callable[..., Path]:
    """What `write_decoder` writes, once for all tests, none of which may change it."""
    made: dict[str, Path] = {}

    def get(architecture: str = "LlamaForCausalLM", **settings: Any) -> Path:
        key = repr((architecture, sorted(settings.items())))
        if key not in made:
            made[key] = write_decoder(tmp_path_factory.mktemp("model") / "dense", architecture, **settings)
        return made[key]

    return get


@pytest.fixture
def dense(request: pytest.FixtureRequest, shared_decoder: Callable[..., Path]) -> Callable[..., Path]:
    """The models that the test's own file lists as CASES: name -> (architecture, settings)."""
    import torch

    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        architecture, settings = request.module.CASES[name]
        return shared_decoder(architecture, dtype=dtype, **settings)

    return get


@pytest.fixture
def carry_out(tmp_path: Path) -> Callable[..., tuple[Path, Step]]:
    """A method of quantization on a model: the folder of the result, which holds what was planned, and what
    is known of the step."""
    from compress.engine.shape import ModelShape
    from compress.pipeline.recipe import parse_recipe
    from compress.pipeline.run import execute
    from compress.storage.checkpoint import Checkpoint

    folders = (tmp_path / f"written-{number}" for number in count())

    def carry(name: str, model: Path, **options: Any) -> tuple[Path, Step]:
        recipe = parse_recipe({"model": str(model), "steps": [{"method": name, **options}]})
        ((method, chosen),) = recipe.steps
        planned = method.plan(ModelShape.of(Checkpoint.open(model)), chosen)
        folder = next(folders)
        step = execute(recipe, folder).steps[0]
        written = Checkpoint.open(folder)
        assert written.tensors == planned.tensors
        assert written.config == planned.config
        return folder, step

    return carry


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are measured by what a fresh process would run, but in this one, and not for long.

    What a fresh process is for, memory, is in tests/unit/evaluation/test_measure.py.
    """
    from compress.evaluation import bench, measure
    from compress.evaluation.timed import Settings, Timed

    class InThisProcess(Timed):
        def __init__(self, folder: str | Path, settings: Settings, name: str = "") -> None:
            super().__init__(lambda: settings.load(folder), settings.device)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0.1)
    for module in (measure, bench):
        monkeypatch.setattr(module, "ModelProcess", InThisProcess)
