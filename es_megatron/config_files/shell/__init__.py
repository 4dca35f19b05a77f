"""Reads bash scripts as they would run, as far as the text tells; nothing is run."""
