"""Every role of every row of the anatomy table, checked on tiny models by what the modules do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.anatomy import (
    ROWS,
    Anatomy,
    anatomy_of,
    model_class,
    projection_rows,
    set_weight,
    sizes_of,
    weight,
)
from compress.anatomy import lookup as module

LAYER = 1  # a middle one, where layers count
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
SIZE |= {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLP = {"intermediate_size": 48}
GQA = {**SIZE, **MLP, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 12}  # head_dim is not hidden_size / num_attention_heads
GEMMA = {**WIDE, "query_pre_attn_scalar": 12, "sliding_window": 4}
OPT = {**SIZE, "ffn_dim": 48}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60, "pad_token_id": 0}

# The full class of each case: causal LM or masked LM. Every row, and every variant that a config can choose.
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", lambda: hf.MistralConfig(**WIDE)),
    "qwen2": (
        "Qwen2ForCausalLM",
        lambda: hf.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    ),
    "qwen3": ("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**WIDE, tie_word_embeddings=True)),
    "gemma2": ("Gemma2ForCausalLM", lambda: hf.Gemma2Config(**GEMMA)),
    "gemma3_text": ("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**GEMMA, sliding_window_pattern=3)),
    "phi3": ("Phi3ForCausalLM", lambda: hf.Phi3Config(**GQA)),
    "opt": ("OPTForCausalLM", lambda: hf.OPTConfig(**OPT)),
    "opt, post-norm": (
        "OPTForCausalLM",
        lambda: hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    ),
    "opt, no final norm": ("OPTForCausalLM", lambda: hf.OPTConfig(**OPT, _remove_final_layer_norm=True)),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**SIZE)),
    "gpt2, n_inner": (
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(**SIZE, n_inner=48, tie_word_embeddings=False),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**SIZE, **MLP)),
    "gpt_neox, sequential": (
        "GPTNeoXForCausalLM",
        lambda: hf.GPTNeoXConfig(**SIZE, **MLP, use_parallel_residual=False, tie_word_embeddings=True),
    ),
    "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**SIZE, **MLP)),
    "bert, untied": ("BertForMaskedLM", lambda: hf.BertConfig(**SIZE, **MLP, tie_word_embeddings=False)),
    "distilbert": ("DistilBertForMaskedLM", lambda: hf.DistilBertConfig(**DISTIL)),
    "roberta": ("RobertaForMaskedLM", lambda: hf.RobertaConfig(**SIZE, **MLP)),
    "mpnet": ("MPNetForMaskedLM", lambda: hf.MPNetConfig(**SIZE, **MLP)),
}
# Classes without a vocabulary head: the bare base model, and a classifier around it.
HEADLESS = {
    "LlamaModel": "llama",
    "LlamaForQuestionAnswering": "llama",
    "GPT2Model": "gpt2",
    "OPTForSequenceClassification": "opt",
    "BertModel": "bert",
    "BertForSequenceClassification": "bert",
    "DistilBertForSequenceClassification": "distilbert",
    "RobertaForSequenceClassification": "roberta",
    "MPNetModel": "mpnet",
}


def config_of(case: str, architecture: str | None = None) -> Any:
    name, build = CASES[case]
    config = build()
    config.architectures = [architecture or name]
    return config


def build(config: Any) -> Any:
    """The model in float64, every parameter away from its initial zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    model = model_class(config)._from_config(config, attn_implementation="eager").double().eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += (0.3 if parameter.ndim > 1 else 0.1) * noise
    return model


class Subject:
    """One model with its anatomy, and the values at the ports of one layer when it runs."""

    def __init__(self, case: str) -> None:
        self.config = config_of(case)
        self.model = build(self.config)
        self.anatomy: Anatomy = anatomy_of(self.config)
        self.layer: nn.Module = self.model.base_model.get_submodule(self.anatomy.layers)[LAYER]

    def module(self, role: str) -> nn.Module:
        return self.layer.get_submodule(getattr(self.anatomy, role))

    def run(self) -> dict[str, Tensor]:
        """Inputs ("in PATH") and outputs ("out PATH") of every linear and norm, and of the layer ("out")."""
        seen: dict[str, Tensor] = {}

        def keep(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict, output: Any) -> None:
                if inputs:
                    seen[f"in {path}".strip()] = inputs[0].flatten(0, -2)
                output = output[0] if isinstance(output, tuple) else output
                seen[f"out {path}".strip()] = output.flatten(0, -2)

            return hook

        paths = ("", *self.anatomy.linear_paths, *self.anatomy.norm_paths)
        with hooks(*((self.layer.get_submodule(path), keep(path)) for path in paths)), torch.no_grad():
            self.model(torch.arange(3, 13)[None])
        return seen

    def fed(self, seen: dict[str, Tensor], role: str) -> Tensor:
        return seen[f"in {getattr(self.anatomy, role)}"]

    def made(self, seen: dict[str, Tensor], role: str) -> Tensor:
        return seen[f"out {getattr(self.anatomy, role)}"]


@contextmanager
def hooks(*pairs: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(params=CASES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_every_row_has_a_case() -> None:
    assert {config_of(case).model_type for case in CASES} == set(ROWS)


def test_linears_are_all_the_linears_of_a_layer(subject: Subject) -> None:
    found = {
        path: part for path, part in subject.layer.named_modules() if isinstance(part, nn.Linear | Conv1D)
    }
    linears = subject.anatomy.linears(subject.layer)
    assert linears == found
    assert tuple(linears) == subject.anatomy.linear_paths
    assert all(isinstance(part, Conv1D) == subject.anatomy.conv1d for part in linears.values())


def test_linears_come_in_data_flow_order(subject: Subject) -> None:
    called: list[str] = []
    pairs = []
    for path, linear in subject.anatomy.linears(subject.layer).items():
        pairs.append((linear, lambda *_, path=path: called.append(path)))
    with hooks(*pairs), torch.no_grad():
        subject.model(torch.arange(3, 13)[None])
    # Some models compute v before q; what matters is that each block follows the one that feeds it.
    a = subject.anatomy
    blocks = [{a.query, a.key, a.value}, {a.attention_output}, {a.gate, a.up} - {None}, {a.down}]
    place = {path: number for number, block in enumerate(blocks) for path in block}
    assert [place[path] for path in called] == [place[path] for path in a.linear_paths]
    assert sorted(called) == sorted(a.linear_paths)


def test_norms_are_all_the_norms_of_a_layer(subject: Subject) -> None:
    found = {path for path, part in subject.layer.named_modules() if "norm" in type(part).__name__.lower()}
    vectors = {
        path.rpartition(".")[0]
        for path, parameter in subject.layer.named_parameters()
        if path.endswith(".weight") and parameter.ndim == 1
    }
    assert set(subject.anatomy.norm_paths) == found == vectors
    assert len(subject.anatomy.norm_paths) == len(found)


def test_norms_are_where_their_names_say(subject: Subject) -> None:
    a, seen = subject.anatomy, subject.run()
    if a.norm_first:
        assert same(subject.made(seen, "attention_norm"), subject.fed(seen, "query"))
        assert same(subject.made(seen, "mlp_norm"), subject.fed(seen, "up"))
    else:
        assert same(subject.made(seen, "attention_norm"), subject.fed(seen, "up"))
        assert same(subject.made(seen, "mlp_norm"), seen["out"])
    if a.post_attention_norm:
        assert same(subject.fed(seen, "post_attention_norm"), subject.made(seen, "attention_output"))
    if a.post_mlp_norm:
        assert same(subject.fed(seen, "post_mlp_norm"), subject.made(seen, "down"))
    for norm, projection in (("query_norm", "query"), ("key_norm", "key")):
        if getattr(a, norm):
            heads = subject.made(seen, projection).flatten()
            assert same(subject.fed(seen, norm).flatten().sort().values, heads.sort().values)


def test_attention_and_mlp_contain_their_linears(subject: Subject) -> None:
    a = subject.anatomy
    attention = {getattr(a, role) for role in ("query", "key", "value", "attention_output")}
    mlp = {a.gate, a.up, a.down} - {None}
    inside = {p for p in a.linear_paths if p.startswith(f"{a.attention}.")}
    assert inside == attention
    assert a.mlp is None or {p for p in a.linear_paths if p.startswith(f"{a.mlp}.")} == mlp
    if a.mlp is None:  # then there really is no module that holds just the MLP
        holders = [
            {f"{path}.{inner}" for inner, part in holder.named_modules() if isinstance(part, nn.Linear)}
            for path, holder in subject.layer.named_modules()
            if path
        ]
        assert mlp not in holders
    else:
        assert isinstance(subject.module("mlp"), nn.Module)


def test_parallel_residual_is_whether_the_mlp_sees_the_attention(subject: Subject) -> None:
    before = subject.run()
    output = subject.module("attention_output")
    set_weight(output, weight(output) * -3)
    assert (
        same(subject.fed(before, "up"), subject.fed(subject.run(), "up")) == subject.anatomy.parallel_residual
    )


def test_mlp_is_mergeable_when_its_output_is_what_is_added(subject: Subject) -> None:
    before = subject.run()
    down = subject.module("down")
    set_weight(down, 2 * weight(down), None if down.bias is None else 2 * down.bias)
    once_more = before["out"] + subject.made(before, "down")
    obstacle = subject.anatomy.merge_obstacle
    assert same(subject.run()["out"], once_more) == (obstacle is None)
    assert obstacle is None or (subject.anatomy.down in obstacle and obstacle.endswith("."))


def test_everything_outside_the_layers_is_named(subject: Subject) -> None:
    a, base = subject.anatomy, subject.model.base_model
    outside = (*a.embeddings, a.embedding_norm, a.final_norm, a.final_projection)
    named = {path: base.get_submodule(path) for path in outside if path}
    reached = {id(p) for part in named.values() for p in part.parameters()}
    reached |= {id(p) for p in base.get_submodule(a.layers).parameters()}
    assert {name for name, p in base.named_parameters() if id(p) not in reached} == set()
    assert named[a.embeddings[0]] is base.get_input_embeddings()
    norms = {
        path
        for path, part in base.named_modules()
        if "norm" in type(part).__name__.lower() and not path.startswith(a.layers)
    }
    assert norms == {a.embedding_norm, a.final_norm} - {None}


def test_head_and_tie(subject: Subject) -> None:
    a, model = subject.anatomy, subject.model
    assert model.get_submodule(a.head) is model.get_output_embeddings()
    table = model.get_submodule(a.in_model(a.embeddings[0]))
    assert a.tied == (model.get_submodule(a.head).weight is table.weight)


def test_kind(subject: Subject) -> None:
    """A decoder's early positions do not see a later token; an encoder's do."""
    tokens = torch.arange(3, 13)[None]
    changed = tokens.clone()
    changed[0, -1] = 50
    with torch.no_grad():
        early = [subject.model(ids).logits[0, 0] for ids in (tokens, changed)]
    assert same(*early) == (subject.anatomy.kind == "decoder")


@pytest.mark.parametrize("case", CASES)
def test_layer_names_are_those_of_the_state_dict(case: str) -> None:
    check_layer_name(config_of(case))


@pytest.mark.parametrize(("architecture", "case"), HEADLESS.items())
def test_classes_without_vocabulary_head(architecture: str, case: str) -> None:
    config = config_of(case, architecture)
    check_layer_name(config)
    found = anatomy_of(config)
    assert found.head is None
    assert not found.tied
    assert bool(found.prefix) == (not architecture.endswith("Model"))


def check_layer_name(config: Any) -> None:
    found, model = anatomy_of(config), build(config)
    layer = model.get_submodule(found.layer_name(LAYER))
    assert layer is model.base_model.get_submodule(found.layers)[LAYER]
    assert any(key.startswith(f"{found.layer_name(LAYER)}.") for key in model.state_dict())


def test_located_follows_the_name_that_a_checkpoint_has_for_the_head(tmp_path: Any) -> None:
    build(config_of("gpt_neox")).save_pretrained(tmp_path)  # transformers writes the head as embed_out
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    located = anatomy_of(config_of("gpt_neox")).located(names)
    assert f"{located.head}.weight" in names


@pytest.mark.parametrize("case", ["llama", "bert", "gpt2", "opt"])
def test_sizes_are_those_that_the_class_reads(case: str) -> None:
    config = config_of(case)
    before = sizes_of(config)
    stray = {"num_key_value_heads": 1, "head_dim": 4}
    for name in stray:
        if name not in type(config)().to_dict():
            setattr(config, name, stray[name])
    assert sizes_of(config) == before


@pytest.mark.parametrize(("case", "prefix"), {"llama": "model.", "bert": "bert.", "opt": "model."}.items())
def test_layer_index(case: str, prefix: str) -> None:
    found = anatomy_of(config_of(case))
    assert found.layer_index(f"{prefix}{found.layers}.12.{found.down}.weight") == 12
    for name in (
        f"{prefix}{found.layers}.x.weight",
        f"{found.layers}.1.weight",
        f"{prefix}{found.layers}1.2.x",
    ):
        assert found.layer_index(name) == -1


def slots(subject: Subject, head: int, group: int = 1) -> Tensor:
    """Which inputs of the attention output belong to ``group`` heads from ``head`` on: bool [in]."""
    width = sizes_of(subject.config).head_dim
    mask = torch.zeros(sizes_of(subject.config).num_attention_heads * width, dtype=torch.bool)
    mask[head * width : (head + group) * width] = True
    return mask


def test_rows_cover_each_projection_once(subject: Subject) -> None:
    a, rows = subject.anatomy, projection_rows(subject.config)
    sizes = sizes_of(subject.config)
    assert rows["query"].shape == (sizes.num_attention_heads, sizes.head_dim)
    assert rows["key"].shape == rows["value"].shape == (sizes.num_key_value_heads, sizes.head_dim)
    assert ("gate" in rows) == (a.gate is not None)
    of_path: dict[str, list[int]] = {}
    for role, index in rows.items():
        of_path.setdefault(getattr(a, role), []).extend(index.flatten().tolist())
    for path, index in of_path.items():
        assert sorted(index) == list(range(len(weight(subject.layer.get_submodule(path)))))
    assert weight(subject.module("down")).shape == (sizes.hidden_size, sizes.intermediate_size)
    queries = sizes.num_attention_heads * sizes.head_dim
    assert weight(subject.module("attention_output")).shape == (sizes.hidden_size, queries)


def test_value_rows_of_a_head_make_its_slice_of_the_output(subject: Subject) -> None:
    """Without the value rows of one head its slice of the attention output is 0, and nothing else changes."""
    sizes = sizes_of(subject.config)
    group, head = sizes.num_attention_heads // sizes.num_key_value_heads, sizes.num_key_value_heads - 1
    value, before = subject.module("value"), subject.run()
    rows = projection_rows(subject.config)["value"][head]
    changed, bias = weight(value).clone(), None if value.bias is None else value.bias.detach().clone()
    changed[rows] = 0
    if bias is not None:
        bias[rows] = 0
    set_weight(value, changed, bias)
    mine = slots(subject, head * group, group)
    old, new = (subject.fed(seen, "attention_output") for seen in (before, subject.run()))
    assert (new[:, mine] == 0).all()
    assert old[:, mine].abs().min() > 0
    assert same(new[:, ~mine], old[:, ~mine])


@pytest.mark.parametrize("role", ["query", "key"])
def test_query_and_key_rows_of_a_head(subject: Subject, role: str) -> None:
    """A query changed at one position moves that position of its head; a key moves others of its group."""
    sizes, position = sizes_of(subject.config), 4
    head = getattr(sizes, "num_attention_heads" if role == "query" else "num_key_value_heads") - 1
    group = 1 if role == "query" else sizes.num_attention_heads // sizes.num_key_value_heads
    rows = projection_rows(subject.config)[role][head]

    def push(_: nn.Module, inputs: Any, kwargs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., position, rows] += torch.linspace(1, 2, len(rows), dtype=torch.float64)
        return output

    before = subject.run()
    with hooks((subject.module(role), push)):
        after = subject.run()
    old, new = (subject.fed(seen, "attention_output") for seen in (before, after))
    moved = (old - new).abs() > 1e-9  # [positions, in]
    mine = slots(subject, head * group, group)
    assert not moved[:, ~mine].any()
    assert moved[position, mine].all()
    others = moved[:, mine].any(1)
    others[position] = False
    assert others.any() == (role == "key")


def test_gate_and_up_rows(subject: Subject) -> None:
    """Doubling a row of up doubles one input of down if it is gated; doubling a row of gate does not."""
    a, column = subject.anatomy, 7
    rows, before = projection_rows(subject.config), subject.run()
    for role in ("up", "gate") if a.gate else ("up",):
        linear = subject.module(role)
        saved = copy.deepcopy(linear.state_dict())
        changed = weight(linear).clone()
        changed[rows[role][column]] *= 2
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if bias is not None:
            bias[rows[role][column]] *= 2
        set_weight(linear, changed, bias)
        old, new = (subject.fed(seen, "down") for seen in (before, subject.run()))
        others = torch.arange(old.shape[1]) != column
        assert same(new[:, others], old[:, others])
        assert not same(new[:, column], old[:, column])
        if a.gate:
            assert same(new[:, column], 2 * old[:, column]) == (role == "up")
        linear.load_state_dict(saved)


def test_sizes(subject: Subject) -> None:
    case_has = subject.config.to_dict()
    sizes = sizes_of(subject.config)
    assert (sizes.vocab_size, sizes.hidden_size, sizes.num_hidden_layers) == (60, 32, 3)
    assert sizes.num_attention_heads == 4
    assert sizes.num_key_value_heads == case_has.get("num_key_value_heads", 4)
    assert sizes.head_dim == case_has.get("head_dim", 8)
    assert sizes.intermediate_size == (128 if case_has.get("n_inner", 0) is None else 48)


@pytest.mark.parametrize("linear", [nn.Linear(3, 5), Conv1D(5, 3), nn.Linear(3, 5, bias=False)])
def test_weight_and_set_weight(linear: nn.Module) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(5) if linear.bias is None else linear.bias
    assert weight(linear).shape == (5, 3)
    assert torch.allclose(linear(x), x @ weight(linear).T + bias)
    assert weight(linear).data_ptr() == linear.weight.data_ptr()

    new, new_bias = torch.randn(4, 2, dtype=torch.float64), torch.randn(4)
    if linear.bias is not None:
        with pytest.raises(ValueError, match="does not fit"):
            set_weight(linear, new)
        assert weight(linear).shape == (5, 3)
    set_weight(linear, new, new_bias)
    assert torch.allclose(linear(x[:, :2]), x[:, :2] @ new.float().T + new_bias)
    assert (linear.weight.dtype, linear.weight.is_contiguous()) == (torch.float32, True)
    widths = (
        (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)
    )
    assert widths == (2, 4)
    new += 1
    assert not torch.allclose(weight(linear), new.float())


def test_no_code_tests_a_model_type() -> None:
    """The table is the one place that knows model types: the functions around it only look them up."""
    functions = Path(module.__file__).read_text(encoding="utf-8")
    assert not [name for name in ROWS if f'"{name}"' in functions]
