"""Logits of a user's pipeline: those that cannot be are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from es_megatron.errors import ConfigError
from es_megatron.frameworks.gradient_norm import checked_logits, norm_bounds, square_sums

BATCH, TOKENS, VOCABULARY = 2, 5, 7


def test_the_bound_is_the_norm_of_softmax_minus_target():
    logits_TBV = torch.randn(TOKENS, BATCH, VOCABULARY, requires_grad=True)
    target_BT = torch.randint(VOCABULARY, (BATCH, TOKENS))
    losses_BT = torch.nn.functional.cross_entropy(logits_TBV.permute(1, 2, 0), target_BT, reduction="none")
    mask_BT = torch.ones(BATCH, TOKENS)
    mask_BT[0, 3:] = 0
    ((losses_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)).sum().backward()
    assert logits_TBV.grad is not None
    expected_B = logits_TBV.grad.square().sum(dim=(0, 2)).sqrt()
    bounds_B = norm_bounds(losses_BT, mask_BT, square_sums(checked_logits(logits_TBV, losses_BT)))
    torch.testing.assert_close(bounds_B, expected_B)


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        (torch.zeros(BATCH, TOKENS, VOCABULARY), r"they have the shape \[2, 5, 7\]"),
        (torch.zeros(BATCH, TOKENS), r"they have the shape \[2, 5\]"),
        ((torch.zeros(TOKENS, BATCH, VOCABULARY),), "they have the type tuple"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(outputs: Any, told: str):
    with pytest.raises(ConfigError, match=told):
        checked_logits(outputs, torch.zeros(BATCH, TOKENS))
