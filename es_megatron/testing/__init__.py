"""Megatron and DeepSpeed on a machine without a GPU: for tests, and for trying things out."""

from __future__ import annotations


def prepare_cpu(upstream: str) -> bool:
    """Make an upstream importable and its scripts runnable without CUDA; where there is CUDA nothing is done.

    Args:
        upstream: `megatron-lm` or `megatron-deepspeed`.

    Returns:
        Whether the CPU layer is in place.
    """
    if upstream == "megatron-deepspeed":
        from es_megatron.testing import megatron_deepspeed_cpu

        return megatron_deepspeed_cpu.install()
    from es_megatron.testing import megatron_lm_cpu

    if not megatron_lm_cpu.install():
        return False
    megatron_lm_cpu.adapt_megatron_core()
    return True
