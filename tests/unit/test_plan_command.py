"""`es-megatron plan`: the trainer's own plan, numbers that add up, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from es_megatron.cli import main
from es_megatron.forecast.text import bytes_of, hours_of
from es_megatron.trainer import passes
from es_megatron.trainer import settings as trainer_settings
from tests.ranks_helper import run_on_ranks
from tests.small_run import settings_of, train, write_blend

BASE = ["--es-preset", "paper", "--seq-length", "128", "--global-batch-size", "64", "--micro-batch-size", "4"]
ONE = ["--samples", "4000", *BASE, "--data-parallel", "2"]


def plan_of(capsys: Any, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: Any, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def test_the_plan_of_a_config_is_the_one_its_trainer_prints(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(passes, "quickest", lambda *_: [0.008, 0.021, 0.01])
    settings = settings_of(write_blend(tmp_path / "data"), tmp_path / "run", "training.train_samples=96")
    file = tmp_path / "run.yaml"
    changed = {
        "model": {"num_layers": 4, "hidden_size": 32, "seq_length": 16, "ffn_hidden_size": 64},
        "data": {"blend": str(settings.data.blend)},
        "training": {"train_samples": 96, "global_batch_size": 16, "micro_batch_size": 1},
        "evolved_sampling": {
            "preset": "paper",
            "pruning_ratio": 0.3,
            "mask_lag": 4,
            "scoring_micro_batch_size": 4,
            "seed": 7,
        },
    }
    file.write_text(yaml.safe_dump(changed))
    run_on_ranks(1, train, settings)
    capsys.readouterr()
    facts = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["plan"]
    measured = facts["layout"]
    ratio = measured["backward"] / measured["forward"]
    speeds = ["--forward-seconds", str(measured["forward"]), "--backward-over-forward", str(ratio)]
    speeds += ["--scoring-forward-seconds", str(measured["scoring_forward"])]
    assert main(["plan", "--config", str(file), "--world-size", "1", *speeds]) == 0
    told = capsys.readouterr().out.splitlines()
    printed = (tmp_path / "run" / "log.txt").read_text().splitlines()
    printed = printed[: next(at for at, line in enumerate(printed) if line.startswith("["))]
    assert len(printed) == 8
    loss = next(at for at, line in enumerate(told) if at > 1 and not line.startswith(" " * 20)) - 1
    assert told[1].startswith("  loss")
    assert [told[0], *told[1 + loss : len(printed) + loss]] == printed
    found = plan_of(capsys, "--config", str(file), "--world-size", "1", *speeds)["plan"]
    assert found.pop("components") == facts.pop("components")
    assert found.pop("layout") == pytest.approx(facts.pop("layout"))
    assert found == pytest.approx(facts)


def test_the_numbers_of_the_cost_model(capsys: Any) -> None:
    found = plan_of(capsys, *ONE, "--passes", "100", "--es-selection-anneal", "0")
    assert found["saving"] == pytest.approx(0.4167, abs=1e-3)
    assert found["break_even"]["ratio"] == found["break_even"]["layout_ratio"] == pytest.approx(2 / 3)
    assert found["break_even"]["uniform_more"] == pytest.approx(64 / 3)
    assert found["break_even"]["uniform_kept"] == 40
    assert found["lr_factor"] == 0.5
    assert found["footprint"]["score_bytes_per_rank"] == 5 * 2000
    assert found["footprint"]["exchange_bytes"] == 12 * 64
    again = plan_of(capsys, *ONE, "--recompute", "full")["break_even"]
    assert again["ratio"] == pytest.approx(3 / 4)
    assert again["uniform_more"] == pytest.approx(64 / 4)


@pytest.mark.parametrize(("scorer", "price"), [("history", 0.0), ("every-k", 0.25)], ids=["history", "every-k"])
def test_cheaper_scorers_have_to_be_worth_less(capsys: Any, scorer: str, price: float) -> None:
    found = plan_of(capsys, *ONE, "--passes", "100", "--es-scorer", scorer)
    assert found["break_even"]["price"] == pytest.approx(price, abs=0.01)
    assert found["break_even"]["ratio"] == pytest.approx(1 - price / 3, abs=0.01)
    assert found["footprint"]["exchange_bytes"] == 24 * 64 + 16


@pytest.mark.parametrize(("precision", "more"), [("float32", 4), ("float16", 2)])
def test_a_reference_is_counted(capsys: Any, precision: str, more: int) -> None:
    by = ["--es-selection-policy", "reducible", "--es-reference", "losses", "--es-reference-precision", precision]
    found = plan_of(capsys, *ONE, "--passes", "100", *by)["footprint"]
    assert found["sample_bytes"] == 5 + more
    assert found["score_bytes_per_rank"] == (5 + more) * 2000
    assert found["exchange_bytes"] == (24 + 8) * 64 + 16 + 8 * 5


def test_the_parts_of_the_time_are_the_prediction(capsys: Any) -> None:
    pipeline = [
        "--es-preset",
        "paper",
        "--pipeline",
        "4",
        "--virtual",
        "2",
        "--micro-batch-size",
        "1",
        "--seq-length",
        "64",
    ]
    found = plan_of(
        capsys, "--samples", "4000", "--global-batch-size", "64", *pipeline, "--es-selection-keep-ratio", "0.5"
    )
    split = found["time_split"]
    parts = [split[name] for name in ("scoring", "training", "scoring_ramps", "training_ramps")]
    assert min(parts) > 0
    assert split["saved"] == pytest.approx(found["saving"])
    assert sum(parts) == pytest.approx(1 - found["saving"])
    assert split["training_ramps"] / split["training"] > split["scoring_ramps"] / split["scoring"]
    assert found["break_even"]["layout_ratio"] < found["break_even"]["ratio"]


def test_parameters_and_flops_give_hours(capsys: Any) -> None:
    cluster = ["--data-parallel", "2", "--tensor", "2", "--parameters", "7e9", "--flops-per-gpu", "4e14"]
    found = plan_of(capsys, "--samples", "64000", *BASE, *cluster)
    duration = found["duration"]
    assert duration["plain_iteration"] == pytest.approx(6 * 7e9 * 64 * 128 / (4 * 4e14))
    assert duration["plain_hours"] == pytest.approx(1000 * duration["plain_iteration"] / 3600)
    assert duration["hours"] == pytest.approx(duration["plain_hours"] * (1 - found["saving"]))
    assert duration["source"].startswith("estimate")
    measured = plan_of(capsys, *ONE, "--forward-seconds", "0.5")["duration"]
    assert measured["source"] == "measured forward"
    assert measured["plain_iteration"] == pytest.approx(64 / (4 * 2) * 1.5)
    assert plan_of(capsys, *ONE)["duration"] is None


def test_components_draw_by_weight_or_by_size(capsys: Any) -> None:
    sizes = ["--component", "web:3e4:0.5", "--component", "code:1e4:0.5", *BASE]
    web, code = plan_of(capsys, *sizes, "--passes", "2")["plan"]["components"]
    assert (web["samples"], web["share"], code["share"]) == (30_000, 0.5, 0.5)
    assert code["passes"] == pytest.approx(4, abs=0.01)
    by_size = plan_of(capsys, "--component", "web:3e4", "--component", "code:1e4", *BASE)["plan"]["components"]
    assert [each["share"] for each in by_size] == [0.75, 0.25]


def test_flags_win_over_the_file(capsys: Any) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "small.yaml")
    small = ["--config", config, "--samples", "5000", "--world-size", "2"]
    assert plan_of(capsys, *small)["plan"]["anneal"] == 0.05
    assert plan_of(capsys, *small)["lr"] == pytest.approx(1e-2 * 0.5**0.5)
    changed = plan_of(
        capsys, *small, "--es-selection-keep-ratio", "0.25", "--train-samples", "640", "training.micro_batch_size=2"
    )
    assert (changed["plan"]["kept"], changed["plan"]["plain_iterations"]) == (16, 10)
    assert changed["plan"]["anneal"] == 0.05
    assert changed["plan"]["layout"]["micro_batches"] == 16


def test_a_plan_that_costs_more_says_so(capsys: Any) -> None:
    assert "costs more than the plain one" in plan_of(capsys, *ONE, "--es-selection-keep-ratio", "0.75")["warnings"][0]
    assert plan_of(capsys, *ONE)["warnings"] == []
    assert main(["plan", *ONE, "--es-selection-keep-ratio", "0.75"]) == 0
    text = capsys.readouterr().out
    assert "WARNING" in text
    assert "which is the whole meta-batch" in text


def test_the_text_tells_all_of_it(capsys: Any) -> None:
    more = ["--recompute", "full", "--lr", "1e-3", "--es-pruning-ratio", "0.2", "--passes", "3", "--pipeline", "2"]
    assert main(["plan", *ONE, *more, "--parameters", "1e9", "--flops-per-gpu", "1e14"]) == 0
    text = capsys.readouterr().out
    for part in (
        "with recompute",
        "ramps of the pipeline",
        "10 kB on each of 2 data-parallel ranks (5 B a sample), 20 kB in all",
        "(1.15 bits a sample)",
        "768 B a step (12 B a sequence",
        "1 - c/4, c = 1",
        "0.001 -> 0.0005 (lr x sqrt(b/B) = lr x 0.5)",
        "rule of thumb",
        "estimate: 8 FLOP, 2 of them recomputed",
    ):
        assert part in text
    assert main(["plan", "--samples", "100", *BASE, "--es-arm", "plain"]) == 0
    text = capsys.readouterr().out
    assert "one data-parallel rank is assumed" in text
    assert "break-even" not in text
    assert [bytes_of(n) for n in (7, 999.7, 1.45e8)] == ["7 B", "1 kB", "145 MB"]
    assert [hours_of(n) for n in (0.1038, 25180.2)] == ["0.104 h", "25,180 h"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--samples", "10"], "--global-batch-size, --micro-batch-size, --seq-length must be given"),
        (BASE, "Give `--samples N`, or `--component NAME:SAMPLES"),
        ([*ONE, "--component", "a:1"], "`--samples` must not be given with `--component`"),
        ([*BASE, "--component", "a"], "must be NAME:SAMPLES or NAME:SAMPLES:WEIGHT, but is 'a'"),
        ([*BASE, "--component", "a:0"], "must have at least 1 sample"),
        ([*ONE, "--parameters", "7e9"], "`parameters` must be given with `flops`"),
        ([*ONE, "--forward-seconds", "-1"], "`forward` must be > 0"),
        ([*ONE, "--es-selection-keep-ratio", "0.3"], "must be a multiple of 8 .* Use `keep_ratio`"),
        ([*ONE, "--world-size", "3"], "Give one of `--world-size` and `--data-parallel`"),
        (["--samples", "9", *BASE, "--world-size", "3", "--tensor", "2"], "multiple of tensor x pipeline"),
        (["--samples", "9", *BASE, "--data-parallel", "3"], "Use 60, or a smaller `micro_batch_size`"),
        ([*ONE, "--virtual", "2"], "`pipeline` must be above 1 with `virtual_pipeline`"),
        ([*ONE, "--pipeline", "4", "--virtual", "2"], "times pipeline size when interleaved"),
        ([*ONE, "--es-scorer-micro-batch-size", "7"], r"Use one of \[1, 2, 4, 8, 16, 32\]"),
        ([*ONE, "--no-es"], "leaves nothing to plan"),
        ([*ONE, "training.lr=1"], "must come with `--config FILE`"),
        (["--config", "nowhere.yaml"], "`nowhere.yaml` cannot be read"),
        ([*ONE, "--gpus-per-node", "0"], "`--gpus-per-node` must be >= 1"),
        ([*ONE, "--es-scores-initial", "nowhere"], "must be an `es_state` folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_refused(capsys: Any, arguments: list[str], told: str) -> None:
    error = refusal(capsys, *arguments)
    assert error.startswith("es-megatron plan: error: ")
    assert re.search(told, error), error


def test_a_config_without_its_blend_can_be_told_the_sizes(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"data": {"blend": str(tmp_path / "none.yaml")}, "training": {"passes": 1}}))
    assert "Or tell its sizes with `--samples N`" in refusal(capsys, "--config", str(file))
    assert plan_of(capsys, "--config", str(file), "--samples", "320")["plan"]["plain_iterations"] == 10


def test_unknown_flags_are_refused(capsys: Any) -> None:
    for arguments in (["--nonsense"], ["--samples", "1.5"], ["--es-scorer", "none"]):
        with pytest.raises(SystemExit):
            main(["plan", *ONE, *arguments])
        assert arguments[0] in capsys.readouterr().err


def test_draws_of_a_run() -> None:
    assert trainer_settings.TrainingSettings(passes=0.5).draws(11) == round(5.5)
    assert trainer_settings.TrainingSettings(train_samples=7).draws(11) == 7
    assert math.isclose(trainer_settings.TrainingSettings(passes=1e-9).draws(11), 1)
