"""Features and the hook: with a real encoder, on one rank and on two, undisturbing, and never in training's way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import scenes, tasks
from toy.watched import training_on

from ssl_eo.data.opening import SourceConfig
from ssl_eo.distributed import rank
from ssl_eo.eval.features import (
    Encode,
    Precision,
    extract,
    extract_over_ranks,
    pool_tokens,
    pooled_taps,
    tap_layers,
    tap_name,
)
from ssl_eo.eval.hook import EvalConfig, EvalHook
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.metrics import HEADLINE, HIGHER_IS_BETTER
from ssl_eo.eval.probes import logistic
from ssl_eo.eval.tasks import Task, TaskConfig
from ssl_eo.jsonl import read_jsonl
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput, Tokens

CPU = torch.device("cpu")
TAPS = [0.5, 1.0]


def _task(n_test: int = 15) -> TaskConfig:
    train = SourceConfig("toy.scenes", scenes.Config(n=90))
    test = SourceConfig("toy.scenes", scenes.Config(n=60, seed=1))
    return TaskConfig("toy", train, test, max_train=45, max_test=n_test)


def _encoder() -> tuple[Encoder, Encode]:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(embed_dim=32, depth=4, n_heads=2, patch_size=4, patch_embed="conv"), n_channels=3)
    encoder.init_weights()
    return encoder, lambda inputs: encoder.intermediates(inputs, tap_layers(TAPS, 4))


def _hook(run_dir: Path, **changes: Any) -> EvalHook:
    cfg = EvalConfig(every_n_steps=10, tasks=[_task()], taps=TAPS, batch_size=8)
    return EvalHook(replace(cfg, **changes), run_dir, CPU)


def test_taps_are_depths() -> None:
    assert tap_layers([0.01, 0.5, 2 / 3, 1.0], 12) == [0, 5, 7, 11]
    assert [tap_name(r) for r in (2 / 3, 1.0)] == ["depth_0.67", "last"]


def test_pools() -> None:
    tokens = Tokens(torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]]]), 1, (1, 2))
    expected = {"cls": [9, 9], "mean": [2, 4], "cls_mean": [9, 9, 2, 4], "mean_std": [2, 4, 1, 2]}
    for pool, values in expected.items():
        assert pool_tokens(tokens, pool).tolist() == [values]  # type: ignore[arg-type]


def test_features_do_not_depend_on_the_batch_size() -> None:
    _, encode = _encoder()
    split = Task(_task()).test
    featurise = pooled_taps(encode, ["middle", "last"], "mean")
    a, b = (extract(featurise, split, CPU, n) for n in (4, 100))
    assert a.taps["last"].shape == (15, 32)
    assert a.at("all", torch.arange(15)).shape == (15, 64)
    torch.testing.assert_close(a.taps["last"], b.taps["last"])
    assert torch.equal(a.labels, split.labels)


def _features_and_passes() -> tuple[dict[str, torch.Tensor], int]:
    _, encode = _encoder()
    n_passes = 0

    def counted(inputs: EncoderInput) -> Any:
        nonlocal n_passes
        n_passes += 1
        return encode(inputs)

    features = extract_over_ranks(pooled_taps(counted, ["middle", "last"], "mean"), Task(_task()).test, CPU, 4)
    return features.taps, n_passes


def test_two_ranks_get_the_features_of_one_with_equal_passes(on_ranks: Callable[..., list[Any]]) -> None:
    single, _ = _features_and_passes()
    (first, n_first), (second, n_second) = on_ranks(2, _features_and_passes)  # 15 samples: one is repeated
    assert n_first == n_second == 2
    for tap, expected in single.items():
        torch.testing.assert_close(first[tap], expected)
        assert torch.equal(first[tap], second[tap])


def test_run_writes_probes_health_and_controls_once(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    found = _hook(tmp_path).run(encode, 0, encoder)
    assert set(found) == {
        f"eval/toy/{tap}/{what}" for tap in ("depth_0.50", "last", "all") for what in ("knn", "ridge", "effective_rank")
    }
    records = read_jsonl(tmp_path / "eval.jsonl")
    controls = {r["features"] for r in records} - {"encoder"}
    assert controls == {"band_statistics", "texture_statistics", "random_convolution"}
    assert all(r["seconds"] > 0 for r in records)
    (bands,) = (r for r in records if r["features"] == "band_statistics" and r.get("probe") == "ridge")
    assert bands["metric"] == "accuracy"
    assert bands["accuracy"] > 0.9  # the class is the mean colour
    assert {r["n_leaked"] for r in records if r["kind"] == "probe"} == {0}
    # A later process of the same run measures the encoder again, and the controls no more.
    _hook(tmp_path).run(encode, 10, encoder)
    assert {r["features"] for r in read_jsonl(tmp_path / "eval.jsonl") if r["step"] == 10} == {"encoder"}


def _run_of_kind(run_dir: str, kind: Kind) -> dict[str, float]:
    encoder, encode = _encoder()
    return _hook(Path(run_dir), tasks=[tasks.task(kind)], pool="cls_mean").run(encode, 10, encoder)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_two_ranks_find_what_one_finds(tmp_path: Path, on_ranks: Callable[..., list[Any]], kind: Kind) -> None:
    found = []
    for name, n_ranks in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        first, *others = on_ranks(n_ranks, _run_of_kind, str(tmp_path / name), kind)
        assert all(other == first for other in others)
        found.append(first)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert {key.rsplit("/")[-1] for key in found[0]} == {*tasks.PROBES[kind], "effective_rank"}
    one, two = ([_split_record(r) for r in read_jsonl(tmp_path / n / "eval.jsonl")] for n in ("one", "two"))
    assert len(one) == len(two) == 6 * (len(tasks.PROBES[kind]) + 1)  # three taps and three controls
    for (said, numbers), (expected, expected_numbers) in zip(one, two, strict=True):
        assert said == expected
        assert numbers == pytest.approx(expected_numbers, rel=1e-4)


def _split_record(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """What is the same to the letter, and numbers; without the time it took."""
    flat = {k: v for k, v in {**record, **record.get("chosen", {})}.items() if k not in ("seconds", "chosen")}
    numbers = {k: v for k, v in flat.items() if isinstance(v, float)}
    return {k: v for k, v in flat.items() if k not in numbers}, numbers


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_every_kind_is_ranked_by_its_own_metric(tmp_path: Path, kind: Kind) -> None:
    _run_of_kind(str(tmp_path), kind)
    bands = [r for r in read_jsonl(tmp_path / "eval.jsonl") if r["features"] == "band_statistics" and "probe" in r]
    (ridge,) = (r for r in bands if r["probe"] == "ridge")
    assert ridge["metric"] == HEADLINE[kind]
    assert ridge["split"] == "test"
    # Colours tell the labels, up to noise. The cells of controls are whole tiles here, four patches of other classes.
    least = {"classification": 0.9, "multilabel": 0.9, "segmentation": 0.2, "regression": -0.12}
    score = ridge[HEADLINE[kind]]
    assert (score if HIGHER_IS_BETTER[HEADLINE[kind]] else -score) > least[kind]


def test_validation_is_watched_where_there_is_one(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    with_val = tasks.task(val=tasks.source(seed=2, n=20))
    _hook(tmp_path, tasks=[with_val], controls=False).run(encode, 10, encoder)
    assert {r["split"] for r in read_jsonl(tmp_path / "eval.jsonl")} == {"val"}


def test_a_sample_in_both_splits_is_an_error_of_the_task_alone(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    leaky = tasks.task(name="leaky", test=tasks.source(seed=0, n=20))
    found = _hook(tmp_path, tasks=[leaky, tasks.task()], controls=False).run(encode, 10, encoder)
    assert {key.split("/")[1] for key in found} == {"toy"}
    (error,) = (r["error"] for r in read_jsonl(tmp_path / "eval.jsonl") if r["kind"] == "error")
    assert error.startswith("ValueError: task leaky: 20 of 20 samples of test are in train too, the first is toy-0-0")


def test_copied_pixels_are_counted_and_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, encode = _encoder()
    hook = _hook(tmp_path, tasks=[tasks.task(test=tasks.source(seed=1, n=40, n_copied=7))], controls=False)
    for step in (10, 20):
        hook.run(encode, step, encoder)
    assert [r["n_leaked"] for r in read_jsonl(tmp_path / "eval.jsonl") if r["kind"] == "probe"] == [7] * 12
    assert caplog.text.count("7 of 40 samples of test have the pixels of a sample of train") == 1


def test_due() -> None:
    hook = EvalHook(EvalConfig(every_n_steps=4, tasks=[_task()]), Path("nowhere"), CPU)
    assert [s for s in range(11) if hook.due(s, 10)] == [0, 4, 8, 10]
    off = EvalHook(EvalConfig(), Path("nowhere"), CPU)
    assert not any(off.due(s, 10) for s in range(11))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_of_features_is_its_own_and_recorded(tmp_path: Path, precision: Precision) -> None:
    encoder, encode = _encoder()
    seen = []

    def noted(inputs: EncoderInput) -> Any:
        found = encode(inputs)
        seen.append(encoder.blocks[0].attn.qkv(found[0].x.flatten(0, 1)).dtype)
        return found

    training = training_on(scenes.Config(n=20))
    cfg = EvalConfig(every_n_steps=10, tasks=[_task()], taps=TAPS, precision=precision, health_every_n_steps=10)
    EvalHook(cfg, tmp_path, CPU, training).run(noted, 10, encoder)
    assert set(seen) == {getattr(torch, precision)}
    records = read_jsonl(tmp_path / "eval.jsonl")
    assert {r["precision"] for r in records if r["features"] == "encoder"} == {precision}
    assert {"source" in r for r in records if r["features"] == "encoder"} == {True, False}
    assert {r["precision"] for r in records if r["features"] != "encoder"} == {"float32"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kernels_of_half_precision_are_given_no_other(tmp_path: Path, precision: Precision) -> None:
    encoder, encode = _encoder()
    seen = []

    def kernel(q: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(q.dtype)
        return q

    for block in encoder.blocks:
        block.attn.packed_kernel = kernel
    _hook(tmp_path, controls=False, precision=precision).run(encode, 10, encoder)
    assert all(block.attn.packed_kernel is kernel for block in encoder.blocks)
    assert set(seen) == ({torch.bfloat16} if precision == "bfloat16" else set())
    assert {r["kind"] for r in read_jsonl(tmp_path / "eval.jsonl")} == {"probe", "health"}


def test_of_many_patches_health_looks_at_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, encode = _encoder()
    found = []
    for n_max in (10**6, 20):
        monkeypatch.setattr("ssl_eo.eval.hook._MAX_HEALTH_ROWS", n_max)
        seen: list[int] = []
        monkeypatch.setattr(
            "ssl_eo.eval.hook.health", lambda x, seen=seen: seen.append(len(x)) or {"effective_rank": 1.0}
        )
        _hook(tmp_path, tasks=[tasks.task("segmentation")], controls=False).run(encode, 10, encoder)
        found.append(seen)
    assert found == [[40 * 4] * 3, [20] * 3]


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    module = nn.ModuleDict({"student": encoder, "teacher": nn.Dropout(0.5).eval()})
    encoder.train()

    def noisy(inputs: EncoderInput) -> Any:
        assert not any(m.training for m in module.modules())
        torch.rand(3)
        return encode(inputs)

    before = torch.get_rng_state()
    _hook(tmp_path).run(noisy, 0, module)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in encoder.modules())
    assert not module["teacher"].training
    assert all(p.grad is None for p in module.parameters())


def test_a_failing_encoder_is_recorded_and_survived(tmp_path: Path) -> None:
    encoder, _ = _encoder()
    encoder.train()

    def broken(inputs: EncoderInput) -> Any:
        raise RuntimeError("out of memory")

    assert _hook(tmp_path, controls=False).run(broken, 7, encoder) == {}
    (record,) = read_jsonl(tmp_path / "eval.jsonl")
    assert (record["kind"], record["step"], record["task"]) == ("error", 7, "toy")
    assert "out of memory" in record["error"]
    assert encoder.training


def test_diverged_features_are_an_error_and_not_a_result(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    with torch.no_grad():
        encoder.cls_token.fill_(float("nan"))
    _hook(tmp_path, controls=False).run(encode, 7, encoder)
    (record,) = read_jsonl(tmp_path / "eval.jsonl")
    assert "not finite" in record["error"]


def _run_where_one_rank_fails(run_dir: str) -> dict[str, float]:
    encoder, encode = _encoder()
    hook = _hook(Path(run_dir), controls=False)

    def fails_on_rank_1(inputs: EncoderInput) -> Any:
        if rank() == 1:
            raise RuntimeError("disk on fire")
        return encode(inputs)

    failed = hook.run(fails_on_rank_1, 10, encoder)
    assert failed == {}
    return hook.run(encode, 20, encoder)


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    first, second = on_ranks(2, _run_where_one_rank_fails, str(tmp_path))
    assert first == second
    assert first
    records = read_jsonl(tmp_path / "eval.jsonl")
    (error,) = (r["error"] for r in records if r["step"] == 10)
    assert re.fullmatch(r"RuntimeError: disk on fire \(rank 1 on \S+\)", error)
    assert all(r["kind"] != "error" for r in records if r["step"] == 20)


def _run_where_one_rank_reads_less(run_dir: str) -> dict[str, float]:
    encoder, encode = _encoder()
    train = SourceConfig("toy.scenes", scenes.Config(n=40, broken=[5] if rank() == 1 else []))
    return _hook(Path(run_dir), controls=False, tasks=[replace(_task(), train=train)]).run(encode, 10, encoder)


def test_ranks_that_read_different_samples_are_an_error(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    assert on_ranks(2, _run_where_one_rank_reads_less, str(tmp_path)) == [{}, {}]
    (record,) = read_jsonl(tmp_path / "eval.jsonl")
    assert "rank 1: could not read the same samples" in record["error"]


def test_records_after_a_half_written_line_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"step": 1, "task": "toy", "features": "encoder"}) + '\n{"step": 2, "ta')
    encoder, encode = _encoder()
    _hook(tmp_path, controls=False).run(encode, 3, encoder)
    assert {r["step"] for r in read_jsonl(path)} == {1, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every_n_steps": -1}, "every_n_steps"),
        ({"every_n_steps": 5, "tasks": []}, "tasks is empty"),
        ({"taps": [0.0]}, "taps"),
        ({"taps": [0.5, 0.501]}, "two decimals"),
        ({"tasks": [_task(), _task()]}, "different names"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**changes)


def test_a_probe_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr("ssl_eo.eval.probes.ridge.fit", fails)
    encoder, encode = _encoder()
    found = _hook(tmp_path, controls=False).run(encode, 10, encoder)
    assert {key.rpartition("/")[2] for key in found} == {"knn", "effective_rank"}
    failed = [(r["probe"], r["error"]) for r in read_jsonl(tmp_path / "eval.jsonl") if r["kind"] == "error"]
    assert failed == [("ridge", "RuntimeError: no luck")] * 3  # of two taps, and both together


def test_a_fit_that_did_not_come_to_its_optimum_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @dataclass
    class Hasty(logistic.Config):
        max_steps: int = 1
        lambdas: list[float] = field(default_factory=lambda: [1e-4])

    monkeypatch.setattr(logistic, "Config", Hasty)
    encoder, encode = _encoder()
    hook = _hook(tmp_path, controls=False, tasks=[replace(_task(), probes=["ridge", "logistic"])])
    hook.run(encode, 10, encoder)
    told = [record.getMessage() for record in caplog.records if "optimum" in record.getMessage()]
    remark = "is not at its optimum: its score may be a little lower than it could be"
    places = ("depth 0.50", "the last block", "all depths together")
    assert told == [f"step 10: encoder of task toy: logistic at {place} {remark}" for place in places]


def test_controls_that_failed_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, encode = _encoder()
    hook = _hook(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("ssl_eo.eval.hook.control_taps", lambda *_: lambda *_: 1 / 0)
        hook.run(encode, 10, encoder)
    hook.run(encode, 20, encoder)
    records = [r for r in read_jsonl(tmp_path / "eval.jsonl") if r["features"] == "band_statistics"]
    assert {(r["step"], r["kind"]) for r in records} == {(10, "error"), (20, "probe"), (20, "health")}


def test_given_weights_are_no_random_encoder(tmp_path: Path) -> None:
    encoder, encode = _encoder()
    cfg = EvalConfig(every_n_steps=4, tasks=[tasks.task()], controls=False)
    for name, begins_random in (("drawn", True), ("given", False)):
        (tmp_path / name).mkdir()
        EvalHook(cfg, tmp_path / name, CPU, begins_random=begins_random).run(encode, 0, encoder)
        records = read_jsonl(tmp_path / name / "eval.jsonl")
        assert {r["is_trained"] for r in records} == {not begins_random}
