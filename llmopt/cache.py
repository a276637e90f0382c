"""`llmopt.Cache`: keys and values in few bits for transformers' own `generate`, packed as `quantize-kv` packs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.kv import Packing, packing_for, why_no_choice


class PackedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose `keys` and `values` are rows of bytes, uint8 [B, H, T, row]; `update` gives all of them unpacked.

    Growing, cropping and reordering are transformers' own, along the same axes.
    """

    def __init__(self, keys: Packing | None, values: Packing | None) -> None:
        super().__init__()
        self.packings = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No rows yet; the new tokens say how long they are. Raises InputError: heads that cannot be packed so."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            _packed(x[..., :0, :], how) for x, how in zip((key_states, value_states), self.packings, strict=True)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T + n, D] after n more tokens, in their dtype: what their codes stand for."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = (_packed(x, how) for x, how in zip((key_states, value_states), self.packings, strict=True))
        self.keys, self.values = (
            torch.cat((old, new), -2) for old, new in zip((self.keys, self.values), rows, strict=True)
        )
        keys, values = (
            held if how is None else how.turned_back(how.unpack(held)).to(self.dtype)
            for held, how in zip((self.keys, self.values), self.packings, strict=True)
        )
        return keys, values


def _packed(x: Tensor, how: Packing | None) -> Tensor:
    if how is None:
        return x
    row = how.row_bytes(x.shape[-1])  # raises where a head cannot be cut so
    return how.pack(x) if x.numel() else x.new_empty((*x.shape[:-1], row), dtype=torch.uint8)


class Cache(TransformersCache):  # type: ignore[misc]
    """A cache for `model.generate(..., past_key_values=llmopt.Cache(model.config))`.

    `keys`, `values`: `int4`, `int8`, `fp8`, `nvfp4`, or `none`: as they are. `rotate`: "k", "v", "kv" or "none", in
    Hadamard blocks of `order` channels (a power of two; 0: the largest that divides a head's). As `quantize-kv`.
    It saves memory, not time: torch unpacks everything for each step; `llmopt.compile` has kernels that need not.

    Raises InputError: an option, or layers that do not attend to all tokens before (sliding windows, linear attention).
    """

    def __init__(
        self, config: PreTrainedConfig, keys: str = "int4", values: str = "int4", order: int = 0, rotate: str = "k"
    ) -> None:
        config = config.get_text_config(decoder=True)
        others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
        if others or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
            seen = ", ".join(others) or f"a sliding window of {config.sliding_window}"
            raise InputError(
                f"llmopt.Cache: {type(config).__name__} has {seen}; wanted full attention in every layer; use "
                "llmopt.compile(model, 'int4-kv'), whose cache takes windows"
            )
        if why := why_no_choice(keys, values, order, rotate):
            raise InputError(f"llmopt.Cache: {why}")
        channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        packings = [packing_for(*one, order, rotate, channels) for one in (("k", keys), ("v", values))]
        super().__init__(layers=[PackedLayer(*packings) for _ in range(config.num_hidden_layers)])
