"""Configs of runs that teams have (scripts, argument lists, YAML, JSON), read as they would be run."""
