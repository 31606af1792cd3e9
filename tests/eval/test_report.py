"""The report: self-contained, right about the run, and there whatever the run left behind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_eo.eval.panel import save_panel
from ssl_eo.eval.report import write_report

CONFIG = """\
objective: {name: mae}
model: {size: tiny, patch_size: 8}
data: {sources: [{name: synthetic}]}
train: {total_steps: 200, global_batch_size: 64}
note: "<script>alert(1)</script>"
"""


def _probe(step: int, features: str, tap: str, probe: str, accuracy: float) -> dict[str, Any]:
    head = {"step": step, "task": "scenes", "features": features, "kind": "probe", "tap": tap, "probe": probe}
    return {**head, "metric": "accuracy", "accuracy": accuracy, "macro_accuracy": accuracy - 0.01, "seconds": 1.0}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    (run / "env.json").write_text(json.dumps({"torch": "2.10"}))
    metrics = [
        {"step": s, "loss": 3.0 - s / 100, "loss/pixels": 1.0, "lr": 1e-3, "grad_norm": 1.0 + s, "samples_per_s": 32.0}
        for s in range(10, 201, 10)
    ]
    _write(run / "metrics.jsonl", [{"step": 20, "loss": 99.0}, *metrics])
    evals = [_probe(s, "encoder", "last", p, 0.4 + s / 1000) for s in (0, 100, 200) for p in ("knn", "ridge")]
    evals += [_probe(0, "texture_statistics", "pixels", "ridge", 0.55), _probe(200, "encoder", "last", "ridge", 0.725)]
    evals.append({"step": 100, "task": "scenes", "features": "encoder", "kind": "error", "error": "OSError: <gone>"})
    _write(run / "eval.jsonl", evals)
    save_panel(run / "pictures" / "step_00000100.png", [("input", np.random.default_rng(0).random((3, 16, 16, 3)))])
    return run


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that elements close in order."""

    VOID = frozenset({"meta", "img", "br", "path", "use", "rect", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href"):
                self.links.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    page = _Page(html)
    assert page.open == []
    assert len(page.links) > 1
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "http" not in html
    assert "&lt;script&gt;" in html
    assert "OSError: &lt;gone&gt;" in html
    assert "#01010" not in html  # every stand-in colour became a variable of the page


def test_the_page_tells_what_happened(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    text = " ".join(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", html, flags=re.DOTALL).split())
    assert "my-run mae · ViT-tiny/8 · synthetic" in text
    assert "samples 12.8 k" in text
    assert "training, without probes 0:06:40" in text  # 200 steps of 64 samples at 32 samples/s
    # Of two records of one step the later one counts.
    assert "72.5 % accuracy on scenes (ridge on frozen features, step 200)" in text
    assert "+17.5 points over texture statistics (55.0 %)" in text
    assert "loss at step 200" in text
    assert "99" not in text  # a step repeated after a resume counts once
    for section in ("Probes", "Training", "Speed", "Pictures", "Configuration", "Environment"):
        assert section in text


def _health(step: int, source: str, tap: str, **values: Any) -> dict[str, Any]:
    head = {"step": step, "source": source, "features": "encoder", "kind": "health", "tap": tap}
    return {**head, "effective_rank": 9.0, "mean_norm": 3.0 + step, "collapsed": [], "seconds": 0.1, **values}


def test_the_page_shows_the_health_of_features(run_dir: Path) -> None:
    evals = [_health(step, source, "last") for step in (0, 50, 100) for source in ("a/b", "synthetic")]
    evals += [_health(step, "synthetic", "depth_0.50", cls_patch_cosine=0.5) for step in (0, 50)]
    evals += [_health(step, "synthetic", "last", collapsed=["are nearly one point"]) for step in (100, 150)]
    bad = {
        "step": 200,
        "source": "synthetic",
        "features": "encoder",
        "kind": "health",
        "tap": "last",
        "n_not_finite": 3,
    }
    evals.append({**bad, "collapsed": ["are not finite"]})
    evals.append({"step": 50, "source": "a/b", "features": "encoder", "kind": "error", "error": "OSError: <gone>"})
    evals.append({"step": 150, "kind": "skipped", "what": "probes", "reason": "no time"})
    with (run_dir / "eval.jsonl").open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in evals))
    html = write_report(run_dir).read_text()
    page = _Page(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    text = " ".join(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", html, flags=re.DOTALL).split())
    assert "Step 50: could not be measured: OSError: &lt;gone&gt;" in text
    assert "2 times from step 100 to 150: features at the last block are nearly one point" in text
    assert "Step 200: features at the last block are not finite" in text
    assert "Step 150: probes put off: no time" in text
    titles = re.findall(r'aria-label="([^"]*)"', html)
    # Two sources; the chart of probes has its own name.
    assert {
        name: titles.count(name) for name in ("Effective rank", "Mean norm", "Cosine of CLS token and patches")
    } == {
        "Effective rank": 2,
        "Mean norm": 2,
        "Cosine of CLS token and patches": 1,
    }
    assert "72.5 % accuracy on scenes" in text


def test_the_same_run_gives_the_same_page(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "eval.jsonl", "env.json", "pictures"])
def test_missing_parts_are_left_out(run_dir: Path, missing: str) -> None:
    path = run_dir / missing
    path.rename(run_dir.parent / "elsewhere")
    html = write_report(run_dir).read_text()
    assert _Page(html).open == []
    expected = {"eval.jsonl": "No probes were run", "metrics.jsonl": "No training step was logged"}
    assert expected.get(missing, "my-run") in html


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "lr": 0.0}\n{"step": 2, "lo')
    html = write_report(tmp_path).read_text()
    assert "1 of 200" in html


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run directory"):
        write_report(tmp_path)


def test_a_panel_shows_rows_on_one_scale_and_what_is_not_finite_as_grey(tmp_path: Path) -> None:
    from PIL import Image

    ramp = np.linspace(-2.0, 2.0, 32 * 32 * 3).reshape(1, 32, 32, 3)
    hidden = ramp.copy()
    hidden[:, :16] = np.nan
    path = tmp_path / "pictures" / "step_00000001.png"
    save_panel(path, [("input", ramp), ("masked", hidden), ("half", ramp / 2)])
    image = np.asarray(Image.open(path))
    zoom, header = 4, 24
    assert image.shape == (3 * (32 * zoom + header), 32 * zoom, 4)
    rows = image.reshape(3, 32 * zoom + header, 32 * zoom, 4)[:, header:]
    assert rows[0, 0, 0, :3].tolist() == [0, 0, 0]
    assert rows[0, -1, -1, :3].tolist() == [255, 255, 255]
    assert (rows[1, : 16 * zoom, :, :3] == 128).all()
    assert (rows[1, 16 * zoom :] == rows[0, 16 * zoom :]).all()
    assert abs(int(rows[2, 0, 0, 0]) - 0.25 * 255) < 8  # half the range on the scale of the first row


def test_a_panel_stretches_each_sample_but_not_noise(tmp_path: Path) -> None:
    from PIL import Image

    ramp = np.linspace(0.0, 1.0, 16 * 16 * 3).reshape(16, 16, 3)
    path = tmp_path / "step_00000001.png"
    save_panel(path, [("input", np.stack([ramp, 50 + 3 * ramp, 0.01 * ramp]))])
    picture = np.asarray(Image.open(path))[24:, :, :3]
    bright, brighter, flat = (picture[:, i * (128 + 4) :][:, :128] for i in range(3))
    assert bright.min() == 0
    assert bright.max() == 255
    assert np.array_equal(bright, brighter)
    assert flat.max() < 32


def test_a_panel_refuses_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[n, H, W, 3\]"):
        save_panel(tmp_path / "a.png", [("input", np.zeros((2, 3, 8, 8)))])


@pytest.mark.parametrize("name", ['"><script>alert(1)</script>', "a\\q", "a b/c", "\\1"])
def test_names_of_tasks_are_text_and_nothing_else(name: str, run_dir: Path) -> None:
    records = [json.loads(line) | {"task": name} for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    _write(run_dir / "eval.jsonl", records)
    html = write_report(run_dir).read_text()
    page = _Page(html)
    assert {link for link in page.links if not link.startswith(("#", "data:"))} == set()
    assert "<script" not in html
    assert [found for found in page.ids if not re.fullmatch(r"[\w.-]+", found)] == []


def test_scores_and_shares_are_in_percent_wherever_they_stand(run_dir: Path) -> None:
    records = [_health(step, "synthetic", "last", first_ratio=0.25, dead_ratio=0.5) for step in (0, 50)]
    with (run_dir / "eval.jsonl").open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in records))
    waits = [{"step": s, "loss": 1.0, "data_wait_ratio": 0.4} for s in (210, 220)]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in waits))
    html = write_report(run_dir).read_text()
    text = " ".join(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", html, flags=re.DOTALL).split())
    assert "scenes: accuracy % features knn ridge knn, macro accuracy % ridge, macro accuracy %" in text
    assert "encoder, step 200 60.0 72.5 59.0 71.5" in text
    charts = dict(re.findall(r'aria-label="([^"]*)"(.*?)</svg>', html, re.DOTALL))
    ticks = {title: [float(t) for t in re.findall(r">([\d.]+)</text>", svg)] for title, svg in charts.items()}
    for title, low, high in (
        ("ridge, accuracy %", 40, 75),
        ("Time waiting for data, %", 10, 45),
        ("Share of the first direction, %", 20, 30),
        ("Share of dead features, %", 40, 60),
    ):
        assert any(low <= tick <= high for tick in ticks[title]), (title, ticks[title])
        assert not any(0 < tick < 1 for tick in ticks[title]), (title, ticks[title])


def test_a_task_that_could_not_be_measured_has_no_table(run_dir: Path) -> None:
    error = {"step": 100, "task": "maps", "features": "encoder", "kind": "error", "error": "OSError: gone"}
    _write(run_dir / "eval.jsonl", [error])
    html = write_report(run_dir).read_text()
    assert "<table><thead>" not in html.replace("\n", "").split("<h2>Training")[0]
    assert "encoder on maps could not be evaluated: OSError: gone" in html
    assert "accuracy" not in html.split("<h2>Probes")[1]
