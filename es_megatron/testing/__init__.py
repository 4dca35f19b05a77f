"""Megatron and DeepSpeed on a machine without a GPU: for tests, and for trying things out."""
