"""The training frameworks Evolved Sampling attaches to; with the trainer, the only importers of their packages."""
