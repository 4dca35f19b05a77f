"""Settings of a run: what is read, and what is refused with which words."""

from pathlib import Path

import pytest
import yaml

from es_megatron.errors import ConfigError, LayoutError
from es_megatron.trainer.settings import (
    DataSettings,
    ModelSettings,
    ParallelSettings,
    PretrainSettings,
    TrainingSettings,
    check_layout,
    load_settings,
)
from tests.es_config import es_config

MINIMAL = {"data": {"blend": "data/blend.yaml"}, "training": {"passes": 3}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def settings_of(parallel=None, *, micro_batch_size=4, global_batch_size=32, **model):
    return PretrainSettings(
        model=ModelSettings(**model),
        parallel=parallel or ParallelSettings(),
        data=DataSettings(blend=Path("blend.yaml")),
        training=TrainingSettings(passes=1.0, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size),
    )


def test_a_minimal_file_gives_the_defaults(path):
    settings = load_settings(path)
    assert settings.data == DataSettings(blend=Path("data/blend.yaml"))
    assert settings.training == TrainingSettings(passes=3.0)
    assert settings.model == ModelSettings()
    assert settings.evolved_sampling == es_config()


def test_overrides_win_and_may_open_a_section(path):
    settings = load_settings(
        path,
        [
            "training.passes=null",
            "training.train_samples=640",
            "training.lr=3e-4",
            "parallel.tensor=2",
            "run.directory=x=y",
        ],
    )
    assert (settings.training.passes, settings.training.train_samples, settings.training.lr) == (None, 640, 3e-4)
    assert settings.parallel.tensor == 2
    assert settings.run.directory == Path("x=y")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "Unknown key `learning_rat` in `{path} and the command line: training`"),
        ("trainin.lr=1", "Unknown key `trainin` .* Did you mean `training`"),
        ("model.num_layer=1", "Did you mean `num_layers`"),
        ("training.lr", "section.key=value"),
        (".lr=1", "section.key=value"),
        ("training.passes.x=1", "no section"),
        ("training.lr={", "must be YAML"),
        ("model.num_layers=two", "num_layers` must be of type int"),
        ("model.num_layers=0", "`num_layers` must be >= 1, but is 0"),
        ("model.normalization=RMSnorm", "Did you mean `RMSNorm`"),
        ("model.hidden_size=130", "`hidden_size` must be a multiple of 4 heads"),
        ("model.num_query_groups=3", "a divisor of 4 heads"),
        ("model.dropout=1.0", r"in \[0, 1\)"),
        ("training.train_samples=5", "but both are"),
        ("training.passes=null", "but neither is"),
        ("training.min_lr=1", "`min_lr` must be in"),
        ("training.warmup=1.0", "`warmup` must be in"),
        ("training.precision=fp16", "one of fp32, bf16"),
        ("parallel.virtual_pipeline=2", "`pipeline` to 2 or more"),
        ("parallel.overlap_param_gather=true", "needs `distributed_optimizer`"),
        ("parallel.sequence_parallel=true", "splits nothing"),
        ("parallel.tensor=3", "`num_attention_heads` must be a multiple of tensor-parallel size 3"),
        ("parallel.pipeline=3", "`num_layers` must be a multiple of pipeline size x chunks per rank = 3, but is 4"),
        ("evolved_sampling.order.mask_lag=1", "`prefetch` must be at most `order.mask_lag` = 1, but is 2"),
        ("run.keep_checkpoints=0", "`keep_checkpoints` must be >= 1"),
    ],
)
def test_what_cannot_be_is_refused(path, override, message):
    with pytest.raises(ConfigError, match=message.replace("{path}", str(path))):
        load_settings(path, [override])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "must be YAML"), ("- a", "mapping of sections"), ("", "mapping")]
)
def test_a_file_that_holds_no_settings_is_refused(path, text, message):
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_settings(tmp_path / "missing.yaml")


def test_the_feed_forward_width_is_filled_in():
    assert ModelSettings(hidden_size=128, swiglu=False).ffn_size == 512
    assert ModelSettings(hidden_size=128).ffn_size == 384  # 8/3 x 128 = 341.3
    assert ModelSettings(hidden_size=192).ffn_size == 512  # 8/3 x 192 exactly
    assert ModelSettings(ffn_hidden_size=100).ffn_size == 100


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        (settings_of(), 1),
        (settings_of(), 8),
        (settings_of(ParallelSettings(tensor=2, pipeline=2)), 4),
        (settings_of(ParallelSettings(pipeline=2, virtual_pipeline=2)), 4),
    ],
)
def test_a_layout_that_fits_is_accepted(settings, world_size):
    check_layout(settings, world_size)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (settings_of(ParallelSettings(tensor=2, pipeline=2)), 6, "2 x 2, but is 6 instead. Start 8,"),
        (settings_of(), 3, "4 x 3, but is 32 instead. Use 36"),
        (settings_of(global_batch_size=2), 1, "4 x 1, but is 2 instead. Use 4"),
        (settings_of(ParallelSettings(pipeline=2, virtual_pipeline=2), global_batch_size=12), 2, "2 stages .* are 3"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(settings, world_size, message):
    with pytest.raises(LayoutError, match=message):
        check_layout(settings, world_size)
