"""What Evolved Sampling refuses, as tables that run time, config patching and `doctor` read."""
