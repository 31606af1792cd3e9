"""Probing a finished encoder, and the table that a person reads: the encoder beside what needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from ssl_eo.eval.features import tap_layers
from ssl_eo.eval.hook import EvalConfig, EvalHook
from ssl_eo.eval.summary import read_results, summarise
from ssl_eo.models.vit import Encoder, EncoderInput, Tokens
from ssl_eo.seeding import derive_seed

__all__ = ["evaluate", "print_summary"]


def evaluate(encoder: Encoder, step: int, cfg: EvalConfig, out: Path) -> None:
    """Probe `encoder` on `cfg.tasks`, beside one of the same shape with random weights and the pixel controls.

    Results go to `out/eval.jsonl` in the form of the training hook; the random encoder is step 0, ours is `step`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    hook = EvalHook(cfg, out, device)
    fresh = Encoder(encoder.cfg, encoder.n_channels)
    torch.manual_seed(derive_seed(0, "init"))
    fresh.init_weights()
    for model, at in ((fresh, 0), (encoder, step)):
        model.to(device).eval()
        hook.run(partial(_encode, model, tap_layers(cfg.taps, len(model.blocks))), at, model)


def print_summary(path: Path, stream: TextIO) -> bool:
    """Print one table for each task in the file `path` (`eval.jsonl`): last step against step 0 and the controls.

    Returns whether all that the tables compare could be measured; what could not is named below its table.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)
    summaries = summarise(read_results(path))
    for summary in summaries:
        table = Table(title=f"{summary.task}: accuracy of frozen features", title_justify="left")
        for column in ("features", "read at", *summary.probes):
            table.add_column(column, justify="right" if column in summary.probes else "left")
        for row in summary.rows:
            cells = (f"{100 * row.accuracy[p]:.1f} %" if p in row.accuracy else "" for p in summary.probes)
            table.add_row(row.title, row.tap, *cells)
        console.print(table)
        for rival in dict.fromkeys(margin.rival for margin in summary.margins):
            gains = [f"{m.probe} {m.points:+.1f}" for m in summary.margins if m.rival == rival]
            console.print(f"  margin over {rival}: {', '.join(gains)} points")
        for failure in summary.failures:
            console.print(f"  {failure}")
    return not any(summary.failures for summary in summaries)


def _encode(encoder: Encoder, layers: Sequence[int], inputs: EncoderInput) -> Sequence[Tokens]:
    return encoder.intermediates(inputs, layers)
