"""The engine's step over a fake framework, against Algorithm 1 written out in plain Python over a whole run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_megatron.algorithm.evolution import NO_LOSS
from es_megatron.algorithm.randomness import Purpose, component_key, uniforms
from es_megatron.core.engine import EvolvedSampling
from es_megatron.core.step import Trained, Work
from es_megatron.data.manifest import Manifest
from es_megatron.data.permutation import permutation
from es_megatron.errors import CheckpointError, LayoutError, LossError
from es_megatron.rank_grid import RankGrid
from tests.es_config import es_config
from tests.unit.naive import make_manifest

B = 16
SIZES = (60, 25, 6)
Losses = Callable[[int, int], float]


def loss_of(sample: int, iteration: int) -> float:
    """A loss between about 0.2 and 5 that differs by sample, falls, and is never the same twice."""
    return float(
        np.float32(
            (0.2 + 4 * ((sample * 7919) % 101) / 101) * math.exp(-iteration / 40) + 0.01 * math.sin(iteration * sample)
        )
    )


class Fake:
    """A framework whose losses are a function of sample and iteration; it notes what it was asked."""

    loss_source = 0

    def __init__(self, engine: EvolvedSampling, losses: Losses = loss_of) -> None:
        self.engine, self.losses = engine, losses
        self.batch: Any = None
        self.scored: list[int] = []
        self.trained: list[list[int]] = []
        self.weights: list[Any] = []

    def of(self, positions: Any, batch: Any = None) -> Any:
        ids = (self.batch if batch is None else batch).id[positions].tolist()
        return np.asarray([self.losses(n, self.engine.iteration) for n in ids], np.float32)

    def score(self, positions: Any) -> Any:
        self.scored.append(self.engine.iteration)
        return self.of(positions)

    def train(self, work: Work) -> Trained:
        self.trained.append(work.positions.tolist())
        self.weights.append(work.weights)
        ahead = None if work.ahead is None else self.of(self.engine.own, work.ahead)
        return Trained("result", self.of(work.positions) if work.capture else None, ahead)

    def iterate(self, *, succeeded: bool = True) -> Any:
        self.batch = self.engine.draw()
        assert self.engine.step(self.batch, self) == "result"
        self.engine.finish(succeeded)
        return self.engine.last


def make(
    manifest: Manifest | None = None, *, samples: int = 40 * B, micro: int = 1, **settings: Any
) -> EvolvedSampling:
    options = {"pruning_ratio": 0.3, "mask_lag": 3, "seed": 5, "max_bad_losses": 0.5, **settings}
    config = es_config(**{"preset": "paper", **options})
    blend = manifest or make_manifest(SIZES)
    return EvolvedSampling(config, blend, RankGrid.alone(), meta_batch=B, micro_batch=micro, train_samples=samples)


class Naive:
    """Algorithm 1 over several components, with dictionaries and loops; it shares uniforms and permutations only."""

    def __init__(self, engine: EvolvedSampling, losses: Losses = loss_of) -> None:
        self.config, self.losses = engine.config, losses
        self.schedule, self.manifest = engine.plan.schedule, engine.manifest
        n = self.manifest.total
        self.score = {sample: float(np.float32(1 / n)) for sample in range(n)}
        self.visits = dict.fromkeys(self.score, 0)
        self.kept: dict[tuple[int, int], list[int]] = {}
        self.history: list[list[int]] = []
        self.owed = dict.fromkeys(range(len(SIZES)), Fraction(0))

    def run(self) -> list[list[int]]:
        cfg, phases = self.config, self.schedule.phases
        for t in range(self.schedule.iterations):
            self.prune(t)
            batch = self.batch(t)
            loss = {sample: self.losses(sample, t) for sample in batch}
            weight = self.weights(batch, loss)
            uniform = uniforms(cfg.seed, Purpose.SELECT, 0, t, 0, B)
            keys = [-math.log(u) / w for u, w in zip(uniform, weight, strict=True)]
            chosen = self.choose(batch, keys) if phases.evolving(t) else range(B)
            self.history.append([batch[position] for position in chosen])
            for sample in set(batch):
                self.learn(sample, loss[sample])
        return self.history

    def weights(self, batch: list[int], loss: dict[int, float]) -> list[float]:
        beta1 = self.config.scores.beta1
        return [beta1 * self.score[sample] + (1 - beta1) * loss[sample] for sample in batch]

    def pruning_weight(self, sample: int) -> float:
        """Its score; what was never visited counts as its component's mean, or that of all where nothing of it was."""
        if self.visits[sample]:
            return self.score[sample]
        c = int(self.manifest.locate(np.asarray([sample]))[0][0])
        rows = range(int(self.manifest.offsets[c]), int(self.manifest.offsets[c + 1]))
        seen = [row for row in rows if self.visits[row]] or [row for row in self.score if self.visits[row]]
        return float(np.mean([self.score[row] for row in seen])) if seen else 1 / self.manifest.total

    def learn(self, sample: int, loss: float) -> None:
        beta2 = self.config.decay
        self.score[sample] = beta2 * self.score[sample] + (1 - beta2) * loss
        self.visits[sample] += 1

    def choose(self, batch: list[int], keys: list[float]) -> list[int]:
        """The B / 4 smallest keys: of the meta-batch, or of each component as many as it is owed."""
        order = sorted(range(B), key=lambda position: (keys[position], position))
        if self.config.mixture == "free":
            return sorted(order[: B // 4])
        component = [int(self.manifest.locate(np.asarray([sample]))[0][0]) for sample in batch]
        drawn = Counter(component)
        claim = {c: self.owed[c] + Fraction(drawn[c], 4) for c in range(len(SIZES))}
        given = {c: min(max(math.floor(claim[c]), 0), drawn[c]) for c in claim}
        while sum(given.values()) < B // 4:
            given[max((c for c in claim if given[c] < drawn[c]), key=lambda c: (claim[c] - given[c], -c))] += 1
        while sum(given.values()) > B // 4:
            given[min((c for c in claim if given[c] > 0), key=lambda c: (claim[c] - given[c], c))] -= 1
        self.owed = {c: claim[c] - given[c] for c in claim}
        return sorted(p for c in claim for p in [q for q in order if component[q] == c][: given[c]])

    def prune(self, t: int) -> None:
        """Masks of the pruned epochs whose first draw is `mask_lag` iterations ahead, or sooner at the start."""
        for c, size in enumerate(SIZES):
            first = int(self.manifest.offsets[c])
            name = component_key(self.manifest.components[c].name)
            for epoch in self.starting(c, t):
                uniform = uniforms(self.config.seed, Purpose.PRUNE, name, epoch, 0, size)
                keys = sorted((-math.log(u) / self.pruning_weight(first + row), row) for row, u in enumerate(uniform))
                count = math.ceil(size * 7 / 10)
                self.kept[c, epoch] = sorted(row for _, row in keys[:count])

    def starting(self, c: int, t: int) -> list[int]:
        """Pruned epochs of a component whose first draw stands `mask_lag` iterations after t."""
        found = []
        for position in range((t + self.config.order.mask_lag) * B, (t + self.config.order.mask_lag + 1) * B):
            if position >= self.schedule.iterations * B:
                break
            component, draw = self.schedule.blend.locate(np.asarray([position]))
            place = self.schedule.epochs.place(component, draw)
            if component[0] == c and place.index[0] == 0 and place.pruned[0]:
                found.append(int(place.epoch[0]))
        return found

    def batch(self, t: int) -> list[int]:
        positions = np.arange(t * B, (t + 1) * B)
        component, draw = self.schedule.blend.locate(positions)
        place = self.schedule.epochs.place(component, draw)
        samples = []
        for c, epoch, index, pruned in zip(
            component.tolist(), place.epoch.tolist(), place.index.tolist(), place.pruned, strict=True
        ):
            rows = self.kept[c, epoch] if pruned else list(range(SIZES[c]))
            order = permutation(len(rows), self.config.seed, component_key(f"c{c}"), epoch)
            samples.append(int(self.manifest.offsets[c]) + rows[int(order(np.asarray([index]))[0])])
        return samples


@pytest.mark.parametrize("mixture", ["free", "kept"])
@pytest.mark.parametrize("betas", [(0.2, 0.8), (0.0, 0.0), (1.0, 0.5), (0.5, 0.9)], ids=str)
def test_a_whole_run_equals_algorithm_1_in_plain_python(betas: tuple[float, float], mixture: str) -> None:
    engine = make(beta1=betas[0], beta2=betas[1], selection={"mixture": mixture})
    fake = Fake(engine)
    naive = Naive(engine)
    expected = naive.run()
    masks: dict[tuple[int, int], list[int]] = {}
    chosen = []
    while not engine.done:
        chosen.append(fake.iterate().chosen.tolist())
        masks |= {key: np.flatnonzero(mask.to_bool()).tolist() for key, mask in engine.sampler.masks.items()}
    assert chosen == expected
    assert len(naive.kept) >= 8
    assert {key: rows for key, rows in masks.items() if key in naive.kept} == naive.kept
    stored = {n: float(engine.store.score[n]) for n in range(engine.manifest.total) if engine.store.visits[n]}
    assert stored == pytest.approx({n: naive.score[n] for n in stored}, rel=1e-5)
    assert len(stored) > 80


def run(engine: EvolvedSampling, losses: Losses = loss_of) -> tuple[Fake, list[Any]]:
    fake = Fake(engine, losses)
    records = []
    while not engine.done:
        records.append(fake.iterate())
    return fake, records


def test_masks_follow_the_loader_and_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    """Masks are decided as far ahead as the loader reads; a resumed run keeps to that, and refuses to read further."""

    def started(ahead: int) -> EvolvedSampling:
        engine = make(mask_lag=None)
        engine.epochs.read_ahead(ahead)
        return engine

    engine = started(5)
    assert engine.epochs.lag == 5
    whole = run(started(5))[0].trained
    assert whole != run(started(1))[0].trained, "older scores decide"
    fake = Fake(engine)
    while engine.iteration < 12:
        fake.iterate()
    engine.save(tmp_path / "state")
    other = started(2)
    other.load(tmp_path / "state")
    assert other.epochs.lag == 5
    assert fake.trained + run(other)[0].trained == whole
    with pytest.raises(CheckpointError, match=r"must read at most 5 meta-batches ahead.* but reads 6"):
        started(6).load(tmp_path / "state")


def test_scorers_score_when_they_say() -> None:
    engine = make(scorer="fresh")
    phases = engine.plan.schedule.phases
    assert run(engine)[0].scored == list(range(phases.start, phases.stop))
    assert run(make(scorer="history"))[0].scored == []
    assert run(make(scorer="every-k", score_every=4))[0].scored == [
        t for t in range(phases.start, phases.stop) if t % 4 == 0
    ]
    for arm in ("plain", "uniform", "uniform-prune", "shortened"):
        assert run(make(arm=arm))[0].scored == []


@pytest.mark.parametrize("scorer", ["fresh", "history", "every-k"])
def test_the_plan_counts_what_the_run_does(scorer: str) -> None:
    engine = make(scorer=scorer)
    _, records = run(engine)
    assert sum(record.scored for record in records) == engine.plan.sequences_scored
    assert sum(len(record.chosen) for record in records) == engine.plan.sequences_trained
    assert sum(record.evolving for record in records) == engine.plan.evolving_iterations


def test_history_learns_from_what_it_trains_on_only() -> None:
    engine = make(scorer="history", pruning_ratio=0)
    fake = Fake(engine)
    while not engine.plan.schedule.phases.evolving(engine.iteration):
        fake.iterate()
    for _ in range(10):
        before = engine.store.visits.copy()
        record = fake.iterate()
        changed = np.flatnonzero(engine.store.visits != before)
        assert changed.tolist() == sorted(set(record.chosen.tolist()))


def test_annealing_trains_on_everything_and_learns_from_it() -> None:
    engine = make(anneal=0.25)
    fake = Fake(engine)
    record = fake.iterate()
    assert not record.evolving
    assert fake.trained[0] == list(range(B))
    assert record.meta_loss == pytest.approx(np.mean([loss_of(n, 0) for n in record.chosen.tolist()]))
    score = engine.store.score[record.chosen]
    np.testing.assert_allclose(score, [0.8 / 91 + 0.2 * loss_of(n, 0) for n in record.chosen.tolist()], rtol=1e-6)


def test_a_rerun_counts_once_and_a_skip_not_at_all() -> None:
    engine = make()
    fake = Fake(engine)
    for _ in range(4):
        fake.iterate()
    before = engine.store.checksum()
    fake.iterate(succeeded=False)
    assert engine.store.checksum() == before
    assert engine.iteration == 5
    fake.batch = engine.draw()
    wrong = Fake(engine, lambda n, t: 77.0)
    wrong.batch = fake.batch
    engine.step(fake.batch, wrong)
    engine.step(fake.batch, fake)
    engine.finish(True)
    assert engine.store.score.max() < 5
    assert engine.store.checksum() != before


def test_bad_losses_are_left_out_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    bad = {3: math.nan, 61: math.inf, 88: math.nan}
    engine = make()
    fake, records = run(engine, lambda n, t: bad.get(n, loss_of(n, t)))
    for record in records:
        if record.evolving:
            assert not set(bad) & set(record.chosen.tolist())
    assert not engine.store.visits[list(bad)].any()
    assert np.isfinite(engine.store.score).all()
    assert sum(record.bad for record in records) == sum(
        int(message.split()[0]) for message in caplog.messages if "non-finite" in message
    )
    assert any("c0[3]" in message for message in caplog.messages)
    assert any("c1[1]" in message for message in caplog.messages)
    assert any(record.bad and not record.evolving for record in records), "in annealing too"
    assert fake.trained


def test_rows_without_a_loss_are_not_chosen_and_counted_apart(caplog: pytest.LogCaptureFixture) -> None:
    """All tokens masked: nothing bad, so none of them is told, and no number of them stops the run."""
    masked = set(range(0, 100, 3))
    engine = make(max_bad_losses=0.0)
    _, records = run(engine, lambda n, t: NO_LOSS if n in masked else loss_of(n, t))
    for record in records:
        assert record.bad == 0
        assert math.isfinite(record.meta_loss)
        if record.evolving:
            assert not masked & set(record.chosen.tolist())
    assert sum(record.masked for record in records) > B
    assert not engine.store.visits[sorted(masked & set(range(len(engine.store.visits))))].any()
    assert not [message for message in caplog.messages if "non-finite" in message]


def test_infobatch_weighs_up_only_what_had_a_score() -> None:
    """Debiased, an unseen sample counts as the mean: it is not left out as low, and stands for itself alone."""
    engine = make(scorer="history", policy="uniform", pruner="infobatch", samples=60 * B)
    fake = Fake(engine, lambda sample, iteration: 5 * math.exp(-iteration / 20) * (1 + sample % 7 / 70))
    rescaled = 0
    while not engine.done:
        before = engine.store.visits.copy()
        ids = fake.iterate().chosen
        weights = fake.weights[-1]
        if weights is not None:
            unseen = before[ids] == 0
            assert (weights[unseen] == 1).all()
            rescaled += int(unseen.sum())
    assert rescaled > 20


def test_too_many_bad_losses_stop_the_run() -> None:
    engine = make(max_bad_losses=0.25)
    fake = Fake(engine, lambda n, t: math.nan if n % 2 == 0 else 1.0)
    with pytest.raises(
        LossError, match=r"of iteration 0 have a non-finite loss: c\d\[\d+\].*`selection.max_bad_losses` = 0.25"
    ):
        fake.iterate()


def test_inclusion_weights_go_to_the_right_sequences() -> None:
    engine = make(inclusion_weights=True)
    fake, records = run(engine)
    weighted = [weights for weights in fake.weights if weights is not None]
    assert len(weighted) == engine.plan.evolving_iterations
    assert all(len(weights) == engine.plan.kept and (weights > 0).all() for weights in weighted)
    mean = np.mean([weights.sum() / engine.plan.kept for weights in weighted])
    assert mean == pytest.approx(1, abs=0.25), "unbiased: their mean is 1 in expectation"
    assert records


def test_granularity_microbatch_takes_whole_groups() -> None:
    engine = make(granularity="microbatch", micro=4)
    fake, records = run(engine)
    for positions, record in zip(fake.trained, records, strict=True):
        if record.evolving:
            assert len(positions) == 4
            assert positions == list(range(positions[0], positions[0] + 4))
            assert positions[0] % 4 == 0


def test_high_losses_are_chosen_more_often_and_the_placebo_does_not_know_them() -> None:
    manifest = make_manifest((160,))

    def losses(n: int, t: int) -> float:
        return 5.0 if n % 4 == 0 else 0.2

    def share(**settings: Any) -> float:
        chosen = np.concatenate(
            [
                r.chosen
                for r in run(make(manifest, samples=120 * B, pruning_ratio=0.0, **settings), losses)[1]
                if r.evolving
            ]
        )
        return float((chosen % 4 == 0).mean())

    assert share() > 0.6
    assert share(arm="shuffled") == pytest.approx(0.25, abs=0.06)
    assert share(arm="uniform") == pytest.approx(0.25, abs=0.06)
    assert share(scorer="history") > 0.4


def test_state_comes_back_only_into_the_same_run() -> None:
    engine = make()
    fake = Fake(engine)
    for _ in range(12):
        fake.iterate()
    state, masks = engine.state_dict(), dict(engine.sampler.masks)
    assert masks
    other = make()
    other.load_state_dict(state, masks)
    other.store.load(engine.store.score.copy(), engine.store.visits.copy())
    twin = Fake(other)
    while not engine.done:
        assert fake.iterate().chosen.tolist() == twin.iterate().chosen.tolist()
    assert other.done
    with pytest.raises(CheckpointError, match="`seed` was 5 and is 6"):
        make(seed=6).load_state_dict(state, masks)
    for changes, told in (
        ({"policy_options": ("power=3",)}, r"`selection.options` was \[\] and is \['power=3'\]"),
        ({"beta2": 0.5}, r"`scores.beta2` was 0.8 and is 0.5"),
        ({"score_correction": "debiased"}, r"`scores.correction` was 'paper' and is 'debiased'"),
    ):
        with pytest.raises(CheckpointError, match=told):
            make(**changes).load_state_dict(state, masks)
    with pytest.raises(CheckpointError, match=r"must have the keys .*more"):
        make().load_state_dict({**state, "more": 1}, masks)


def test_copies_that_differ_are_told_apart() -> None:
    class TwoRanks(RankGrid):
        def gather_objects(self, value: Any) -> list[Any]:
            data_rank, _, checksum = value
            return [(data_rank, 0, checksum), (data_rank, 1, self.other(checksum))]

        def other(self, checksum: int) -> int:
            return checksum + wrong

    engine = make()
    engine.grid = TwoRanks(0, 1, 0, 2, 0, 2)
    wrong = 0
    engine.check_copies()
    wrong = 1
    with pytest.raises(LayoutError, match=r"data-parallel rank 0 must be equal .* differ before iteration 0"):
        engine.check_copies()
