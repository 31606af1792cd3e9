"""Running a study: every cell is trained, chosen on validation, scored on test, and leaves a record.

A study is a folder. Any number of processes may work on it; a cell whose record is there is not trained again, so the
same command goes on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssl_eo
from ssl_eo.adapt.backbone import DEFAULT_TAPS
from ssl_eo.adapt.cost import check_country, energy_of, samples_per_second, step_cost
from ssl_eo.adapt.opened_task import OpenedTask
from ssl_eo.adapt.sampling import class_counts
from ssl_eo.adapt.study import UNET, Cell, StudyConfig
from ssl_eo.adapt.study_code import study_code
from ssl_eo.adapt.study_models import StudyModels
from ssl_eo.adapt.study_records import is_of_study
from ssl_eo.adapt.training import Fitted, fit, loss_for, predict
from ssl_eo.adapt.workbench import Workbench
from ssl_eo.components import import_extra, one_line
from ssl_eo.eval.bootstrap import interval_of, resampled_scores
from ssl_eo.eval.claims import Claim, work_through
from ssl_eo.eval.failures import failure
from ssl_eo.eval.metrics import Classified, Outcome, Segmented
from ssl_eo.eval.provenance import task_facts
from ssl_eo.eval.records import key_of, packed
from ssl_eo.jsonl import JsonLines, read_jsonl
from ssl_eo.progress import progress, say
from ssl_eo.seeding import derive_seed

__all__ = ["RECORDS", "read_study", "run_study"]

logger = logging.getLogger(__name__)

RECORDS = "study.jsonl"
_MAX_DEATHS = 2  # of processes at one cell, after which it counts as failed


def run_study(cfg: StudyConfig, out: Path) -> list[dict[str, Any]]:
    """Train all cells of `cfg` that have no result in `out`, together with other processes that do the same.

    Returns the records of all its cells, in their order. What fails is a record, and the rest goes on; the next call
    tries it again. Of results whose model was to be saved and is not there, `unsaved` holds the folder. Raises
    `ValueError` where an encoder cannot be opened, `out` not be written, the device is none, nobody knows the country,
    or models are to be saved and none can be, and `MissingExtraError` for LoRA or energy without its package, before
    anything is trained.
    """
    _check_device(cfg.device)
    check_country(cfg.country)
    if "lora" in cfg.protocols:
        import_extra("lora", "peft", "protocol lora")
    runner = _Runner(cfg, out)
    cells = {f"{cell.name}-{runner.key_of(cell)}": cell for cell in cfg.cells()}  # opens encoders
    _check_writable(out)
    runner.begin()
    try:
        work_through(out / ".claims", list(cells), lambda name, claim: runner.work(cells[name], claim))
    except KeyboardInterrupt:
        n_done = sum(record["kind"] == "result" for record in _records_of(out, runner, cells.values()))
        say(f"{n_done} of {len(cells)} cells are done; the same command goes on")
        raise
    return _records_of(out, runner, cells.values())


def read_study(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each cell in a folder, by key; that of a failure gives way to any result."""
    found: dict[str, dict[str, Any]] = {}
    for record in read_jsonl(folder / RECORDS, is_of_study):
        if record["kind"] == "result" or found.get(record["key"], {}).get("kind") != "result":
            found[record["key"]] = record
    return found


def _records_of(out: Path, runner: _Runner, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Those of `cells` in `out`. A key has no names of encoders and trainings, so they are shown by those asked for."""
    found = read_study(out)
    keys = {cell: runner.key_of(cell) for cell in cells}
    return [
        {**found[key], "cell": asdict(cell), **runner.unsaved(cell, found[key])}
        for cell, key in keys.items()
        if key in found
    ]


def _check_device(name: str | None) -> None:
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used ({one_line(error)}); give cpu or cuda:0") from None


def _check_writable(out: Path) -> None:
    """Raise `ValueError` where records of cells could not be added to the folder `out`, which is made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: no folder can be made here ({error.strerror}); give another --out") from None
    try:
        with _appending(out):
            pass
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be written ({error.strerror}); give another --out") from None


@contextmanager
def _appending(out: Path) -> Iterator[JsonLines]:
    with (out / f".{RECORDS}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with JsonLines(out / RECORDS) as file:
            yield file


class _Results:
    """Which cells have a result in a file that any number of processes add to; each of its lines is read once."""

    def __init__(self, path: Path) -> None:
        self._path, self._n_read = path, 0
        self._keys: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether there is a result of the cell `key` by now."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._n_read)
                whole, end, _ = file.read().rpartition(b"\n")  # the rest is being written
            self._n_read += len(whole + end)
            self._keys.update(found for line in whole.splitlines() if (found := _key_of_result(line)))
        return key in self._keys

    def n_others(self, keys: Iterable[str]) -> int:
        """How many results were found so far that are of none of `keys`."""
        return len(self._keys.difference(keys))


def _key_of_result(line: bytes) -> str | None:
    """The key of the result in a line of the file; None for anything else, of which `read_study` tells."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_result = isinstance(record, dict) and record.get("kind") == "result" and is_of_study(record)
    return str(record["key"]) if is_result else None


class _Runner:
    """Works on cells, one after another."""

    def __init__(self, cfg: StudyConfig, out: Path) -> None:
        self._cfg, self._out = cfg, out
        cells = list(cfg.cells())
        self._places = {cell: f"{i}/{len(cells)}" for i, cell in enumerate(cells, start=1)}
        self._bench = Workbench(cfg)
        self._tasks = {task.name: task for task in cfg.tasks}
        self._results = _Results(out / RECORDS)
        self._models = StudyModels(out / "models", cells)

    def key_of(self, cell: Cell) -> str:
        """The hash of all that is asked of a cell."""
        return key_of(self._facts(cell))

    def begin(self) -> None:
        """Say what there is to do. Raises `ValueError` where models are to be saved and none can be."""
        n = len(self._places)
        n_done = sum(self._results.has(self.key_of(cell)) for cell in self._places)
        done = f", of which {n_done} {_are(n_done)} trained already" if n_done else ""
        n_unets = sum(cell.encoder == UNET for cell in self._places)
        unets = f"; {n_unets} of them {_are(n_unets)} a UNet from scratch (unet=false leaves it out)" if n_unets else ""
        say(f"{n} {'models' if n > 1 else 'model'} to train{done}{unets}")
        for trouble in self._troubles():
            say(f"some will fail: {trouble}")
        if n_others := self._results.n_others(self.key_of(cell) for cell in self._places):
            what = "other results" if n_others > 1 else "other result"
            say(f"{n_others} {what} in {self._out} {_are(n_others)} of other options or code, and not shown")
        if not self._cfg.save_models:
            return
        kinds = {name: self._bench.is_ensemble(name) for name in self._cfg.encoders}
        if all(kinds.values()):
            raise ValueError("save_models: models of ensembles cannot be saved, and there are no others; unset it")
        unsaved = [name for name, is_ensemble in kinds.items() if is_ensemble]
        if n_unets:
            unsaved.append("the UNet")
        if unsaved:
            say(f"save_models: models of {', '.join(unsaved)} are not saved; those of single encoders are")
        if again := sum(self._is_trained_again(cell) for cell in self._places):
            say(f"save_models: {again} of those that are trained already were not saved, and are trained again")

    def _troubles(self) -> Iterator[str]:
        """Why cells cannot be trained, as far as it is known before any is."""
        for name in self._tasks:
            if error := self._bench.trouble_of(name):
                yield f"task {name}: {one_line(error)}"
        for encoder, protocol in product(self._cfg.encoders, self._cfg.protocols):
            try:
                self._bench.check_protocol(encoder, protocol)
            except ValueError as error:
                yield str(error)

    def unsaved(self, cell: Cell, record: Mapping[str, Any]) -> dict[str, str]:
        """`unsaved`, the folder of the model of a result, if it was to be saved and is not there; else nothing."""
        if record["kind"] == "result" and self._lacks_model(cell):
            return {"unsaved": str(self._models.path(cell))}
        return {}

    def work(self, cell: Cell, claim: Claim) -> None:
        """Train a cell, unless there is a result of it, and its model if that is to be saved."""
        key = self.key_of(cell)
        if self._results.has(key) and not self._lacks_model(cell):
            return
        start = time.perf_counter()
        fitted = None
        if claim.n_before >= _MAX_DEATHS:
            problem = f"{claim.n_before} processes have ended while they were at it (out of memory?)"
            found: dict[str, Any] = {"kind": "error", "error": problem}
        else:
            title = f"{self._places[cell]} {cell.name}"
            say(f"{title} ...")
            try:
                with progress(title) as tell:
                    fitted, measured = self._measure(cell, tell)
                found = {"kind": "result", **measured}
            except Exception as error:
                found = failure(logger, error, "%s could not be trained", cell.name)
        seconds = time.perf_counter() - start
        outcome = "trained" if found["kind"] == "result" else "failed"
        say(f"{self._places[cell]} {cell.name}: {outcome}, {seconds:.0f} s")
        date = datetime.now(UTC).isoformat(timespec="seconds")
        with _appending(self._out) as file:
            file.write({"key": key, "cell": asdict(cell), **found, "asked": self._facts(cell), "date": date})
        if fitted is not None and self._lacks_model(cell):
            self._save(cell, key, fitted)  # after the record: a disk that is full costs the model, not the result

    def _is_saved(self, cell: Cell) -> bool:
        """Whether the model of a cell is to be saved."""
        return self._cfg.save_models and cell.encoder != UNET and not self._bench.is_ensemble(cell.encoder)

    def _lacks_model(self, cell: Cell) -> bool:
        return self._is_saved(cell) and not self._models.has(cell, self.key_of(cell))

    def _is_trained_again(self, cell: Cell) -> bool:
        return self._results.has(self.key_of(cell)) and self._lacks_model(cell)

    def _facts(self, cell: Cell) -> dict[str, Any]:
        cfg = self._cfg
        is_unet = cell.encoder == UNET
        return {
            "task": task_facts(self._tasks[cell.task]),
            "content": self._bench.content_of(cell.task),
            "samples": asdict(cfg.samples),
            **({} if is_unet else self._bench.facts_of(cell.encoder)),
            "decoder": cell.decoder,
            "options": cfg.decoders.get(cell.decoder, {}),
            "protocol": cell.protocol,
            "lora": asdict(cfg.lora) if cell.protocol == "lora" else None,
            "training": asdict(cfg.trainings[cell.training]),
            "seed": cell.seed,
            "n_resamples": cfg.n_resamples,
            "version": ssl_eo.__version__,
            "code": study_code(),
            "torch": torch.__version__,
        }

    def _measure(self, cell: Cell, tell: Callable[[int, int], None]) -> tuple[Fitted, dict[str, Any]]:
        """The model of a cell, and what its record says of it; `tell` is told how far its training is."""
        bench, training = self._bench, self._cfg.trainings[cell.training]
        opened = bench.task(cell.task)
        opened.check_labelled()
        loss_for(opened.labels, opened.splits["train"], training)  # a wrong number of weights, before features
        leaks = opened.leaks  # splits that share samples are refused before anything is trained
        make_model = bench.maker_of(cell)
        samples = bench.samples_of(cell, make_model, training)
        with energy_of(self._cfg.country) as energy:
            fitted = fit(make_model, opened.labels, samples["train"], samples["val"], training, cell.seed, tell)
        outcome = predict(fitted.model, opened.labels, samples["test"], training)
        train = opened.splits["train"]
        inputs, _ = train.batch(torch.arange(min(training.batch_size, len(train))))
        chosen = bench.chosen(cell)
        return fitted, {
            **self._scored(opened, outcome),
            **_trained(fitted),
            **asdict(step_cost(fitted.model, inputs, train.size, training)),
            "energy_kwh": energy.kwh,
            "co2_kg": energy.co2_kg,
            "missing_bands": list(fitted.model.backbone.missing_bands),
            "has_kept_features": samples["train"].features is not None,
            "samples_per_s": round(samples_per_second(fitted.model, inputs, train.size, training), 2),
            "specialists": None if chosen is None else chosen.facts,
            **leaks,
            "n_samples": {name: len(split) for name, split in opened.splits.items()},
            "n_of_class": _n_of_class(opened),
            "device": bench.device.type,
        }

    def _save(self, cell: Cell, key: str, fitted: Fitted) -> None:
        options = self._cfg.decoders[cell.decoder]
        taps = self._cfg.encoders[cell.encoder].taps or list(DEFAULT_TAPS)
        facts = {"decoder": cell.decoder, "options": options, "taps": taps}
        try:
            self._models.save(cell, key, fitted.model, self._bench.task(cell.task).task, facts)
        except (OSError, ValueError) as error:
            logger.warning("%s is trained, and could not be saved: %s", cell.name, one_line(error))

    def _scored(self, opened: OpenedTask, outcome: Outcome) -> dict[str, Any]:
        """Scores on the test samples with their intervals, by classes, and what was taken for what."""
        labels, groups = opened.labels, opened.splits["test"].groups
        scores = outcome.scores()
        if not math.isfinite(scores.get(labels.headline, math.nan)):
            raise ValueError(f"{labels.headline} is undefined for the test samples of {opened.task.name}")
        # The same draws for all cells of a dataset, so that differences are of pairs.
        seed, n = derive_seed(0, "bootstrap", opened.task.cfg.counts_as), self._cfg.n_resamples
        resampled = resampled_scores(outcome, groups, n, seed) if n else {}
        bounds = {name: interval_of(values) for name, values in resampled.items()}
        return {
            "metric": labels.headline,
            "classes": list(opened.task.class_names),
            "scores": {name: value for name, value in scores.items() if math.isfinite(value)},
            "intervals": {k: [b.low, b.high] for k, b in bounds.items() if math.isfinite(b.low + b.high)},
            "resampled": packed(resampled[labels.headline]) if resampled else None,
            "n_groups": len(set(groups)),
            "per_class": {name: _plain(column) for name, column in outcome.per_class().items()},
            "confusion": outcome.confusion.tolist() if isinstance(outcome, (Classified, Segmented)) else None,
        }


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _n_of_class(opened: OpenedTask) -> dict[str, list[int]]:
    """How many samples of `train` and `val` each class has, or pixels; nothing where there are no classes."""
    shown = opened.labels.shown
    if shown.kind == "regression":
        return {"train": [], "val": []}
    found = {}
    for name in ("train", "val"):
        counts = class_counts(opened.splits[name].labels, shown.kind, shown.n_classes, shown.ignore)
        found[name] = (counts[1] if shown.kind == "multilabel" else counts).tolist()
    return found


def _trained(fitted: Fitted) -> dict[str, Any]:
    return {
        "lr": fitted.lr,
        "step": fitted.step,
        "curves": [{"lr": lr, "scores": _finite(scores)} for lr, scores in fitted.curves.items()],
        "n_trained": fitted.n_trained,
        "n_parameters": sum(p.numel() for p in fitted.model.parameters()),
        "seconds_train": round(fitted.seconds, 3),
    }


def _plain(column: Tensor) -> list[float | None]:
    return _finite(column.tolist())


def _finite(values: list[float]) -> list[float | None]:
    """Numbers as JSON knows them: null where undefined."""
    return [value if math.isfinite(value) else None for value in values]
