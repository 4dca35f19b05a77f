"""Configs that teams already have: read, check, patch with Evolved Sampling, and restore byte for byte."""
