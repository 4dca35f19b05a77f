"""Decisions of Evolved Sampling as pure functions: arrays in, arrays out, no I/O and no network."""
