"""Merged scoring through unmodified Megatron-LM: `MEGATRON_LM=CHECKOUT make test-megatron-lm`."""

from __future__ import annotations

import pytest

from tests.end_to_end.test_megatron_lm import LAYOUTS, SHORT, pytestmark, site, succeeded, weights
from tests.megatron_lm_helper import SCORES, Outcome, Site

__all__ = ["pytestmark", "site", "weights"]

MERGED = ["--es-scorer-overlap", "merged"]


@pytest.fixture(scope="module")
def alone(site: Site, weights: list[str]) -> Outcome:
    return succeeded(site.run("merged-alone", [*SHORT, *SCORES, *MERGED, *weights]))


@pytest.mark.parametrize("layout", ["PP2", "VPP2", "PP2xDP2"])
def test_merged_scoring_chooses_alike_on_every_layout(
    site: Site,
    weights: list[str],
    alone: Outcome,
    layout: str,
) -> None:
    ranks, flags = LAYOUTS[layout]
    outcome = succeeded(site.run(f"merged-{layout}", [*SHORT, *SCORES, *MERGED, *weights, *flags], ranks=ranks))
    assert outcome.chosen() == alone.chosen()
    assert outcome.meta_losses() == pytest.approx(alone.meta_losses(), rel=2e-6)


def test_prefixes_are_refused(site: Site) -> None:
    outcome = site.run("merged-prefix", [*SHORT, *SCORES, *MERGED, "--es-scorer", "prefix"])
    assert outcome.code != 0
    assert "`--es-scorer-overlap` must be none with `--es-scorer prefix`" in outcome.text
