"""Top-p filtering without sorting the vocabulary.

A full sort of 128 rows of 49,152 logits takes longer on a CPU than the forward pass of a small
model. The nucleus is nearly always within the largest few hundred logits, so those are taken
first, and all are only where some row needs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 256


def keep_nucleus(logits_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Logits with all but each row's nucleus at -inf.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p (Holtzman
    et al. 2020); tokens tied with its last one stay too. A top_p of 1 keeps every token: rounding
    must not cut the tail of a distribution that was asked for whole.
    """
    whole_B = top_p_B >= 1
    if bool(whole_B.all()):
        return logits_BV
    size = min(FIRST, logits_BV.shape[-1])
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    while True:
        largest_BK = logits_BV.topk(size, dim=-1).values
        probability_BK = (largest_BK - total_B1).exp()
        before_BK = probability_BK.cumsum(-1) - probability_BK
        reached = before_BK[:, -1] + probability_BK[:, -1] >= top_p_B
        reached |= whole_B
        if size == logits_BV.shape[-1] or bool(reached.all()):
            break
        size = min(8 * size, logits_BV.shape[-1])
    outside_BK = before_BK >= top_p_B[:, None]
    # The most likely token always stays.
    outside_BK[:, 0] = False
    least_B1 = largest_BK.masked_fill(outside_BK, torch.inf).amin(-1, keepdim=True)
    least_B1 = least_B1.masked_fill(whole_B[:, None], -torch.inf)
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
