"""Health while training, by the hook: what is written and logged, when, what it warns of, and what is put off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import scenes, tasks
from toy.watched import training_on

from ssl_eo.distributed import rank
from ssl_eo.eval.budget import TimeBudget
from ssl_eo.eval.collapse import CollapseWatch
from ssl_eo.eval.features import Encode
from ssl_eo.eval.hook import EvalConfig, EvalHook
from ssl_eo.jsonl import read_jsonl
from ssl_eo.models.vit import Encoder, EncoderInput, Tokens

CPU = torch.device("cpu")
TAPS = [0.5, 1.0]


def _hook(run_dir: Path, **changes: Any) -> EvalHook:
    cfg = EvalConfig(health_every_n_steps=5, health_samples=20, taps=TAPS, batch_size=8)
    training = training_on(scenes.Config(n=60), scenes.Config(n=60, seed=1))
    return EvalHook(replace(cfg, **changes), run_dir, CPU, training)


def _encoder() -> tuple[Encoder, Encode]:
    encoder = tasks.encoder()
    return encoder, lambda inputs: encoder.intermediates(inputs, [0, 1])


def _records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_jsonl(run_dir / "eval.jsonl") if r["kind"] == kind]


def test_health_is_written_and_logged_for_every_source_and_tap(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    found = _hook(tmp_path).run(encode, 5, encoder, ["health"])
    records = _records(tmp_path, "health")
    places = [
        ("toy.scenes", "depth_0.50"),
        ("toy.scenes", "last"),
        ("toy.scenes@1", "depth_0.50"),
        ("toy.scenes@1", "last"),
    ]
    assert [(r["source"], r["tap"]) for r in records] == places
    for r in records:
        assert (r["step"], r["features"], r["n_samples"], r["n_features"], r["collapsed"]) == (5, "encoder", 20, 16, [])
        assert r["seconds"] > 0
        for name in ("effective_rank", "uniformity", "spread_ratio", "mean_norm", "cls_patch_cosine", "dead_ratio"):
            assert found[f"health/{r['source']}/{r['tap']}/{name}"] == r[name]
    assert len({key.rpartition("/")[0] for key in found}) == 4


def test_the_same_samples_are_measured_every_time_and_after_a_resume(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    hook = _hook(tmp_path)
    first = hook.run(encode, 5, encoder, ["health"])
    assert hook.run(encode, 10, encoder, ["health"]) == first
    assert _hook(tmp_path).run(encode, 15, encoder, ["health"]) == first


def test_probes_have_the_same_measures(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    hook = _hook(tmp_path, every_n_steps=10, tasks=[tasks.task()], controls=False)
    hook.run(encode, 10, encoder)
    of_task, of_source = ([r for r in _records(tmp_path, "health") if key in r] for key in ("task", "source"))
    names = set(of_source[0]) - {"source", "cls_patch_cosine", "n_samples", "collapsed"}
    assert set(of_task[0]) == names | {"task", "split", "is_trained"}


def test_due() -> None:
    hook = _hook(Path("nowhere"), every_n_steps=7, tasks=[tasks.task()])
    found = {step: due for step in range(13) if (due := hook.due(step, 12))}
    both = ["health", "probes"]
    assert found == {0: both, 5: ["health"], 7: ["probes"], 10: ["health"], 12: both}
    assert _hook(Path("nowhere"), at_start=False).due(0, 12) == []


def _run_on_ranks(run_dir: str) -> dict[str, float]:
    encoder, encode = _encoder()
    return _hook(Path(run_dir)).run(encode, 5, encoder, ["health"])


def test_two_ranks_find_what_one_finds(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    found = []
    for n_ranks in (1, 2):
        (tmp_path / str(n_ranks)).mkdir()
        first, *others = on_ranks(n_ranks, _run_on_ranks, str(tmp_path / str(n_ranks)))
        assert all(other == first for other in others)
        found.append(first)
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert len(_records(tmp_path / "2", "health")) == 4  # one rank writes


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    encoder.train()

    def noisy(inputs: EncoderInput) -> Any:
        assert not encoder.training
        torch.rand(3)
        return encode(inputs)

    before = torch.get_rng_state()
    _hook(tmp_path).run(noisy, 5, encoder, ["health"])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in encoder.modules())
    assert all(p.grad is None for p in encoder.parameters())


def test_what_fails_is_recorded_and_survived(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    assert on_ranks(2, _run_where_one_rank_fails, str(tmp_path)) == [True, True]
    errors = _records(tmp_path, "error")
    assert [(r["step"], r["source"]) for r in errors] == [(5, "toy.scenes"), (5, "toy.scenes@1")]
    assert errors[0]["error"].startswith("RuntimeError: disk on fire (rank 1 on ")
    assert {r["step"] for r in _records(tmp_path, "health")} == {10}


def _run_where_one_rank_fails(run_dir: str) -> bool:
    encoder, encode = _encoder()
    hook = _hook(Path(run_dir))

    def fails_on_rank_1(inputs: EncoderInput) -> Any:
        if rank() == 1:
            raise RuntimeError("disk on fire")
        return encode(inputs)

    failed = hook.run(fails_on_rank_1, 5, encoder, ["health"])
    return failed == {} and bool(hook.run(encode, 10, encoder, ["health"]))


def _encode_with(change: Callable[[torch.Tensor], torch.Tensor]) -> Encode:
    """Tokens of which the patches are `change` of the encoder's own, and no CLS token."""
    encoder = tasks.encoder()

    def encode(inputs: EncoderInput) -> list[Tokens]:
        tokens = encoder.intermediates(inputs, [1])[0]
        return [Tokens(change(tokens.patches), 0, tokens.grid)]

    return encode


BROKEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "are nearly one point": lambda x: 1.0 + 1e-4 * x,
    "are nearly on one line": lambda x: x[:, :, :1] * torch.arange(1.0, 17.0) + 1e-3 * x,
    "have vanished": lambda x: 1e-5 * x,
    "have exploded": lambda x: 1e6 * x,
    "are not finite": lambda x: torch.where(x > 0, torch.nan, x),
}


@pytest.mark.parametrize("cause", BROKEN)
def test_a_collapse_is_said_once_until_it_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    encoder, _ = _encoder()
    healthy, broken = _encode_with(lambda x: x), _encode_with(BROKEN[cause])
    for step, encode in enumerate((healthy, broken, broken, healthy, broken, broken)):
        if step == 5:  # a process that goes on knows what was said
            caplog.clear()
        _hook(tmp_path, taps=[1.0]).run(encode, step, encoder, ["health"])
        if step == 1:
            assert "step 1: features of toy.scenes at last " + cause in caplog.text
        n_said = sum(cause in r.message for r in caplog.records)
        assert n_said == {0: 0, 1: 2, 2: 2, 3: 2, 4: 4, 5: 0}[step]  # of two sources
    of_first = [r["collapsed"] for r in _records(tmp_path, "health") if r["source"] == "toy.scenes"]
    assert of_first == [[], [cause], [cause], [], [cause], [cause]]


def test_what_was_never_apart_has_not_collapsed() -> None:
    """A CLS token behind tiny LayerScales hardly differs between samples before it is trained."""
    watch = CollapseWatch([])
    record = {"source": "s", "tap": "last", "n_samples": 9, "n_features": 4, "mean_norm": 2.0}
    point = {"spread_ratio": 1e-4, "first_ratio": 0.5}
    line = {"spread_ratio": 0.3, "first_ratio": 0.999}
    assert watch.look({**record, "step": 0, **point, "first_ratio": 0.999}) == []
    assert watch.look({**record, "step": 1, **line}) == []
    assert watch.look({**record, "step": 2, **point}) == ["are nearly one point"]
    assert watch.look({**record, "step": 3, **line}) == ["are nearly on one line"]
    assert watch.look({**record, "step": 4, "spread_ratio": 0.3, "first_ratio": 0.5}) == []


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _put_off(run_dir: str) -> list[tuple[int, list[str]]]:
    """30 steps of a second each; health takes 2 seconds, probes 20, of a third of the time."""
    hook = _hook(Path(run_dir), every_n_steps=10, tasks=[tasks.task()], controls=False, max_time_ratio=1 / 3)
    clock = _Clock()
    hook.budget = TimeBudget(1 / 3, clock)
    encoder, encode = _encoder()
    hook.budget.start(0)
    done = []
    for step in range(31):
        turns = hook.due(step, 30)
        assert hook.due(step, 30) == turns  # to ask changes nothing
        if due := hook.take(step, 30):
            assert set(due) <= set(turns)
            for what in due:
                hook.run(_slow(encode, clock, 0.5 if what == "health" else 20 / 8), step, encoder, [what])
            done.append((step, due))
        clock.now_s += 1.0 + rank()
    return done


def _slow(encode: Encode, clock: _Clock, seconds: float) -> Encode:
    def slow(inputs: EncoderInput) -> Any:
        clock.now_s += seconds
        return encode(inputs)

    return slow


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_what_does_not_fit_the_budget_is_put_off(
    tmp_path: Path, on_ranks: Callable[..., list[Any]], n_ranks: int
) -> None:
    found = on_ranks(n_ranks, _put_off, str(tmp_path))
    assert all(other == found[0] for other in found)
    done = dict(found[0])
    assert done[0] == done[30] == ["health", "probes"]  # whatever it takes
    measured = {r["step"] for r in _records(tmp_path, "probe")}
    assert 10 not in measured
    assert {0, 30} <= measured
    skipped = _records(tmp_path, "skipped")
    assert {r["what"] for r in skipped} == {"health", "probes"}
    assert [r["step"] for r in skipped if r["what"] == "probes"] == [10]
    assert "max_time_ratio 0.333" in skipped[0]["reason"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"health_every_n_steps": -1}, "health_every_n_steps must be 0"),
        ({"health_samples": 1}, "health_samples must be at least 2, got 1"),
        *(
            ({"max_time_ratio": ratio}, "max_time_ratio must be at least 1e-06 and at most 1, or null")
            for ratio in (0.0, 1e-320, 1.5)
        ),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**changes)
