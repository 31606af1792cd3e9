"""Published weights become a bundle and go back to their own layout unchanged; whatever does not fit is named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released_formula import weights
from torch import Tensor

from ssl_eo.cli import main
from ssl_eo.hub import UNSAID, SensorInput, load_bundle, write_bundle
from ssl_eo.models.vit import Encoder, EncoderConfig, EncoderInput
from ssl_eo.tensor_files import read_tensors, write_tensors
from ssl_eo.weights import dinov2, panopticon
from ssl_eo.weights.base import (
    build_encoder,
    export_released,
    find_released,
    import_released,
    read_released,
    released_name_of,
    released_state_dict,
)

SMALL, TINY = "dinov2_vits14", "dinov2_tiny"
COUNTS = {  # tensors and parameters of the published code
    "panopticon_vitb14": (183, 98_976_000),
    "dinov2_vits14": (175, 22_056_576),
    "dinov2_vitb14": (175, 86_580_480),
    "dinov2_vitl14": (343, 304_368_640),
    "dinov2_vitg14": (567, 1_136_480_768),
    "dinov2_vits14_reg": (176, 22_058_112),
    "dinov2_vitb14_reg": (176, 86_583_552),
    "dinov2_vitl14_reg": (344, 304_372_736),
    "dinov2_vitg14_reg": (568, 1_136_486_912),
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    released = find_released(name)
    with torch.device("meta"):
        encoder = Encoder(released.config, released.n_channels)
    return {key: tuple(value.shape) for key, value in encoder.state_dict().items()}


@pytest.fixture(scope="module", autouse=True)
def _tiny_member_of_the_family() -> Iterator[None]:
    """One more model in the table of DINOv2, so that files are small."""
    small = find_released(SMALL)
    config = replace(small.config, embed_dim=16, depth=2, n_heads=2, image_size=56)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2, "MODELS", (*dinov2.MODELS, replace(small, name=TINY, config=config)))
        yield


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return weights(shapes_of(TINY))


@pytest.fixture(scope="module")
def file(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "dinov2_tiny_pretrain.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def bundle(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "dinov2"
    assert main(["import", str(file), "--as", TINY, "--out", str(out)]) == 0
    return out


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_models_are_those_that_were_published(name: str) -> None:
    shapes = shapes_of(name)
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())) == COUNTS[name]


def test_import_says_what_was_imported(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bundle"
    assert main(["import", str(file), "--as", TINY, "--out", str(out)]) == 0
    line = "dinov2_tiny; its weights are under Apache-2.0, see https://github.com/facebookresearch/dinov2"
    assert capsys.readouterr().out == f"wrote {out} ({line})\n"
    facts = load_bundle(out).facts
    assert facts["released"].pop("sha256") == _sha256(file)
    assert facts["released"] == {
        "name": TINY,
        "licence": "Apache-2.0",
        "source": "https://github.com/facebookresearch/dinov2",
        "file": file.name,
    }
    assert facts["step"] > 0  # at 0 evaluation would take it for the random encoder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_bundle_normalises_as_imagenet(bundle: Path) -> None:
    model = load_bundle(bundle)
    images = torch.randint(0, 256, (2, 3, 28, 42), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = (images / 255 - mean) / std
    with torch.no_grad():
        (expected,) = model.encoder([EncoderInput(pixels, model.inputs["rgb"].sensor.channel_meta())])
        torch.testing.assert_close(model(images), expected.cls, atol=1e-5, rtol=0)


def test_a_bundle_without_statistics_asks_for_normalised_pixels(tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(embed_dim=16, depth=1, n_heads=2, patch_size=14))
    encoder.init_weights()
    write_bundle(tmp_path, encoder, find_released("panopticon_vitb14").inputs(), {})
    with pytest.raises(ValueError, match="has statistics for no sensor: give normalised images with channels="):
        load_bundle(tmp_path)(torch.zeros(1, 3, 14, 14))


def test_half_precision_becomes_float32(tensors: dict[str, Tensor]) -> None:
    half = {name: tensor.half() for name, tensor in tensors.items()}
    encoder = build_encoder(half, find_released(TINY), "file")
    assert_same(encoder.state_dict(), {name: tensor.float() for name, tensor in half.items()})
    assert not encoder.training


def test_a_teacher_of_a_training_run_in_chunks(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    def chunked(name: str) -> str:
        parts = name.split(".")
        return ".".join(["blocks", str(int(parts[1]) // 3), *parts[1:]]) if parts[0] == "blocks" else name

    teacher = {f"backbone.{chunked(name)}": tensor for name, tensor in tensors.items()}
    torch.save({"teacher": {**teacher, "dino_head.mlp.0.weight": torch.ones(1)}}, tmp_path / "teacher.pth")
    assert_same(read_released(tmp_path / "teacher.pth", find_released(TINY))[0].state_dict(), tensors)


def test_native_size_mask_token_and_mlp_are_read_off_the_tensors() -> None:
    released = find_released("dinov2_vits14")
    released = replace(released, config=replace(released.config, depth=1))
    ours = replace(released.config, image_size=224, mask_token=False, mlp="swiglu")
    encoder = Encoder(ours, 3)
    encoder.init_weights()
    read = build_encoder(encoder.state_dict(), released, "file")
    assert read.cfg == ours
    assert_same(read.state_dict(), encoder.state_dict())


def _without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("gamma")}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            _without,
            "4 missing (blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls1.gamma, ...)",
        ),
        (lambda t: {**t, "head.weight": torch.ones(1)}, "1 not expected (head.weight)"),
        (
            lambda t: {**t, "norm.bias": torch.ones(7), "cls_token": torch.ones(1)},
            "2 of another shape (cls_token [1], expected [1, 1, 16], norm.bias [7], expected [16])",
        ),
        (lambda t: {**t, "norm.bias": torch.ones(16, dtype=torch.int8)}, "1 no weights (norm.bias of torch.int8)"),
        (
            lambda t: {**t, "pos_embed": torch.ones(1, 18, 16)},
            "1 of another shape (pos_embed [1, 18, 16], expected [1, 17, 16])",
        ),
        (lambda t: {**t, "pos_embed": torch.ones(17)}, "1 of another shape (pos_embed [17], expected [1, 17, 16])"),
        (lambda t: {**t, "register_tokens": torch.ones(1, 4, 16)}, "1 not expected (register_tokens)"),
    ],
)
def test_what_does_not_fit_is_named(
    tensors: dict[str, Tensor], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], problem: str
) -> None:
    with pytest.raises(ValueError) as caught:
        build_encoder(change(tensors), find_released(TINY), "weights.pth")
    assert str(caught.value) == f"weights.pth: not the weights of {TINY}: {problem}"


def test_weights_that_are_not_finite_are_refused(tensors: dict[str, Tensor]) -> None:
    name = "blocks.1.attn.proj.bias"
    broken = tensors[name].clone()
    broken[3] = torch.nan
    with pytest.raises(ValueError, match=rf"^weights\.pth: 1 tensors have values that are NaN .* first is {name}:"):
        build_encoder({**tensors, name: broken}, find_released(TINY), "weights.pth")


def test_registers_make_another_model() -> None:
    tensors = weights(shapes_of("dinov2_vits14_reg"))
    for name in ("dinov2_vits14", "panopticon_vitb14"):
        with pytest.raises(ValueError, match=r"; it is one of dinov2_vits14_reg: choose --as dinov2_vits14_reg$"):
            build_encoder(tensors, find_released(name), "weights.pth")


def test_another_model_is_recognised(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("panopticon_vitb14", "dinov2_vitb14", "dinov2_vitl14_reg"):
        assert main(["import", str(file), "--as", name, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"ssl-eo: {file}: not the weights of {name}: ")
        assert error.endswith(f"; it is one of {TINY}: choose --as {TINY}\n")
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["{file}", "--as", "dinov2_vits41", "--out", "{tmp}/b"], "no published encoder 'dinov2_vits41'; did you mean"),
        (["{file}", "--as", "dinov3", "--out", "{tmp}/b"], "no published encoder 'dinov3'"),
        (["{tmp}/none.pth", "--as", TINY, "--out", "{tmp}/b"], "none.pth: No such file"),
        (
            ["{file}", "--as", TINY, "--out", "{tmp}/b", "--prefix", "teacher"],
            "no encoder under the prefix 'teacher.'",
        ),
        (["{file}", "--as", TINY, "--out", "{bundle}"], "holds a bundle already; give another --out"),
        (
            ["{file}", "--out", "{tmp}/b"],
            "dinov2_tiny_pretrain.pth: no published file is known by this name: say which encoder it is with --as (",
        ),
    ],
)
def test_import_refuses_in_one_line(
    file: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    words = ["import", *(word.format(file=file, bundle=bundle, tmp=tmp_path) for word in options)]
    assert _status(words) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def _status(words: list[str]) -> Any:
    try:
        return main(words)
    except SystemExit as exit:
        return exit.code


FILES = {  # as their authors, or torchgeo, call them
    "panopticon_vitb14": ["panopticon_vitb14_teacher.pth"],
    "dinov2_vitb14": ["dinov2_vitb14_pretrain.pth", "dinov2_vitb14.safetensors"],
    "dinov2_vitg14_reg": ["dinov2_vitg14_reg4_pretrain.pth", "dinov2_vitg14_reg.pth"],
    "croma_base": ["CROMA_base.pt", "CROMA_base-0238d814.pt"],
    "mae_vitl16": ["mae_pretrain_vit_large.pth", "mae_visualize_vit_large.pth", "mae_pretrain_vit_large_full.pth"],
    "dofa_vitb16": ["dofa_base_patch16_224-a0275954.pth"],
    "dofa_vitl16_legacy": ["dofa_large_patch16_224-fbd47fa9.pth"],
    "dofa_v2_vitb14": ["dofav2_vit_base_e150.pth"],
    "dofa_v2_vitl14": ["dofav2_vit_large_e150.pth", "dofa_v2_vitl14.pth"],
    "prithvi_eo_v1_100": ["Prithvi_EO_V1_100M.pt"],
    "prithvi_eo_v2_tiny_tl": ["Prithvi_EO_V2_tiny_TL.pt"],
    "prithvi_eo_v2_300": ["Prithvi_EO_V2_300M.pt"],
    "prithvi_eo_v2_600_tl": ["Prithvi_EO_V2_600M_TL.pt", "prithvi_eo_v2_600_tl.pt"],
}


@pytest.mark.parametrize("name", FILES)
def test_the_name_of_a_file_says_which_encoder_it_is(name: str) -> None:
    assert [released_name_of(Path("some") / file) for file in FILES[name]] == [name] * len(FILES[name])


@pytest.mark.parametrize(
    "file", ["DOFA_ViT_base_e100.pth", "multimae.pth", "model.safetensors", "my_croma_base.pt", ""]
)
def test_a_name_that_does_not_tell_is_asked_about(file: str) -> None:
    """Files of one name were read in two orders; one file holds four groups of bands; and any file may be anything."""
    with pytest.raises(ValueError, match=r"say which encoder it is with --as \(known: croma_base, croma_large, dinov2"):
        released_name_of(Path(file))


def test_import_by_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(find_released("panopticon_vitb14"), config=find_released(TINY).config, n_channels=3)
    monkeypatch.setattr(panopticon, "MODELS", (tiny,))
    file, out = tmp_path / "panopticon_vitb14_teacher.pth", tmp_path / "bundle"
    torch.save(tensors, file)
    assert main(["import", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out} (panopticon_vitb14; its weights are under CC-BY-4.0, see")
    facts = load_bundle(out).facts
    assert facts.keys() > UNSAID.keys()
    assert (facts["licence"], facts["released"]["name"]) == ("CC-BY-4.0", "panopticon_vitb14")


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_round_trip_changes_nothing(
    bundle: Path, tensors: dict[str, Tensor], tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"back.{suffix}"
    assert main(["export", "--checkpoint", str(bundle), "--as", TINY, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out} (encoder after step 1)\n"
    found = torch.load(out, weights_only=True) if suffix == "pth" else read_tensors(out)
    assert_same(found, tensors)


def test_a_file_is_replaced_only_when_asked(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "back.pth"
    out.write_text("mine")
    words = ["export", "--checkpoint", str(bundle), "--as", TINY, "--out", str(out)]
    assert main(words) == 2
    assert "exists already; give another --out, or add --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0
    assert read_released(out, find_released(TINY))[0].cfg == find_released(TINY).config


def test_a_name_says_how_it_is_written(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.pth, \.pt or \.safetensors"):
        export_released(load_bundle(bundle).encoder, TINY, tmp_path / "weights.npz")


def _of(**changes: Any) -> Encoder:
    released = find_released("panopticon_vitb14")
    with torch.device("meta"):
        return Encoder(replace(released.config, **changes), 3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"depth": 4}, "its depth is 4, expected 12"),
        ({"position": "sincos"}, "its position is sincos, expected learned"),
        ({"layer_scale_init": None}, "its LayerScale is False, expected True"),
        ({"n_registers": 4}, "its n_registers is 4, expected 0"),
        ({"n_heads": 6}, "its n_heads is 6, expected 12"),
        ({"norm_eps": 1e-5}, "its norm_eps is 1e-05, expected 1e-06"),
        ({"position_resize": "antialias"}, "its position_resize is antialias, expected offset"),
        ({"patch_embed": "conv"}, "its patch_embed is conv, expected channel_attention"),
        ({"mlp_ratio": 2.0}, "36 of another shape (blocks.0.mlp.fc1.weight [1536, 768], expected [3072, 768]"),
    ],
)
def test_an_encoder_that_published_code_would_read_otherwise_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        released_state_dict(_of(**changes), find_released("panopticon_vitb14"))
    assert str(caught.value).startswith("this encoder is no panopticon_vitb14: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["prithvi_eo_v2_tiny_tl", "multimae_eo_vitb8_rgb"])
def test_an_encoder_of_another_native_grid_is_refused(name: str) -> None:
    """No tensor's shape tells it, and positions are stretched from it."""
    released = find_released(name)
    with torch.device("meta"):
        encoder = Encoder(replace(released.config, image_size=112), released.n_channels)
    with pytest.raises(ValueError, match="its image_size is 112, expected 224"):
        released_state_dict(encoder, released)


@pytest.mark.parametrize("shape", [(3,), (), (17, 16), (1, 16, 4, 4)])
def test_a_table_of_positions_of_any_shape_is_refused_in_one_line(
    tensors: dict[str, Tensor], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Also by the families that look at it to say whose file it is instead."""
    torch.save({**tensors, "pos_embed": torch.zeros(shape)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"odd\.pth: not the weights of {TINY}: ") as caught:
        read_released(tmp_path / "odd.pth", find_released(TINY))
    assert "\n" not in str(caught.value)


def test_tensors_that_are_not_all_there_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Expanded to their shape they would take any amount of memory."""
    for name, value in {"huge": torch.zeros(()).expand(1 << 40), "few": torch.zeros(4, 4).to_sparse()}.items():
        torch.save({**tensors, name: value}, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name} .* is sparse, or has fewer values than its shape says"):
            read_released(tmp_path / f"{name}.pth", find_released(TINY))


def test_an_encoder_without_a_mask_token_gets_zeros(tmp_path: Path) -> None:
    released = find_released(TINY)
    encoder = Encoder(replace(released.config, mask_token=False, drop_path_prob=0.1, layer_scale_init=0.1), 3)
    encoder.init_weights()
    export_released(encoder, TINY, tmp_path / "weights.pt")
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert found.keys() == shapes_of(TINY).keys()
    assert torch.equal(found.pop("mask_token"), torch.zeros(1, 16))
    assert_same(found, dict(encoder.state_dict()))


def test_a_safetensors_file_comes_in_too(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", tensors)
    import_released(tmp_path / "model.safetensors", TINY, tmp_path / "bundle")
    model = load_bundle(tmp_path / "bundle")
    assert_same(model.encoder.state_dict(), tensors)
    assert isinstance(model.inputs["rgb"], SensorInput)
