"""The bound against autograd."""

from __future__ import annotations

import torch

from es_megatron.frameworks.gradient_norm import norm_bounds, square_sums

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
    torch.testing.assert_close(norm_bounds(losses_BT, mask_BT, square_sums(logits_TBV)), expected_B)
