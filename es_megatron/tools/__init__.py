"""Commands: what a user runs, and what they need."""
