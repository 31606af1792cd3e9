"""An ensemble is its specialists side by side: each shown its bands, none run that is not needed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_specialists import channels_of, images, known, pyramid, vit
from torch import Tensor, nn

from ssl_eo.adapt.ensemble import Ensemble, prune
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.protocols import apply_protocol
from ssl_eo.adapt.selection import GATE_LR_RATIO, GatedDecoder, TopKGate
from ssl_eo.adapt.specialists import Specialist
from ssl_eo.adapt.training import TrainingConfig, _optimizer
from ssl_eo.eval.decoders import TapMaps, build_decoder
from ssl_eo.eval.decoders.identity import Decoder as Identity
from ssl_eo.models.vit import EncoderInput
from ssl_eo.sensors import Band, load_sensor

S2 = load_sensor("sentinel2_l2a")
RGB, INFRARED = ("B04", "B03", "B02"), ("B08", "B04", "B03")
CHANNELS = S2.channel_meta()
WIDTHS = torch.tensor([4, 8, 16, 32])
VV = known("sentinel1_grd", ("VV", "VH"))


def rgb(seed: int = 0) -> Specialist:
    return pyramid("rgb", 3, known("sentinel2_l2a", RGB), seed)


def three() -> list[Specialist]:
    return [rgb(), pyramid("infrared", 3, known("sentinel2_l1c", INFRARED), 1), vit("any", "channel_attention")]


def maps_of(specialist: Specialist, inputs: EncoderInput, bands: Sequence[str] | None = None) -> Sequence[Tensor]:
    """What the encoder makes of the bands, chosen here by their names."""
    if bands is not None:
        index = list(S2.index(bands))
        inputs = replace(inputs, pixels=inputs.pixels[:, index], channels=inputs.channels.select(index))
    with torch.no_grad():
        maps: Sequence[Tensor] = specialist.backbone(inputs).maps
    return maps


def count_calls(ensemble: Ensemble) -> Counter[str]:
    calls: Counter[str] = Counter()
    for specialist in ensemble.specialists:
        name = specialist.name
        specialist.backbone.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_maps_of_all_specialists_are_concatenated_at_each_level() -> None:
    one, two = rgb(), pyramid("infrared", 3, known("sentinel2_l1c", INFRARED), 1)
    ensemble = Ensemble([one, two], CHANNELS)
    inputs = images(CHANNELS)
    with torch.no_grad():
        taps = ensemble(inputs)
    assert ensemble.names == ("rgb", "infrared")
    assert taps.cls is None
    assert ensemble.shape.strides_px == (4, 8, 16, 32)
    assert ensemble.shape.widths == tuple((2 * WIDTHS).tolist())
    expected = zip(maps_of(one, inputs, RGB), maps_of(two, inputs, INFRARED), strict=True)
    for found, parts, width, stride in zip(
        taps.maps, expected, ensemble.shape.widths, ensemble.shape.strides_px, strict=True
    ):
        assert found.shape == (2, width, 32 // stride, 64 // stride)
        assert torch.equal(found, torch.cat(parts, 1))


def test_bands_are_found_wherever_they_are() -> None:
    order = torch.randperm(len(S2.bands), generator=torch.Generator().manual_seed(0))
    inputs = images(CHANNELS)
    shuffled = EncoderInput(inputs.pixels[:, order], CHANNELS.select(order), gsd_m=10.0)
    with torch.no_grad():
        expected, found = Ensemble([rgb()], CHANNELS)(inputs), Ensemble([rgb()], shuffled.channels)(shuffled)
    assert all(torch.equal(a, b) for a, b in zip(expected.maps, found.maps, strict=True))


def test_by_count_an_encoder_of_three_sees_thirteen_channels_twice() -> None:
    l1c = load_sensor("sentinel2_l1c").channel_meta()
    inputs = images(l1c)
    twice, once = pyramid("rgb", 3), pyramid("all", 13, seed=1)
    ensemble = Ensemble([twice, once, pyramid("radar", 2)], l1c, adaptation="count")
    assert ensemble.names == ("rgb", "all")
    assert ensemble.dropped == {
        "radar": "takes 2 channels, and there is no rule for an image of 13; for one of 2, 14 there is"
    }
    with torch.no_grad():
        taps = ensemble(inputs)
        shown = [inputs.pixels[:, [3, 2, 1]], inputs.pixels[:, [7, 3, 2]]]
        parts = [twice.encoder(shown[0]), twice.encoder(shown[1]), once.encoder(inputs.pixels)]
    assert ensemble.shape.widths == tuple((3 * WIDTHS).tolist())
    for found, *expected in zip(taps.maps, *parts, strict=True):
        assert torch.equal(found, torch.cat(expected, 1))


def test_specialists_that_nothing_fits_drop_out_and_it_is_said_why() -> None:
    heights = channels_of(*S2.bands, Band("height", "elevation", 30.0))
    specialists = [
        *three(),
        pyramid("radar", 2, VV),
        pyramid("unknown", 3),
        pyramid("either", 3, {**known("rgb", ("R", "G", "B")), **known("sentinel2_l2a", RGB)}),
    ]
    ensemble = Ensemble(specialists, heights)
    assert ensemble.names == ("rgb", "infrared", "either")
    assert ensemble.dropped["radar"] == "sentinel1_grd: band VV: the image has no channel of sar VV"
    assert ensemble.dropped["unknown"].startswith("what its 3 channels measure is not known")
    assert "no code for elevation channels" in ensemble.dropped["any"]
    with pytest.raises(ValueError, match=r"no specialist can be shown these 12 channels \(radar: sentinel1_grd: band"):
        Ensemble([pyramid("radar", 2, VV)], CHANNELS)


def test_transformers_keep_their_cells_and_become_a_pyramid_beside_one() -> None:
    inputs = images(CHANNELS)
    conv = vit("conv", "conv", 3, known("sentinel2_l2a", RGB))
    plain = Ensemble([vit("any", "channel_attention"), conv], CHANNELS)
    assert (plain.shape.widths, plain.shape.strides_px) == ((32,) * 4, (16,) * 4)
    with torch.no_grad():
        taps = plain(inputs)
    expected = zip(maps_of(plain.specialists[0], inputs), maps_of(conv, inputs, RGB), strict=True)
    for found, parts in zip(taps.maps, expected, strict=True):
        assert torch.equal(found, torch.cat(parts, 1))
    for other in (rgb(), vit("fine", "dynamic", patch_size=8)):
        mixed = Ensemble([conv, other], CHANNELS)
        assert mixed.shape.strides_px == (4, 8, 16, 32)
        with torch.no_grad():
            maps = mixed(inputs).maps
        assert [list(x.shape[1:]) for x in maps] == [
            [width, 32 // stride, 64 // stride]
            for width, stride in zip(mixed.shape.widths, mixed.shape.strides_px, strict=True)
        ]
        third = maps_of(conv, inputs, RGB)  # has the cells of the third level already
        assert torch.equal(maps[2][:, :16], third[2])
        torch.testing.assert_close(maps[0][:, :16].mean((2, 3)), third[0].mean((2, 3)))  # resizing keeps the mean


def test_resizing_keeps_where_things_are() -> None:
    """A map enlarged and shrunk keeps its left half left: cells span the same pixels."""
    conv = vit("conv", "conv", 3, known("sentinel2_l2a", RGB))
    ensemble = Ensemble([conv, rgb()], CHANNELS)
    step = torch.zeros(1, 16, 4, 8)
    step[..., 4:] = 1.0
    sizes = [(16, 32), (8, 16), (4, 8), (2, 4)]
    conv.backbone.register_forward_hook(lambda *_: TapMaps([step] * 4))
    maps = ensemble(images(CHANNELS, 1, (64, 128))).maps
    for found, (height, width) in zip(maps, sizes, strict=True):
        assert found.shape[-2:] == (height, width)
        assert found[:, :16, :, : width // 2].mean() < 0.15
        torch.testing.assert_close(found[:, :16], 1.0 - found[:, :16].flip(-1))


def calibrated(norm: str = "batch") -> tuple[Ensemble, list[EncoderInput]]:
    ensemble = Ensemble([rgb(), vit("any", "channel_attention")], CHANNELS, norm=norm)  # type: ignore[arg-type]
    ensemble.requires_grad_(False)
    batches = [images(CHANNELS, n, seed=n) for n in (1, 4, 2)]
    if norm == "batch":
        ensemble.calibrate(batches)
    return ensemble, batches


def test_batch_statistics_are_those_of_all_images_and_stay() -> None:
    ensemble, batches = calibrated()
    every = EncoderInput(torch.cat([b.pixels for b in batches]), CHANNELS, gsd_m=10.0)
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    ensemble.train()
    assert not any(module.training for part in (*ensemble.backbones, *ensemble.norms) for module in part.modules())
    for x in ensemble(every).maps:
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
        std = x.std((0, 2, 3), correction=0)
        torch.testing.assert_close(std, torch.ones_like(std), atol=2e-3, rtol=0)
    ensemble(batches[0])
    assert all(torch.equal(before[name], value) for name, value in ensemble.state_dict().items())


def test_batch_statistics_move_with_an_encoder_that_trains() -> None:
    ensemble, batches = calibrated()
    first, second = ensemble.norms
    ensemble.backbones[0].requires_grad_(True)
    ensemble.train()
    kept = [[norm.running_mean.clone() for norm in norms] for norms in (first, second)]
    ensemble(batches[1])
    assert not any(torch.equal(a, norm.running_mean) for a, norm in zip(kept[0], first, strict=True))
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(kept[1], second, strict=True))
    ensemble.calibrate(batches)  # in eval mode, and back
    assert [backbone.training for backbone in ensemble.backbones] == [True, False]


def test_statistics_that_were_never_taken_are_asked_for() -> None:
    ensemble = Ensemble([rgb()], CHANNELS, norm="batch")
    with pytest.raises(ValueError, match="norm: batch has no statistics yet: call calibrate"):
        ensemble(images(CHANNELS))
    with pytest.raises(ValueError, match="on one batch of images at least"):
        ensemble.calibrate([])
    with pytest.raises(ValueError, match="norm layer has no statistics"):
        Ensemble([rgb()], CHANNELS, norm="layer").calibrate([images(CHANNELS)])
    other, _ = calibrated()
    ensemble = Ensemble(other.specialists, CHANNELS, norm="batch")
    ensemble.load_state_dict(other.state_dict())  # statistics come with the weights
    with torch.no_grad():
        assert torch.equal(ensemble(images(CHANNELS)).maps[0], other(images(CHANNELS)).maps[0])


def test_layer_norm_is_that_of_an_image() -> None:
    ensemble, batches = calibrated("layer")
    for x in ensemble(batches[1]).maps:
        part = x[:, : x.shape[1] - 16].flatten(1)
        torch.testing.assert_close(part.mean(1), torch.zeros(len(part)), atol=1e-4, rtol=0)
        torch.testing.assert_close(part.std(1, correction=0), torch.ones(len(part)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("adaptation", ["wavelength", "count"])
def test_a_pruned_ensemble_gives_the_same_and_runs_no_others(norm: str, adaptation: str) -> None:
    meta = load_sensor("sentinel2_l1c").channel_meta()
    specialists = [
        pyramid("rgb", 3, known("sentinel2_l2a", RGB)),
        pyramid("all", 13, known("sentinel2_l1c", load_sensor("sentinel2_l1c").band_names), 1),
        vit("any", "channel_attention"),
    ]
    whole = Ensemble(specialists, meta, adaptation, norm)  # type: ignore[arg-type]
    inputs = images(meta, 3)
    if norm == "batch":
        whole.calibrate([images(meta, 5, seed=3)])
    keep = ("any", "rgb")
    pruned = prune(whole, keep)
    assert pruned.names == ("rgb", "any")  # in the order of the ensemble
    with torch.no_grad():
        expected = whole(inputs).maps
        calls = count_calls(whole)
        found = pruned(inputs).maps
    assert set(calls) == set(keep)
    assert pruned.shape.strides_px == whole.shape.strides_px
    for a, b, index in zip(found, expected, whole.channels_of(keep), strict=True):
        assert torch.equal(a, b[:, index])
    only = prune(pruned, ["any"])  # cells stay, so that a decoder stays right
    with torch.no_grad():
        assert torch.equal(only(inputs).maps[0], expected[0][:, whole.channels_of(["any"])[0]])


def gated(ensemble: Ensemble, k: int, decoder: str = "upernet") -> TaskModel:
    torch.manual_seed(0)
    made = build_decoder(decoder, {"channels": 8} if decoder == "upernet" else {}, ensemble.shape, 3)
    gate = TopKGate(len(ensemble.names), k)
    return TaskModel(ensemble, GatedDecoder(gate, made, ensemble.owners))


def test_a_decoder_behind_a_gate_is_shown_what_is_selected_and_zeros() -> None:
    """A pruned ensemble gives the decoder the same, where its weights are cut to its channels, and runs no others."""
    specialists = [pyramid(f"s{i}", 3, known("sentinel2_l2a", RGB), i) for i in range(4)]
    ensemble = Ensemble(specialists, CHANNELS)
    model = gated(ensemble, 2, "identity").eval()
    decoder = model.decoder
    assert isinstance(decoder, GatedDecoder)
    inputs = images(CHANNELS)
    with torch.no_grad():
        decoder.gate.scores.copy_(torch.tensor([0.3, -1.0, 0.1, 0.7]))
        expected = model(inputs)
    pruned = prune(ensemble, [ensemble.names[i] for i in decoder.gate.selected()])
    assert pruned.names == ("s0", "s3")
    index = ensemble.channels_of(pruned.names)[-1]
    inner = decoder.decoder
    assert isinstance(inner, Identity)
    calls = count_calls(ensemble)
    with torch.no_grad():
        means = pruned(inputs).maps[-1].mean((2, 3))
        found = means @ inner.out.weight[:, index].T + inner.out.bias
    torch.testing.assert_close(found, expected)
    assert calls == {"s0": 1, "s3": 1}
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in ensemble.parameters()) * 0.6


def test_channels_are_told_apart_by_their_owners() -> None:
    ensemble = Ensemble(three(), CHANNELS)
    taps = ensemble(images(CHANNELS))
    assert [len(owner) for owner in ensemble.owners] == list(ensemble.shape.widths)
    pooled = ensemble.pooled(taps)
    assert list(pooled) == ["rgb", "infrared", "any"]
    for i, name in enumerate(ensemble.names):
        parts = [x[:, index] for x, index in zip(taps.maps, ensemble.channels_of([name]), strict=True)]
        torch.testing.assert_close(pooled[name], torch.cat([x.mean((2, 3)) for x in parts], 1))  # sums of another order
        assert all(
            bool((owner[index] == i).all())
            for owner, index in zip(ensemble.owners, ensemble.channels_of([name]), strict=True)
        )


def test_a_decoder_on_frozen_specialists_with_a_gate_trains() -> None:
    """Through UPerNet, on images of any size; encoders stay as they are, scores of those not selected move."""
    ensemble = Ensemble(three(), CHANNELS)
    apply_protocol(ensemble, "frozen")
    model = gated(ensemble, 1).train()
    assert model.is_frozen
    assert not any(module.training for backbone in ensemble.backbones for module in backbone.modules())
    logits = model(images(CHANNELS, 2, (40, 50)))
    assert logits.shape == (2, 3, 40, 50)
    logits.square().mean().backward()
    assert isinstance(model.decoder, GatedDecoder)
    scores = model.decoder.gate.scores
    assert scores.grad is not None
    assert (scores.grad != 0).all()
    assert all(p.grad is None for p in ensemble.backbones.parameters())


def test_scores_of_a_gate_learn_more_slowly_than_its_decoder() -> None:
    model = gated(Ensemble(three(), CHANNELS).requires_grad_(False), 1)
    assert isinstance(model.decoder, GatedDecoder)
    optimizer, _ = _optimizer(model, TrainingConfig())
    rates = {id(p): group["lr_multiplier"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay_multiplier"] for group in optimizer.param_groups for p in group["params"]}
    scores = id(model.decoder.gate.scores)
    assert (rates.pop(scores), decays[scores]) == (GATE_LR_RATIO, 0.0)
    assert set(rates.values()) == {1.0}
    assert GATE_LR_RATIO < 1


def test_finetuning_reaches_every_encoder() -> None:
    ensemble = Ensemble(three(), CHANNELS)
    apply_protocol(ensemble, "finetune")
    ensemble.train()
    assert all(backbone.training for backbone in ensemble.backbones)
    sum(x.square().mean() for x in ensemble(images(CHANNELS)).maps).backward()
    silent = [name for name, p in ensemble.named_parameters() if p.grad is None]
    assert all("mask_token" in name for name in silent), silent
    optimizer, trained = _optimizer(TaskModel(ensemble, nn.Linear(1, 1)), TrainingConfig())
    assert len(trained) == len(list(ensemble.parameters())) + 2
    assert {group["lr_multiplier"] for group in optimizer.param_groups} == {0.1, 1.0}


def test_a_copy_prunes_its_own_encoders() -> None:
    ensemble = Ensemble(three(), CHANNELS)
    copied = copy.deepcopy(ensemble)
    pruned = prune(copied, ["any"])
    assert pruned.backbones[0] is copied.backbones[2]
    assert pruned.backbones[0] is not ensemble.backbones[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "instance"}, "norm must be one of none, batch, layer, got 'instance'"),
        ({"adaptation": "name"}, "adaptation must be one of wavelength, count, got 'name'"),
        ({"strides_px": (6, 6, 6, 6)}, "specialist rgb has cells of 4, 8, 16, 32 pixels, which do not divide"),
        ({"channels": CHANNELS.expand(2)}, r"images that all have the same channels \[C\]"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble([rgb()], **{"channels": CHANNELS, **arguments})  # type: ignore[arg-type]


def test_what_an_ensemble_was_not_built_for_is_refused() -> None:
    ensemble = Ensemble([rgb(), pyramid("radar", 2, VV)], CHANNELS)
    l1c = load_sensor("sentinel2_l1c").channel_meta()
    with pytest.raises(ValueError, match="was built for 12 channels without padding, got 13"):
        ensemble(images(l1c))
    with pytest.raises(ValueError, match="was built for channels of another wavelength_um"):
        ensemble(images(CHANNELS.select(list(reversed(range(12))))))
    with pytest.raises(ValueError, match=r"of multiples of 32 pixels, got \[2, 12, 32, 40\]"):
        ensemble(images(CHANNELS, size=(32, 40)))
    with pytest.raises(ValueError, match=r"no specialist 'radar': it was dropped, sentinel1_grd: band VV"):
        prune(ensemble, ["radar"])
    with pytest.raises(ValueError, match=r"no specialist 'other' \(rgb\)"):
        ensemble.channels_of(["other"])
    with pytest.raises(ValueError, match="keep one specialist at least"):
        prune(ensemble, [])
    assert isinstance(ensemble.norms[0][0], nn.Identity)
