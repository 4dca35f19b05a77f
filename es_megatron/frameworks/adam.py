"""An Adam with one step count per parameter group, for where neither Transformer Engine nor Apex is installed.

torch's AdamW counts steps per parameter. Megatron-Core's distributed optimizer cannot load that from a checkpoint,
since it keeps what is not a tensor of a parameter's size per group, as the Adams of Apex and Transformer Engine do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam

from es_megatron.errors import ConfigError

SWITCHES = {"capturable": "Leave `optimizer_cuda_graph` (`--optimizer-cuda-graph`) off"}
"""What sets a switch in Megatron-Core, where it has another name there."""


class GroupAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980), or AdamW (arXiv 1711.05101), with `step` kept in each parameter group.

    Takes what Megatron-Core gives Apex's FusedAdam. The arithmetic is torch's own fused kernel, so that the update
    equals `torch.optim.AdamW(..., fused=True)` bit for bit.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        **switches: Any,
    ) -> None:
        """Take parameters or groups of them; `adam_w_mode` decouples the weight decay from the gradient.

        Args:
            params: parameters, or groups with settings of their own.
            lr: learning rate.
            betas: decays of the two moments.
            eps: added to the root of the second moment.
            weight_decay: its factor.
            adam_w_mode: whether weight decay is decoupled from the gradient.
            switches: what Megatron-Core hands over beyond that (`capturable` since 0.17), all of it off.

        Raises:
            ConfigError: one of them is on.
        """
        for name, value in switches.items():
            if value not in (None, False):
                raise ConfigError(
                    f"`{name}` must be off without Transformer Engine or Apex, but is {value!r} instead: the Adam in "
                    f"their place does not have it. {SWITCHES.get(name, 'Switch it off')}, or install one of them."
                )
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; empty groups count too, so that all counts stay equal."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            self._step_group(group)
            group["step"] += 1
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state_of(param) for param in params]
        adam(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.tensor(float(group["step"])) for _ in params],
            fused=True,
            decoupled_weight_decay=self.adam_w_mode,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def install() -> bool:
    """Have Megatron-Core use `GroupAdam` where it would fall back to torch's AdamW.

    Returns:
        Whether it does: False, and nothing is changed, where Apex or Transformer Engine is installed.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if getattr(optimizer, "Adam", None) is GroupAdam:
        return True
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return False
    optimizer.Adam = GroupAdam  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupAdam  # pyright: ignore[reportAttributeAccessIssue] - it accepts no other class
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return True
