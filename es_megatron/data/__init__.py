"""Data order: which sample stands at which position. numpy only."""
