"""Loss spikes: the rows behind one, and leaving rows out of a run."""
