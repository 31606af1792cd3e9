"""Training on labels: what a protocol trains and what it leaves, which weights are kept, features computed once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_study import encoder, opened_task

from ssl_eo.adapt.backbone import EncoderBackbone, PixelBackbone, padded_to
from ssl_eo.adapt.cost import step_cost
from ssl_eo.adapt.examples import Examples, Features
from ssl_eo.adapt.losses import LossConfig
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.protocols import PROTOCOLS, apply_protocol
from ssl_eo.adapt.training import (
    Fitted,
    Labels,
    Samples,
    TrainingConfig,
    _batches,
    _optimizer,
    autocast,
    check_labelled,
    fit,
    predict,
)
from ssl_eo.eval.decoders import build_decoder
from ssl_eo.eval.tasks import Task
from ssl_eo.models.vit import EncoderInput

CPU = torch.device("cpu")
SHORT = TrainingConfig(n_steps=4, batch_size=4, lrs=[1e-2], n_evaluations=2)
TAPS = (0.34, 0.67, 1.0)


@pytest.fixture(scope="module")
def task() -> Task:
    return opened_task(n=8)


def of(task: Task) -> tuple[Labels, dict[str, Samples]]:
    splits = {"train": task.train, "val": task.val, "test": task.test}
    samples = {k: Samples(Examples(s, torch.arange(len(s)), CPU)) for k, s in splits.items() if s is not None}
    return Labels(task.shown, task.cfg.headline), samples


def maker(task: Task, protocol: str, decoder: str = "linear", seed: int = 0, **changes: Any) -> Callable[[], TaskModel]:
    backbone = EncoderBackbone(encoder(**changes), TAPS)
    apply_protocol(backbone, protocol, seed=seed)
    n_outputs = 1 if task.cfg.kind == "regression" else task.n_classes

    def make() -> TaskModel:
        return TaskModel(copy.deepcopy(backbone), build_decoder(decoder, {}, backbone.shape, n_outputs))

    return make


def trained(task: Task, protocol: str, cfg: TrainingConfig = SHORT, **how: Any) -> Fitted:
    labels, samples = of(task)
    return fit(maker(task, protocol, **how), labels, samples["train"], samples["val"], cfg)


def changed(fitted: Fitted, before: TaskModel) -> set[str]:
    old, new = before.backbone.state_dict(), fitted.model.backbone.state_dict()
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_trains_what_it_says(protocol: str, task: Task) -> None:
    """To the bit, drop path included: what is frozen is in eval mode."""
    fitted = trained(task, protocol, drop_path_prob=0.3)
    found = changed(fitted, maker(task, protocol, drop_path_prob=0.3)())
    names = set(fitted.model.backbone.state_dict())
    if protocol in ("frozen", "random_frozen"):
        assert found == set()
        assert fitted.n_trained == sum(p.numel() for p in fitted.model.decoder.parameters())
    elif protocol == "retrain_input":
        assert found == {name for name in names if ".patch_embed." in name and name in found} != set()
    elif protocol == "lora":
        assert found
        assert all("lora" in name for name in found)
    else:
        assert any(".blocks.0." in name for name in found)
        assert any(".patch_embed." in name for name in found)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pretrained_weights_alone_learn_slowly(protocol: str, task: Task) -> None:
    """Adapters, a patch embedding that is learned anew and random encoders do not know anything yet."""
    model = maker(task, protocol)()
    optimizer, parameters = _optimizer(model, TrainingConfig(encoder_lr_ratio=0.1, layer_decay=0.5))
    ratios = {p: group["lr_multiplier"] for group in optimizer.param_groups for p in group["params"]}
    assert set(ratios) == set(parameters) == {p for p in model.parameters() if p.requires_grad}
    assert {ratios[p] for p in model.decoder.parameters()} == {1.0}
    if protocol != "finetune":
        assert set(ratios.values()) == {1.0}
        return
    assert isinstance(model.backbone, EncoderBackbone)
    trained = model.backbone.encoder
    for part, n in zip((trained.patch_embed, *trained.blocks), (4, 3, 2, 1), strict=True):
        (ratio,) = {ratios[p] for p in part.parameters()}
        assert ratio == pytest.approx(0.1 * 0.5**n)


def test_measuring_the_cost_of_a_model_leaves_it_as_it_is(task: Task) -> None:
    model = maker(task, "finetune", "fcn")().eval()
    before = copy.deepcopy(model.state_dict())
    assert any(name.endswith("running_mean") for name in before)
    inputs, _ = of(task)[1]["train"].examples.batch(torch.arange(4))
    assert step_cost(model, inputs, (16, 16), SHORT).step_gflop > 0
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_random_encoders_are_drawn_from_the_seed_and_nothing_of_the_given_one_is_left(task: Task) -> None:
    given = encoder().state_dict()
    drawn = [maker(task, "random_frozen", seed=seed)().backbone.encoder.state_dict() for seed in (0, 0, 1)]
    weights = [name for name in given if name.endswith("qkv.weight")]
    assert weights
    for name in weights:
        assert torch.equal(drawn[0][name], drawn[1][name])
        assert not torch.equal(drawn[0][name], drawn[2][name])
        assert not torch.equal(drawn[0][name], given[name])


def test_the_same_seed_gives_the_same_bits_and_training_leaves_the_callers_randomness_alone(task: Task) -> None:
    labels, samples = of(task)
    make, cfg = maker(task, "finetune"), replace(SHORT, symmetries=True)
    torch.manual_seed(5)
    expected = torch.rand(2)[1]
    torch.manual_seed(5)
    torch.rand(1)
    first = fit(make, labels, samples["train"], samples["val"], cfg)
    assert torch.rand(1) == expected
    again = fit(make, labels, samples["train"], samples["val"], cfg)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_features_that_are_computed_once_change_nothing(task: Task) -> None:
    labels, samples = of(task)
    make = maker(task, "frozen", "segformer")
    model = make()
    context = autocast(CPU, SHORT)
    kept = {name: Samples(s.examples, Features.of(model, s.examples, 3, context)) for name, s in samples.items()}
    plain = fit(make, labels, samples["train"], samples["val"], SHORT)
    quick = fit(make, labels, kept["train"], kept["val"], SHORT)
    assert plain.curves == quick.curves
    for name, value in plain.model.decoder.state_dict().items():
        torch.testing.assert_close(quick.model.decoder.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (predict(m.model, labels, s["test"], SHORT) for m, s in ((plain, samples), (quick, kept)))
    assert ours.scores() == pytest.approx(theirs.scores(), abs=1e-3, nan_ok=True)


def test_the_best_on_validation_is_kept_of_all_learning_rates(task: Task) -> None:
    cfg = replace(SHORT, n_steps=12, lrs=[1e-4, 3e-2], n_evaluations=3)
    fitted = trained(task, "finetune", cfg)
    assert [len(curve) for curve in fitted.curves.values()] == [3, 3]
    best = max(score for curve in fitted.curves.values() for score in curve)
    assert best == fitted.curves[fitted.lr][fitted.step // 4 - 1]
    labels, samples = of(task)
    assert predict(fitted.model, labels, samples["val"], cfg).scores()[labels.headline] == pytest.approx(best)


@pytest.mark.filterwarnings("ignore")
def test_a_learning_rate_that_diverges_is_left_behind(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    class Diverging(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.nn.Parameter(torch.zeros(task.n_classes))

        def forward(self, taps: Any, size: tuple[int, int]) -> torch.Tensor:
            far = torch.where(self.offset.detach().abs().amax() > 1.0, math.inf, 0.0)
            return (self.offset + far * 0.0)[None, :, None, None].expand(len(taps.maps[0]), -1, *size)

    labels, samples = of(task)
    backbone = EncoderBackbone(encoder(), TAPS).requires_grad_(False)
    make = lambda: TaskModel(backbone, Diverging())  # noqa: E731
    fitted = fit(make, labels, samples["train"], samples["val"], replace(SHORT, lrs=[5.0, 1e-3]))
    assert fitted.lr == 1e-3
    assert math.isnan(fitted.curves[5.0][-1])
    assert "training diverged at lr 5" in caplog.text
    with pytest.raises(ValueError, match=r"at every learning rate of \[5.0\] training diverged"):
        fit(make, labels, samples["train"], samples["val"], replace(SHORT, lrs=[5.0]))


@pytest.mark.parametrize(("kind", "decoder"), [("classification", "identity"), ("multilabel", "attentive_pool")])
def test_labels_of_images(kind: str, decoder: str) -> None:
    task = opened_task(kind, 8)
    fitted = trained(task, "frozen", decoder=decoder)
    labels, samples = of(task)
    outcome = predict(fitted.model, labels, samples["test"], SHORT)
    of_test = task.test.labels
    support = torch.bincount(of_test, minlength=task.n_classes) if kind == "classification" else of_test.sum(0)
    assert outcome.per_class()["support"].tolist() == support.tolist()


def test_numbers_are_learned_in_units_of_their_spread() -> None:
    model = maker(opened_task("classification", 8), "frozen", "identity")()
    labels = torch.tensor([1000.0, 3000.0])
    model.measure_outputs(labels)
    torch.testing.assert_close(model.targets(labels), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(model.values(model.targets(labels)), labels)
    model.measure_outputs(torch.tensor([7.0, 7.0]))
    torch.testing.assert_close(model.targets(torch.tensor([7.0, 8.0])), torch.tensor([0.0, 1.0]))


def test_images_and_maps_turn_together(task: Task) -> None:
    """A label that is the pixel itself stays so under each of the eight symmetries; together they are all different."""
    examples = Examples(task.train, torch.arange(8), CPU)
    inputs, _ = examples.batch(torch.zeros(8, dtype=torch.long))
    examples.labels = inputs.pixels[:, 0].repeat(1, 1, 1)
    turned, labels = examples.batch(torch.zeros(8, dtype=torch.long), torch.arange(8))
    assert torch.equal(turned.pixels[:, 0], labels)
    assert torch.equal(turned.pixels[0], inputs.pixels[0])
    assert torch.equal(turned.pixels[4], inputs.pixels[0].flip(-1))
    assert len({tuple(labels[i].flatten().tolist()) for i in range(8)}) == 8


def test_images_of_any_size_are_padded_and_cut(task: Task) -> None:
    """Logits of pixels that are there do not move, and a constant image stays one."""
    model = maker(task, "frozen")().eval()
    meta = task.schema.sensor.channel_meta(task.bands)
    odd = model(EncoderInput(torch.randn(2, 4, 18, 13), meta))
    assert odd.shape == (2, task.n_classes, 18, 13)
    assert padded_to(torch.randn(1, 4, 18, 13), 4).shape == (1, 4, 20, 16)
    narrow = torch.arange(3.0).view(1, 1, 1, 3)
    assert padded_to(narrow, 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    inner = torch.randn(1, 4, 16, 16)
    same = model(EncoderInput(inner, meta))
    assert torch.equal(same, model.decode(model.taps(EncoderInput(inner, meta)), (16, 16), (16, 16)))


def test_pixels_alone_are_a_backbone_without_weights() -> None:
    backbone = PixelBackbone(3)
    pixels = torch.randn(2, 3, 5, 7)
    (found,) = backbone(EncoderInput(pixels, None)).maps  # type: ignore[arg-type]
    assert torch.equal(found, pixels)
    assert list(backbone.parameters()) == []


def test_labels_that_are_all_unknown_are_refused(task: Task) -> None:
    """The loss of none is 0: the decoder would stay as it was drawn, and be scored."""
    labels, samples = of(task)
    unknown = replace(labels, shown=replace(labels.shown, ignore=7))
    for split in ("train", "val"):
        examples = copy.copy(samples[split].examples)
        examples.labels = torch.full_like(examples.labels, 7)
        some = {**samples, split: Samples(examples)}
        with pytest.raises(ValueError, match=f"no pixel of {split} has a label: all are 7, which stand for unknown"):
            fit(maker(task, "frozen"), unknown, some["train"], some["val"], SHORT)
        examples.labels[0, 0, 0] = 1
        assert fit(maker(task, "frozen"), unknown, some["train"], some["val"], SHORT).curves
    numbers = copy.copy(samples["train"].examples)
    numbers.labels = torch.full((8,), math.nan)
    of_numbers = Labels(replace(labels.shown, kind="regression"), "rmse")
    with pytest.raises(ValueError, match="no sample of train has a label; look at"):
        check_labelled(of_numbers, "train", numbers)
    valid = replace(labels, headline="miou_valid", no_data=(3,))
    numbers.labels = torch.full((8, 4, 4), 3)
    with pytest.raises(ValueError, match="all are 3, which stand for unknown"):
        check_labelled(valid, "test", numbers)
    check_labelled(replace(valid, headline="miou_present"), "test", numbers)  # a class like others


def test_a_batch_holds_no_sample_twice(task: Task) -> None:
    """However large it is asked to be: memory is bounded by the samples there are."""
    labels, samples = of(task)
    train = samples["train"].examples
    for size, sampling in ((10**9, "natural"), (5, "natural"), (10**9, "balanced")):
        cfg = replace(SHORT, batch_size=size, sampling=sampling)
        batches = list(_batches(train, labels, cfg, 0))
        assert [len(rows) for rows in batches] == [min(size, len(train))] * SHORT.n_steps
    whole = list(_batches(train, labels, replace(SHORT, batch_size=len(train)), 0))
    many = list(_batches(train, labels, replace(SHORT, batch_size=10**9), 0))
    assert all(torch.equal(a, b) for a, b in zip(whole, many, strict=True))
    assert all(sorted(rows.tolist()) == list(range(len(train))) for rows in many)


def test_training_tells_how_far_it_is(task: Task) -> None:
    labels, samples = of(task)
    told: list[tuple[int, int]] = []
    cfg = replace(SHORT, lrs=[1e-2, 1e-3])
    fit(
        maker(task, "frozen"),
        labels,
        samples["train"],
        samples["val"],
        cfg,
        tell=lambda done, n: told.append((done, n)),
    )
    assert told == [(step, 8) for step in range(1, 9)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1"),
        ({"lrs": []}, "lrs must name one at least"),
        ({"lrs": [1e-3, 1e-3]}, "each once"),
        ({"n_steps": 2, "n_evaluations": 3}, "n_evaluations 3 exceeds n_steps 2"),
        ({"layer_decay": 0.0}, r"layer_decay in \(0, 1\]"),
        ({"clip_grad_norm": 0.0}, "positive or null"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0, got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and at least 0, got nan"),
        ({"features_gb": -1.0}, "features_gb must be finite and at least 0, got -1.0"),
        ({"sampling": "balanced", "loss": LossConfig("logit_adjusted")}, "both correct for the same thing"),
    ],
)
def test_wrong_keys_of_training_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**keys)


def test_wrong_taps_and_protocols_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="must rise with the depth"):
        EncoderBackbone(encoder(), (1.0, 0.5))
    with pytest.raises(ValueError, match="name a block of this encoder of 3 twice"):
        EncoderBackbone(encoder(), (0.9, 1.0))
    with pytest.raises(ValueError, match="no protocol 'freeze'; did you mean 'frozen'"):
        apply_protocol(EncoderBackbone(encoder(), TAPS), "freeze")
    with pytest.raises(
        ValueError, match="protocol lora is for one vision transformer; all else takes frozen and finetune"
    ):
        apply_protocol(PixelBackbone(3), "lora")
