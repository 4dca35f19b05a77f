"""Reference models: a small one trained, and the loss that a model has of every row of a blend."""
