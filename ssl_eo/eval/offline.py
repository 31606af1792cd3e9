"""Probing a finished encoder, and the table that a person reads: the encoder beside what needs no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from ssl_eo.eval.features import tap_layers
from ssl_eo.eval.hook import EvalConfig, EvalHook
from ssl_eo.eval.report import read_jsonl
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
    records = read_jsonl(path)
    complete = True
    for task in dict.fromkeys(r["task"] for r in records):
        of_task = [r for r in records if r["task"] == task]
        last = max(r["step"] for r in of_task if r["features"] == "encoder")
        table = Table(title=f"{task}: accuracy of frozen features", title_justify="left")
        probes = list(dict.fromkeys(r["probe"] for r in of_task if r["kind"] == "probe"))
        for column in ("features", "read at", *probes):
            table.add_column(column, justify="right" if column in probes else "left")
        for (features, tap), cells in _rows(of_task, last).items():
            table.add_row(features, tap, *(f"{100 * cells[p]:.1f} %" if p in cells else "" for p in probes))
        console.print(table)
        for line in _margins(_rows(of_task, last), probes, last):
            console.print(line)
        for r in (r for r in of_task if r["kind"] == "error" and r["step"] in (0, last)):
            complete = False
            console.print(f"  {_title(r, last)} could not be measured: {r['error']}")
    return complete


def _encode(encoder: Encoder, layers: Sequence[int], inputs: EncoderInput) -> Sequence[Tokens]:
    return encoder.intermediates(inputs, layers)


def _rows(records: Sequence[Mapping[str, Any]], last: int) -> dict[tuple[str, str], dict[str, float]]:
    """Accuracy by (features, tap) and probe: the encoder at `last`, then what needs no training."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for r in sorted(records, key=lambda r: (r["features"] != "encoder", r["step"] != last)):
        if r["kind"] != "probe" or (r["features"] == "encoder" and r["step"] not in (0, last)):
            continue
        rows.setdefault((_title(r, last), r["tap"].replace("_", " ")), {})[r["probe"]] = r["accuracy"]
    return rows


def _title(record: Mapping[str, Any], last: int) -> str:
    if record["features"] != "encoder":
        return str(record["features"]).replace("_", " ")
    return f"encoder, step {record['step']:,}" if record["step"] == last else "random encoder"


def _margins(rows: Mapping[tuple[str, str], Mapping[str, float]], probes: Sequence[str], last: int) -> list[str]:
    """How far the encoder's best row is ahead of each rival's best row, by probe."""
    ours = f"encoder, step {last:,}"
    lines = []
    for rival in dict.fromkeys(title for title, _ in rows if title != ours):
        gains = []
        for probe in probes:
            best = {
                side: max((cells[probe] for (title, _), cells in rows.items() if title == side and probe in cells))
                for side in (ours, rival)
                if any(title == side and probe in cells for (title, _), cells in rows.items())
            }
            if len(best) == 2:
                gains.append(f"{probe} {100 * (best[ours] - best[rival]):+.1f}")
        if gains:
            lines.append(f"  margin over {rival}: {', '.join(gains)} points")
    return lines
