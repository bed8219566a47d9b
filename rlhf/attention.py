"""Attention over packed rows: which models can take it, and the masks that they get.

Shapes: B rows, T row length. In a row every token belongs to a segment, and there to a branch: 0 is
the prompt, the others are its completions. A token sees the tokens before it in its own branch and
in its prompt, in a sliding layer those at most `window` positions back.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FULL, SLIDING = "full_attention", "sliding_attention"
ADDITIVE, FLEX = ("sdpa", "eager"), "flex_attention"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each token of packed rows belongs."""

    position_ids_BT: Tensor
    segments_BT: Tensor
    """-1 is padding, which sees itself only."""
    branches_BT: Tensor

    def visible_BTT(self, window: int | None) -> Tensor:
        """True where query (second axis) may see key (third), within the window if there is one."""
        length = self.segments_BT.shape[1]
        device = self.segments_BT.device
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
        seen = seen & (self.segments_BT[:, :, None] == self.segments_BT[:, None, :])
        keys_BT1 = self.branches_BT[:, None, :]
        seen = seen & ((keys_BT1 == 0) | (keys_BT1 == self.branches_BT[:, :, None]))
        if window is not None:
            # Positions, not columns: another completion may lie between a token and its prompt.
            back = self.position_ids_BT[:, :, None] - self.position_ids_BT[:, None, :]
            seen = seen & (back < window)
        return seen


@dataclass(frozen=True, slots=True)
class Masking:
    """How a model takes its masks."""

    windows: dict[str, int | None]
    """Kind of layer -> its sliding window."""
    flex: bool

    def build(self, layout: Layout, dtype: torch.dtype) -> Any:
        """What goes in as `attention_mask`: one mask, or one for each kind of layer."""
        make = self._block if self.flex else self._additive
        masks = {kind: make(layout, window, dtype) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @staticmethod
    def _additive(layout: Layout, window: int | None, dtype: torch.dtype) -> Tensor:
        # Eager attention adds what it gets, so a boolean mask would be wrong without a word; and in
        # the precision of the queries, so that layers need no copies of their own.
        seen = layout.visible_BTT(window)[:, None]
        hidden = torch.full_like(seen, torch.finfo(dtype).min, dtype=dtype)
        return hidden.masked_fill(seen, 0)

    @staticmethod
    def _block(layout: Layout, window: int | None, dtype: torch.dtype) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        visible_BTT = layout.visible_BTT(window)
        rows, length, _ = visible_BTT.shape
        return create_block_mask(
            lambda b, _, q, k: visible_BTT[b, q, k],
            rows,
            None,
            length,
            length,
            device=str(visible_BTT.device),
        )


def masking(model: nn.Module) -> Masking | str:
    """How a Transformers model takes packed rows, or why it can't."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    attention = config._attn_implementation
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = [FULL if window is None else SLIDING]
    odd = sorted(set(kinds) - {FULL, SLIDING})
    if getattr(model, "_is_stateful", False):
        return "it has layers with a state, which would leak from one completion into the next"
    if odd:
        return f"its layers are {', '.join(odd)}, which no mask here describes"
    if attention not in (*ADDITIVE, FLEX):
        return f"attention {attention} takes no mask of this kind; sdpa and eager do"
    if getattr(config, "alibi", False):
        return "its position biases count tokens of the row, not positions"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position ids"
    windows = {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}
    return Masking(windows, attention == FLEX)
