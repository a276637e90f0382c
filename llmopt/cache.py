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
from llmopt.compiler.quant.near import Near, why_not_near


class PackedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose `keys` and `values` are rows of bytes, uint8 [B, H, T, row]; `update` gives all of them unpacked.

    Near tokens stand beside them as they are, [B, H, n, D]: in `first` and `last`. Growing, cropping and reordering are
    transformers' own, along the same axes.
    """

    def __init__(self, keys: str, values: str, order: int, rotate: str, near: Near) -> None:
        super().__init__()
        self.kinds, self.order, self.rotate, self.near = (keys, values), order, rotate, near
        self.first, self.last = self._plain = DynamicLayer(), DynamicLayer()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No rows yet; the new tokens say how long they are. Raises InputError: heads that cannot be packed so."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.packings = [
            packing_for(letter, kind, self.order, self.rotate, x.shape[-1])
            for letter, kind, x in zip("kv", self.kinds, (key_states, value_states), strict=True)
        ]
        self.keys, self.values = (
            _packed(x[..., :0, :], how) for x, how in zip((key_states, value_states), self.packings, strict=True)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T + n, D] after n more tokens, in their dtype: what their codes stand for, and of near
        tokens they themselves."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keep(key_states, value_states)
        rows = (_packed(x, how) for x, how in zip((key_states, value_states), self.packings, strict=True))
        self.keys, self.values = (
            torch.cat((old, new), -2) for old, new in zip((self.keys, self.values), rows, strict=True)
        )
        keys, values = (
            held if how is None else how.turned_back(how.unpack(held)).to(self.dtype)
            for held, how in zip((self.keys, self.values), self.packings, strict=True)
        )
        for near, begins in ((self.first, 0), (self.last, keys.shape[-2] - self.last.get_seq_length())):
            if count := near.get_seq_length():
                keys[..., begins : begins + count, :] = near.keys
                values[..., begins : begins + count, :] = near.values
        return keys, values

    def _keep(self, key_states: Tensor, value_states: Tensor) -> None:
        more = self.near.first - self.get_seq_length()
        if more > 0:
            self.first.update(key_states[..., :more, :], value_states[..., :more, :])
        if self.near.recent:
            self.last.update(key_states, value_states)
            # copies, since a slice would keep the whole prompt
            keys, values = self.last.keys, self.last.values
            self.last.keys = keys[..., -self.near.recent :, :].clone()
            self.last.values = values[..., -self.near.recent :, :].clone()

    def crop(self, tokens_to_remove: int) -> None:
        """Take away the last tokens, as a number below 0. Those before that were near no more come back rounded."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        left = self.get_seq_length()
        self.last.crop(-min(before - left, self.last.get_seq_length()))
        self.first.crop(-max(self.first.get_seq_length() - left, 0))

    def offload(self) -> None:
        """To the host."""
        super().offload()
        for layer in self._plain:
            layer.offload()

    def prefetch(self) -> None:
        """Back to the device."""
        super().prefetch()
        for layer in self._plain:
            layer.prefetch()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        for layer in self._plain:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in this order, of beams."""
        super().reorder_cache(beam_idx)
        for layer in self._plain:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch so many times."""
        super().batch_repeat_interleave(repeats)
        for layer in self._plain:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows of the batch alone."""
        super().batch_select_indices(indices)
        for layer in self._plain:
            layer.batch_select_indices(indices)


def _packed(x: Tensor, how: Packing | None) -> Tensor:
    if how is None:
        return x
    row = how.row_bytes(x.shape[-1])  # raises where a head cannot be cut so
    return how.pack(x) if x.numel() else x.new_empty((*x.shape[:-1], row), dtype=torch.uint8)


class Cache(TransformersCache):  # type: ignore[misc]
    """A cache for `model.generate(..., past_key_values=llmopt.Cache(model.config))`.

    `keys`, `values`: `int4`, `int8`, `fp8`, `nvfp4`, or `none`: as they are. `rotate`: "k", "v", "kv" or "none", in
    Hadamard blocks of `order` channels (a power of two; 0: the largest that divides a head's). The `sinks` first tokens
    and the `recent` last ones are seen as they are; all tokens of a step as its last one sees them, since transformers
    asks for one tensor of keys; columns of padding on the left count as tokens. As `quantize-kv`.
    It saves memory, not time: torch unpacks everything for each step; `llmopt.compile` has kernels that need not.

    Raises InputError: an option, or layers that do not attend to all tokens before (sliding windows, linear attention).
    """

    def __init__(
        self, config: PreTrainedConfig, keys: str = "int4", values: str = "int4", order: int = 0, rotate: str = "k",
        sinks: int = 0, recent: int = 0,
    ) -> None:  # fmt: skip
        config = config.get_text_config(decoder=True)
        others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
        if others or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
            seen = ", ".join(others) or f"a sliding window of {config.sliding_window}"
            raise InputError(
                f"llmopt.Cache: {type(config).__name__} has {seen}; wanted full attention in every layer; use "
                "llmopt.compile(model, 'int4-kv'), whose cache takes windows"
            )
        if why := why_no_choice(keys, values, order, rotate) or why_not_near(sinks, recent):
            raise InputError(f"llmopt.Cache: {why}")
        near = Near(sinks, recent)
        super().__init__(
            layers=[PackedLayer(keys, values, order, rotate, near) for _ in range(config.num_hidden_layers)]
        )
