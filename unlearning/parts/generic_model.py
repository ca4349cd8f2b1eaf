"""Who's Harry Potter without training: two models whose logits are combined at every call.

It is the cheap baseline: it needs both models in memory, and vanishes with the second one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from compress.unlearning.parts.generic_labels import generic_logits


class GenericModel(PreTrainedModel, GenerationMixin):
    """A model that takes off its logits what a reinforced model prefers: equation (1) of the paper.

    It is called and generates like a causal language model of transformers. Both models read the same text,
    because nothing is translated, and read it anew for every token.

    Args:
        base, reinforced: two models of one vocabulary.
        alpha: see `generic_logits`.
    """

    # It attends to nothing itself, so any kind of attention will do that its parts have.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, base: PreTrainedModel, reinforced: PreTrainedModel, alpha: float) -> None:
        super().__init__(base.config)
        self.base = base
        self.reinforced = reinforced
        self.alpha = alpha
        self.generation_config = base.generation_config
        self.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> CausalLMOutput:
        """The generic logits, float32 [B, S, V].

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 0 at padding.
            others: what transformers passes on besides, such as ``use_cache``, which has no effect here.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        base, reinforced = (model(**inputs).logits.float() for model in (self.base, self.reinforced))
        return CausalLMOutput(logits=generic_logits(base, reinforced, self.alpha))
