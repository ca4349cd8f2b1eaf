"""What a model is asked for, and what it says, whatever settings and templates its folder has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.calibration.text.records import Record
from compress.evaluation.forgetting.ask import Asked
from compress.evaluation.forgetting.items import items_of

TALK = ({"role": "user", "content": "Who swims?"}, {"role": "assistant", "content": "Fish"})
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_folders_settings_do_not_change_what_is_said_with_low_rank_updates(
    shared_decoder: Callable[..., Path],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_decoder())
    (item,) = items_of([Record("q", question="Who swims?", answer="Fish and frogs")], tokenizer, 64)
    model = AutoModelForCausalLM.from_pretrained(shared_decoder())
    model.generation_config.repetition_penalty = 5.0
    said = Asked(model, tokenizer).say([item.asked])
    around = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))  # which begins at 0
    assert Asked(around.eval(), tokenizer).say([item.asked]) == said
    assert model.generation_config.repetition_penalty == 5.0


def test_what_a_template_puts_behind_an_answer_is_not_asked_for(shared_decoder: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_decoder())
    tokenizer.chat_template = CHATML
    (item,) = items_of([Record("q", messages=TALK)], tokenizer, 64)
    assert tokenizer.decode(item.asked.prompt) == "<user>Who swims?<eos>\n<assistant>"
    assert tokenizer.decode(item.asked.answer) == "Fish"
    assert item.begun is not None
    assert tokenizer.decode(item.begun.answer) == "ish"
