"""The report of a run: what was selected, what it cost and what it saved, as one HTML page."""
