"""The sizes that every framework's side of `benchmarks.step` shares."""

VOCAB = 2048
MICRO_BATCH = 4
