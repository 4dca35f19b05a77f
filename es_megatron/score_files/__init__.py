"""Scores as files: `es-megatron scores`."""
