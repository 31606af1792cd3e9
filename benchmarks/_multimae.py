"""A training step of MultiMAE: its decoders run as one, beside a loop over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from _objective_steps import MOST_PPM, Setting, Training
from _table import Row
from _timing import median_wall_seconds
from torch import Tensor, nn

from ssl_eo.config import load
from ssl_eo.data.sources import synthetic
from ssl_eo.data.types import Batch
from ssl_eo.models.modality_decoders import ModalityDecoderConfig, ModalityDecoders
from ssl_eo.models.vit import Tokens
from ssl_eo.objectives.multimae import Objective
from ssl_eo.train.parallel import build_objective

__all__ = ["measure_decoders"]

RECIPE = "pretrain/multimae_vitb8_mmearth64"
SENSORS = ["sentinel2_l2a", "dem", "worldcover"]  # of procedural scenes, in place of MMEarth


def measure_decoders(setting: Setting, n_turns: int) -> list[Row]:
    """Steps of the recipe with its seven decoders in one and in a loop, the decoders alone, and how far they differ."""
    batched, looped = (MultiMaeTraining(setting, is_looped) for is_looped in (False, True))
    batch = batched.batch()
    loss, other = (float(training.loss(batch).detach()) for training in (batched, looped))
    rows = []
    for what, calls, least in (
        ("steps", {"loop": partial(looped.step, batch), "one": partial(batched.step, batch)}, 1.5),
        ("decoders alone", {"loop": looped.decoding(batch), "one": batched.decoding(batch)}, None),
    ):
        seconds = median_wall_seconds(calls, n_turns, setting.device)
        slow, fast = seconds["loop"], seconds["one"]
        rows += [
            Row("multimae", f"{what}, loop over decoders", setting.batch_size / slow, "samples/s", 1.0),
            Row(
                "multimae",
                f"{what}, decoders in one",
                setting.batch_size / fast,
                "samples/s",
                slow / fast,
                least_ratio=least,
            ),
        ]
    most = None if setting.bfloat16 else MOST_PPM
    return [*rows, Row("multimae", "loss, one beside the other", 1e6 * abs(loss / other - 1), "ppm", most=most)]


class LoopedDecoders(nn.Module):
    """Each decoder by itself, with weights of its own, equal to those of `decoders`."""

    def __init__(self, cfg: ModalityDecoderConfig, encoder_dim: int, decoders: ModalityDecoders) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        state = decoders.state_dict()
        for i, (name, target) in enumerate(decoders.targets.items()):
            alone = ModalityDecoders(cfg, encoder_dim, {name: target}, decoders.n_inputs)
            own = {key: value[i : i + 1] for key, value in state.items() if not key.startswith("outputs.")}
            own |= {key: value for key, value in state.items() if key.startswith(f"outputs.{name}.")}
            alone.load_state_dict(own)
            self.parts[name] = alone

    def forward(self, tokens: Tokens, ids_keep: Tensor, table: Tensor) -> dict[str, Tensor]:
        return {name: decoder(tokens, ids_keep, table)[name] for name, decoder in self.parts.items()}


class MultiMaeTraining(Training):
    """The recipe on procedural scenes."""

    objective: Objective

    def __init__(self, setting: Setting, is_looped: bool) -> None:
        small = ("model.embed_dim=48", "model.depth=2", "model.n_heads=3", "objective.decoder.embed_dim=32")
        tiles = tuple(f"objective.modalities.{name}.tile=sentinel2_l2a" for name in ("rgb", "ired", "ebands", "sired"))
        config = load(RECIPE, ["data.sources=[{name: synthetic}]", *tiles, *(small if setting.toy else ())])
        source = synthetic.Source(synthetic.Config(sensors=SENSORS, extent_m=600.0))
        options, model, schemas = config.objective.options, config.model, [source.schema]
        built = build_objective(lambda: Objective(options, model, schemas), 0, torch.device(setting.device)).train()
        assert isinstance(built, Objective)
        if is_looped:
            looped = LoopedDecoders(options.decoder, model.width, built.student["decoders"])
            built.student["decoders"] = looped.to(setting.device)
        super().__init__(setting, built, Objective.views(options, model, schemas), source)

    def decoding(self, batch: Batch) -> Callable[[], None]:
        """Forward and backward of the decoders, from tokens that are there."""
        objective, visible = self.objective, batch.visible
        assert visible is not None
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.bfloat16), torch.no_grad():
            tokens = objective._encode(visible, objective._images(batch, visible))

        def run() -> None:
            with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.bfloat16):
                answers = objective._decode(replace(tokens, x=tokens.x.requires_grad_()), visible)
            torch.stack([answer.float().square().mean() for answer in answers.values()]).sum().backward()
            self.optimizer.zero_grad(set_to_none=True)

        return run
