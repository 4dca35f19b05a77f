"""One step of Evolved Sampling, written once: engine, choice, plan, and the numbers they report."""
