"""What is looked at before a run: `doctor`, `preflight`, and the settings of configs."""
