"""The page of evaluations: its numbers against a count by hand, and how it looks in a browser."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import tasks
from toy.results import N_TEST, outcome, problem, record, written

from ssl_eo.cli import _parser, main
from ssl_eo.eval.citing import encoder_text, facts_of_models, facts_of_tasks
from ssl_eo.eval.comparison import Comparison
from ssl_eo.eval.entrants import Entrant
from ssl_eo.eval.metrics import Regressed
from ssl_eo.eval.offline import Evaluation, Model, evaluate
from ssl_eo.eval.records import RESULTS, add_to_plan
from ssl_eo.eval.result_figures import Bar, Point, draw_bars, draw_confusion, draw_points
from ssl_eo.eval.results_page import Files, write_results_page


def _write(folders: Sequence[Path], out: Path, normalizer: Sequence[Path] = (), **files: Path) -> Path:
    """The page `out`, after it and the other files are written."""
    return write_results_page(folders, Files(out, **files), normalizer=normalizer)[0]


def _entrant(comparison: Comparison, title: str) -> Entrant:
    (found,) = [e for e in comparison.entrants if e.title == title]
    return found


# --- charts -----------------------------------------------------------------------------------------------------------

ODD = ['$a_b$ & <i>"c"</i>', "100 %", "\\d"]


def _shapes(svg: str, kind: str) -> int:
    """How many elements of matplotlib's name `kind` are drawn; the SVG must be well-formed."""
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    return len([e for e in root.iter() if kind in e.get("id", "")])


def test_bars_have_a_patch_and_an_interval_each() -> None:
    bars = [Bar(name, 10.0 * i, (10.0 * i - 2, 10.0 * i + 2) if i else None, i or None) for i, name in enumerate(ODD)]
    svg = draw_bars(ODD[0], bars, "x")
    assert _shapes(svg, "x-patch_") - _shapes(draw_bars("", [], "x"), "x-patch_") == 3
    for name in ODD:
        assert name in "".join(ElementTree.fromstring(svg.replace("xlink:href", "href")).itertext())


def test_a_confusion_has_a_cell_for_each_share_and_rows_sum_to_one() -> None:
    svg = draw_confusion("t", [[8, 2, 0], [0, 0, 0], [1, 1, 2]], ODD, "x")
    texts = [e.text for e in ElementTree.fromstring(svg.replace("xlink:href", "href")).iter("text")]
    assert [t for t in texts if t and t.isdigit()] == ["80", "20", "25", "25", "50"]
    opacities = [float(v) for v in re.findall(r"fill: var\(--accent\); opacity: ([\d.]+)", svg)]
    assert opacities == pytest.approx([0.8, 0.2, 0.25, 0.25, 0.5])


def test_points_and_levels_are_named() -> None:
    svg = draw_points("t", [Point("one", 0.5, 40, 0), Point("none", 5, 60, None)], [("level", 50)], "GFLOP", "x")
    assert all(name in svg for name in ("one", "none", "level", "GFLOP"))


# --- the page ---------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """What a browser would load, the text, and whether elements close in order."""

    VOID = frozenset({"meta", "img", "br", "wbr", "path", "use", "rect", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
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
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"style", "svg"} & set(self.open):
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data if "span" not in self.open else f" {data}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two encoders, evaluated on a task of each kind with parts of the training set and bands."""
    folders = []
    for number, name in enumerate(("first", "second")):
        folder = tmp_path_factory.mktemp(name)
        plan = Evaluation(
            tasks=[tasks.task(kind, name=f"toy_{kind}", flags=[f"<noise> of {kind}"]) for kind in tasks.KINDS],
            partitions=["0.20x", "1.00x"],
            subsets=["all", "random"],
            seeds=[0, 1],
            n_resamples=40,
        )
        evaluate(Model(name, tasks.encoder(seed=number), 10), plan, folder)
        folders.append(folder)
    return folders


def _text(page: _Page) -> str:
    return " ".join(" ".join(page.texts).split())


def test_the_page_is_whole_and_loads_nothing(results: list[Path], tmp_path: Path) -> None:
    html = _write(results, tmp_path / "report.html").read_text()
    page = _Page(html)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in html
    assert not re.search(r"#0[1-9a]0[1-9a]0[1-9a]\b", html)  # every stand-in colour became a variable of the page
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= set(re.findall(r"(--[\w-]+):", html))


def test_the_page_shows_what_was_measured(results: list[Path], tmp_path: Path) -> None:
    page = _Page(_write(results, tmp_path / "report.html").read_text())
    text = _text(page)
    assert "Evaluation of first, second" in text
    for kind in tasks.KINDS:
        assert f"<noise> of {kind}" in text  # escaped, so the parser gives it back
    for title in (
        "Margins over what needs no training",
        "Bands",
        "Confusion of classes",
        "Score over labelled",
    ):
        assert title in text
    comparison = Comparison.read(results)
    titles = ["first", "second", "random encoder", "band statistics", "texture statistics", "random convolution"]
    assert [e.title for e in comparison.entrants] == titles
    (start,) = [i for i, row in enumerate(page.rows) if row[:2] == ["features", "toy_classification, accuracy %"]][:1]
    for row, entrant in zip(page.rows[start + 1 : start + 7], comparison.entrants, strict=True):
        score = comparison.score(entrant, "toy_classification", "knn")
        assert score is not None
        assert score.interval is not None
        low, high = 100 * score.interval.low, 100 * score.interval.high
        spread = "" if score.spread is None else f" ± {100 * score.spread:.1f}"
        assert row[:2] == [entrant.title, f"{100 * score.value:.1f} [{low:.1f}, {high:.1f}]{spread}"]


def test_scores_are_written_in_three_more_forms(results: list[Path], tmp_path: Path) -> None:
    names = ("report.html", "scores.csv", "tables.md", "tables.tex")
    files = Files(*(tmp_path / "new" / name for name in names))
    assert write_results_page(results, files) == [tmp_path / "new" / name for name in names]
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(names)
    _, table, markdown, latex = files.all
    comparison = Comparison.read(results)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(comparison.results)
    assert {row["dataset"] for row in rows} == set(comparison.tasks)
    score = comparison.score(_entrant(comparison, "second"), "toy_segmentation", "ridge")
    assert score is not None
    shown = f"{100 * score.value:.1f}"
    text = markdown.read_text()
    assert shown in next(line for line in text.split("## ridge")[1].splitlines() if line.startswith("| second |"))
    assert len({line.count(" | ") for line in text.split("## ridge")[1].split("\n\n")[1].splitlines()[2:]}) == 1
    assert r"<noise\>" in text or r"\<noise\>" in text
    written = latex.read_text().split(r"\label{tab:ridge}")[1].split(r"\end{table}")[0]
    assert shown in next(line for line in written.splitlines() if line.startswith("second &"))
    assert len({line.count("&") for line in written.splitlines() if line.endswith(r"\\")}) == 1
    assert not re.search(r"(?<!\\)[%_#$](?!pm)", written.replace("{!}{%", "").replace(r"$\pm$", ""))


def test_failures_flags_and_odd_names_are_shown(tmp_path: Path) -> None:
    name = "<b>$x$ & y"
    records = [
        record("encoder", outcome(40), task=name, n_leaked=3),
        record("band_statistics", outcome(20), task=name),
    ]
    records += [problem("error", "OSError: <gone>"), problem("skipped", "the tile has no bands rgb")]
    out = _write([written(tmp_path / "a", records)], tmp_path / "report.html", latex=tmp_path / "t.tex")
    page = _Page(out.read_text())
    text = _text(page)
    assert page.open == []
    assert "3 of 60 test samples (5 %) have the content of a training sample" in text
    assert "scenes, a, bands rgb (failed): OSError: <gone>" in text
    assert "(skipped)" in text
    assert name in text
    assert r"<b>\$x\$ \& y" in (tmp_path / "t.tex").read_text()


def test_failures_alone_make_a_page(tmp_path: Path) -> None:
    files = {"markdown": tmp_path / "t.md", "latex": tmp_path / "t.tex"}
    records = [problem("error", "OSError: gone"), problem("skipped", "no such bands", task="fields")]
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html", **files).read_text())
    text = _text(page)
    assert page.open == []
    assert "Evaluation of a Frozen features on scenes, fields" in text
    assert "(failed): OSError: gone" in text
    assert "All tasks together" not in text
    assert "How it was measured" not in text
    assert "OSError: gone" in files["markdown"].read_text()
    assert "OSError: gone" in files["latex"].read_text()


def test_who_is_not_compared_is_named_with_the_reason(tmp_path: Path) -> None:
    records = [
        record("encoder", outcome(n), m, task=t) for t in ("scenes", "fields") for m, n in (("a", 40), ("b", 30))
    ]
    records += [record("random_encoder", outcome(10)), record("band_statistics", outcome(20))]
    records.append(record("encoder", outcome(50), "late", size="224"))
    records.append(record("encoder", outcome(60), task="leaky", flags=["leak: chips overlap"]))
    records.append(record("encoder", outcome(55), "moved", content={"train": "x", "test": "z"}))
    out, markdown = tmp_path / "r.html", tmp_path / "t.md"
    page = _Page(_write([written(tmp_path, records)], out, markdown=markdown).read_text())
    text = _text(page)
    assert "In no mean and no rank: leaky (leak: chips overlap)." in text
    assert "Not shown: late by ridge (only with size 224 px)." in text
    assert "scored on other test samples than the rest, and not compared with it: moved" in text
    (start,) = [i for i, row in enumerate(page.rows) if row[:2] == ["features", "scenes, accuracy %"]]
    rows = {row[0]: row[1] for row in page.rows[start + 1 : start + 7]}
    assert rows["late"].strip() == "only with size 224 px"
    assert rows["moved"].startswith("91.7 ")
    assert rows["moved"].endswith("other test samples")
    (start, *_) = [i for i, row in enumerate(page.rows) if row == ["features", "ridge, 2 tasks"]]
    means = [row[1].split("[")[0].strip() for row in page.rows[start + 1 : start + 7]]
    assert means == ["66.7", "50.0", "0 of 2 tasks", "0 of 2 tasks", "1 of 2 tasks", "1 of 2 tasks"]
    table = markdown.read_text()
    assert "| late |" in table
    assert r"In no mean and no rank: leaky (leak: chips overlap)." in table


def test_means_are_named_for_what_they_are(tmp_path: Path) -> None:
    right = {"p": (6, 12), "q": (12, 6), "r": (36, 48), "s": (54, 60)}
    records = [
        record("encoder", outcome(n), m, task=t) for t, of in right.items() for m, n in zip("ab", of, strict=True)
    ]
    ranges, markdown = tmp_path / "normalizer.json", tmp_path / "t.md"
    ranges.write_text(json.dumps({task: [0.0, 0.5] for task in right}))
    folder = written(tmp_path / "a", records)
    for normalizer, scale, mean_name in (((), 1, "plain"), ((ranges,), 2, "normalised")):
        _write([folder], tmp_path / "r.html", normalizer=normalizer, markdown=markdown)
        tables = {t.splitlines()[0]: t.splitlines()[4:6] for t in markdown.read_text().split("## ")[1:]}
        a, b = (scale * 100 * sum(sorted(of)[1:3]) / 2 / 60 for of in zip(*right.values(), strict=True))
        first, second = tables["Interquartile mean over tasks"]
        assert first.startswith(f"| a | {a:.1f} [")
        assert second.startswith(f"| b | **{b:.1f}** [")
        a, b = (scale * 100 * sum(of) / 4 / 60 for of in zip(*right.values(), strict=True))
        assert tables[f"Mean of {mean_name} scores over tasks"] == [f"| a | {a:.1f} |", f"| b | **{b:.1f}** |"]
        assert tables["Mean rank over tasks, 1 is best"] == ["| a | 1.75 of 2 |", "| b | **1.25** of 2 |"]


def test_models_are_set_against_each_other_up_to_a_number_that_can_be_read(tmp_path: Path) -> None:
    files = {"markdown": tmp_path / "t.md"}
    few = [record("encoder", outcome(40 - i), name) for i, name in enumerate("abcdef")]
    page = _Page(_write([written(tmp_path / "few", few)], tmp_path / "r.html", **files).read_text())
    assert "Model against model" in _text(page)
    text = files["markdown"].read_text()
    assert "## Model against model on scenes" in text
    assert len([line for line in text.splitlines() if re.match(r"\| [a-f] over [a-f] \| \+", line)]) == 15
    many = [*few, record("encoder", outcome(20), "g")]
    page = _Page(_write([written(tmp_path / "many", many)], tmp_path / "r.html", **files).read_text())
    assert "Model against model is shown of up to 6 models" in _text(page)
    assert "## Model against model" not in files["markdown"].read_text()


def test_one_task_has_no_mean_over_tasks(tmp_path: Path) -> None:
    files = {"markdown": tmp_path / "t.md", "latex": tmp_path / "t.tex"}
    records = [record("encoder", outcome(40)), record("encoder", outcome(30), "b")]
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html", **files).read_text())
    assert "No means over tasks: they need tasks of two datasets that count in them." in _text(page)
    assert [line for line in files["markdown"].read_text().splitlines() if line.startswith("## ")] == [
        "## ridge",
        "## Model against model on scenes",
    ]
    assert files["latex"].read_text().count(r"\begin{table}") == 2


def test_tasks_of_one_dataset_are_named_and_counted(tmp_path: Path) -> None:
    of = {"optical": "places", "radar": "places", "other": None}
    records = [record("encoder", outcome(30), task=t, **({"dataset": d} if d else {})) for t, d in of.items()]
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text())
    assert "Tasks of places count as one: optical, radar." in _text(page)
    assert ["features", "ridge, 3 tasks of 2 datasets"] in page.rows
    one = [r for r in records if "dataset" in r]
    page = _Page(_write([written(tmp_path / "one", one)], tmp_path / "r.html").read_text())
    assert "No means over tasks: they need tasks of two datasets that count in them." in _text(page)


def test_classes_are_of_all_seeds_by_a_probe_that_no_test_score_chose(tmp_path: Path) -> None:
    records = [record("encoder", outcome(55 + i), probe="knn", seed=i) for i in (0, 1)]
    records += [record("encoder", outcome(20 + 20 * i), seed=i) for i in (0, 1)]
    html = _write([written(tmp_path, records)], tmp_path / "r.html").read_text()
    page = _Page(html)
    assert "Classes: a, ridge, mean of 2 seeds" in _text(page)
    assert "a, knn" not in html
    (start,) = [i for i, row in enumerate(page.rows) if row[0] == "class"]
    assert page.rows[start][:3] == ["class", "support", "recall %"]
    recalls = [[r["per_class"]["recall"][k] for r in records[2:]] for k in range(3)]
    supports = records[2]["per_class"]["support"]
    expected = [[str(n), f"{100 * sum(of) / 2:.1f}"] for n, of in zip(supports, recalls, strict=True)]
    assert [row[1:3] for row in page.rows[start + 1 : start + 4]] == expected
    # The confusion is of both seeds too. Who is wrong is taken for the next class: two cells in each row.
    matrix = html.split('aria-label="a, ridge"')[1].split("</svg>")[0]
    shares = [int(text) for text in re.findall(r">(\d+)</text>", matrix)]
    assert [shares[i] for i in (0, 2, 5)] == pytest.approx([50 * sum(of) for of in recalls], abs=0.51)


def test_a_class_that_a_seed_leaves_undefined_has_the_mean_of_the_others(tmp_path: Path) -> None:
    records = [record("encoder", outcome(30), seed=i) for i in (0, 1)]
    records[0]["per_class"] = {**records[0]["per_class"], "precision": [None, None, 0.5]}
    records[1]["per_class"] = {**records[1]["per_class"], "precision": [None, 0.25, 1.0]}
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text())
    (start,) = [i for i, row in enumerate(page.rows) if row[0] == "class"]
    at = page.rows[start].index("precision %")
    assert [row[at] for row in page.rows[start + 1 : start + 4]] == ["", "25.0", "75.0"]


def test_published_and_nested_parts_are_drawn_apart(tmp_path: Path) -> None:
    parts = {"0.014x": ("nested", 9), "0.10x": ("published", 20), "nested_0.10x": ("nested", 18), "1.00x": ("all", 40)}
    records = [
        record("encoder", outcome(n), partition=part, partition_of=origin, n_train=int(1000 * float(part[-5:-1])))
        for part, (origin, n) in parts.items()
    ]
    html = _write([written(tmp_path, records)], tmp_path / "r.html").read_text()
    curves = re.findall(r'aria-label="(ridge, accuracy %, [^"]*)"', html)
    assert curves == ["ridge, accuracy %, published parts", "ridge, accuracy %, nested parts"]
    assert ["features", "0.014x, nested", "0.10x, published", "nested_0.10x", "1.00x"] in _Page(html).rows
    alone = [r for r in records if r["partition_of"] != "published"]
    html = _write([written(tmp_path / "alone", alone)], tmp_path / "r.html").read_text()
    assert "ridge, accuracy %, nested parts" not in html  # of one draw alone, which needs no name
    assert ["features", "0.014x", "nested_0.10x", "1.00x"] in _Page(html).rows


def test_several_versions_of_the_code_are_named(tmp_path: Path) -> None:
    records = [record("encoder", outcome(40), code="c0de"), record("encoder", outcome(30), "b", version="0.2.0")]
    text = _text(_Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text()))
    assert "Results are of 2 versions of the code (0.1.0 c0de, 0.2.0)." in text


def test_long_names_leave_room_for_what_is_drawn(tmp_path: Path) -> None:
    name = "an_encoder_with_a_very_long_name_of_which_only_the_end_differs_1"
    out = _write([written(tmp_path, [record("encoder", outcome(40), name)])], tmp_path / "r.html")
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", out.read_text())
    assert "an_encoder_w…end_differs_1" in " ".join(drawn)
    assert name not in drawn


def test_rows_say_how_a_model_is_read_where_models_differ(tmp_path: Path) -> None:
    records = [record("encoder", outcome(40)), record("encoder", outcome(30), "b", tap="depth_0.50", pool="cls")]
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text())
    titles = {row[0] for row in page.rows}
    assert {"a read at the last block, mean", "b read at depth 0.50, cls"} <= titles
    assert "Where features are read" not in _text(page)  # nobody was read in several places
    records.append(record("encoder", outcome(20), tap="depth_0.50"))
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text())
    assert "Where features are read" in _text(page)


def test_ranges_bring_every_task_onto_one_scale(results: list[Path], tmp_path: Path) -> None:
    ranges = tmp_path / "normalizer.json"
    ranges.write_text(json.dumps({f"toy_{kind}": [0.0, 2.0] for kind in tasks.KINDS}))
    out = tmp_path / "report.html"
    assert main(["report", *map(str, results), "--out", str(out), "--normalizer", str(ranges)]) == 0
    page = _Page(out.read_text())
    assert "scaled from its range in normalizer.json: 0 is its low end" in _text(page)
    comparison = Comparison.read(results)
    values = sorted(
        value / 2 if kind != "regression" else 1 - value / 2
        for kind in tasks.KINDS
        if (score := comparison.score(comparison.entrants[0], f"toy_{kind}", "ridge")) is not None
        for value in score.values
    )
    (row,) = [row for row in page.rows if row[0] == "first"][:1]
    header = next(row for row in page.rows if row[0] == "features")
    at = header.index("ridge, 4 tasks")
    assert row[at].split()[0] == f"{25 * sum(values[2:6]):.1f}"  # the middle half of 4 tasks and 2 seeds


def test_sizes_are_compared(tmp_path: Path) -> None:
    records = [record("encoder", outcome(n), size=size) for size, n in (("native", 30), ("224", 45))]
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text())
    assert "Sizes" in _text(page)
    (start,) = [i for i, row in enumerate(page.rows) if row == ["features", "own size", "224 px"]]
    assert [cell.split()[0] for cell in page.rows[start + 1][1:]] == ["50.0", "75.0"]


def test_old_records_without_resamples_have_scores_alone(tmp_path: Path) -> None:
    bare = [record(f, outcome(n)) for f, n in (("encoder", 40), ("band_statistics", 20))]
    for found in bare:
        del found["resampled"], found["gflop"]
    page = _Page(_write([written(tmp_path, bare)], tmp_path / "r.html").read_text())
    assert ["a", "66.7"] in page.rows
    assert ["a over the best control", "+33.3 band statistics"] in page.rows


def test_runs_add_their_curves(results: list[Path], tmp_path: Path) -> None:
    head = {
        "task": "scenes",
        "features": "encoder",
        "kind": "probe",
        "tap": "last",
        "probe": "knn",
        "metric": "accuracy",
    }
    run, *alike = tmp_path / "my-run", tmp_path / "one" / "alike", tmp_path / "two" / "alike"
    for folder in (run, *alike):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("objective: {name: mae}\n")
        lines = (json.dumps({**head, "step": s, "accuracy": s / 99}) + "\n" for s in (0, 9))
        (folder / "eval.jsonl").write_text("".join(lines))
    out = tmp_path / "report.html"
    assert main(["report", str(results[0]), str(run), "--out", str(out)]) == 0
    assert "While training" in out.read_text()
    assert "my-run" in out.read_text()
    assert not (run / "report.html").exists()
    assert main(["report", str(results[0]), *map(str, [*alike, alike[0]]), "--out", str(out)]) == 0
    assert [out.read_text().count(f">{name}</text>") for name in ("one/alike", "two/alike")] == [1, 1]


def test_the_command_tells_folders_apart(
    results: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(results[0], tmp_path / "results")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("objective: {name: mae}\n")
    assert main(["report", str(folder), str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n{folder / 'results.html'}\n"
    assert main(["report", str(folder / RESULTS)]) == 0  # the file that holds the results stands for its folder
    assert capsys.readouterr().out == f"{folder / 'results.html'}\n"
    named = {name: tmp_path / "new" / f"file.{name}" for name in ("html", "csv", "markdown", "latex")}
    options = [f"--{'out' if name == 'html' else name}={path}" for name, path in named.items()]
    assert main(["report", str(folder), *options]) == 0
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in named.values())
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in named.values()}
    for arguments, message in (
        ([str(tmp_path)], "it is not a run directory"),
        ([str(folder), str(tmp_path / "rnu"), "--out", "x.html"], "rnu has no results.jsonl"),
        ([str(run), "--latex", "x.tex"], "--latex is for results of ssl-eo eval"),
        ([str(run), str(run), "--out", "x.html"], f"ssl-eo eval --model {run} --tasks ... --out scores for each of"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no results\.jsonl"):
        _write([tmp_path], tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"nothing was measured, there is nothing to report$"):
        _write([written(tmp_path, [])], tmp_path / "r.html")
    newer = {**record("encoder", outcome(30)), "metric": "beauty"}
    with pytest.raises(ValueError, match=r"none of 2 lines is a result that ssl_eo \S+ knows: .* another version"):
        _write([written(tmp_path, [newer, newer])], tmp_path / "r.html")


# --- what is missing --------------------------------------------------------------------------------------------------


def _top(path: Path) -> str:
    """What stands above the first heading."""
    return _text(_Page(path.read_text().split("<h2>")[0] + "</body></html>"))


def _planned(task: str, probes: list[str], taps: list[str]) -> dict[str, Any]:
    """What an evaluation writes down before it begins, of one model."""
    job = record("encoder", outcome(9), task=task)["job"]
    head = {"job": job, "task": task, "features": "encoder", "model": "a", "subset": "all", "size": "native"}
    return {**head, "places": [{"tap": t} for t in taps], "probes": probes, "partitions": ["1.00x"], "seeds": [0]}


def test_an_interrupted_evaluation_says_how_much_of_it_is_there(tmp_path: Path) -> None:
    records = [record("encoder", outcome(40), task="p", tap=tap) for tap in ("last", "all")]
    records += [record("encoder", outcome(40), task="q")]
    files = {"markdown": tmp_path / "t.md", "latex": tmp_path / "t.tex"}
    folder = written(tmp_path / "a", records)
    assert "asked" not in _write([folder], tmp_path / "r.html", **files).read_text()  # nobody said what was wanted
    add_to_plan(folder, [_planned("p", ["ridge"], ["last", "all"]), _planned("q", ["ridge", "knn"], ["last", "all"])])
    said = "3 of 6 asked results are there: not yet measured are results of q (3). The same command goes on."
    assert said in _top(_write([folder], tmp_path / "r.html", **files))
    assert said in files["markdown"].read_text()
    assert said in files["latex"].read_text()
    rest = [record("encoder", outcome(9), task="q", tap=t, probe=p) for t in ("last", "all") for p in ("knn", "ridge")]
    other = written(tmp_path / "b", rest)  # of another machine
    assert "asked" not in _write([folder, other], tmp_path / "r.html").read_text()


def test_what_failed_and_what_was_skipped_is_not_yet_to_come(tmp_path: Path) -> None:
    records = [record("encoder", outcome(40), task="p")]
    failed, skipped = (_planned(task, ["ridge"], ["last"]) for task in ("q", "r"))
    records += [problem("error", "OSError: gone", task="q", job=failed["job"], key="1")]
    records += [problem("skipped", "no such bands", task="r", job=skipped["job"], key="2")]
    folder = written(tmp_path, records)
    add_to_plan(folder, [_planned("p", ["ridge"], ["last"]), failed, skipped])
    assert "1 of 2 asked results are there, the others failed." in _top(_write([folder], tmp_path / "r.html"))


def test_what_fails_alike_for_several_jobs_is_not_yet_to_come_for_any(tmp_path: Path) -> None:
    failed, skipped = ({**_planned(task, ["ridge"], ["last"]), "features": "bands", "model": None} for task in "qr")
    records, planned = [record("encoder", outcome(40), task="p")], [_planned("p", ["ridge"], ["last"])]
    for cell in ("8", "16"):  # of controls beside encoders of other patches
        planned += [{**job, "job": f"{job['task']} {cell}"} for job in (failed, skipped)]
        head = {"features": "bands", "model": None}
        records += [problem("error", "OSError: gone", task="q", job=f"q {cell}", key=f"q {cell}", **head)]
        records += [problem("skipped", "no such bands", task="r", job=f"r {cell}", key=f"r {cell}", **head)]
    folder = written(tmp_path, records)
    add_to_plan(folder, planned)
    page = _write([folder], tmp_path / "r.html")
    assert "1 of 3 asked results are there, the others failed." in _top(page)
    assert "failed 1 skipped 1" in _top(page)


def test_a_task_that_failed_as_a_whole_is_not_yet_to_come_for_anyone(tmp_path: Path) -> None:
    error = problem("error", "OSError: gone", task="q", job="of the encoder", key="1", of_task=True)
    folder = written(tmp_path, [record("encoder", outcome(40), task="p"), error])
    planned = [{**_planned("q", ["ridge"], ["last"]), "job": f"of {features}"} for features in ("the encoder", "bands")]
    add_to_plan(folder, [_planned("p", ["ridge"], ["last"]), *planned])
    out = _write([folder], tmp_path / "r.html")
    assert "1 of 3 asked results are there, the others failed." in _top(out)
    assert "q, all features, bands rgb (failed): OSError: gone" in _text(_Page(out.read_text()))


def test_tasks_that_failed_are_named_at_the_top_and_in_one_line(tmp_path: Path) -> None:
    records = [record("encoder", outcome(40))]
    names = [f"broken{i}" for i in range(5)]
    for name in names:
        for features in ("encoder", "random_encoder", "band_statistics"):
            job = f"{name} {features}"
            records.append(problem("error", f"OSError: no {name}", task=name, features=features, job=job, key=job))
    records.append(problem("error", "ValueError: odd", job="odd", key="odd"))
    files = {"markdown": tmp_path / "t.md", "latex": tmp_path / "t.tex"}
    out = _write([written(tmp_path / "a", records)], tmp_path / "r.html", **files)
    top, text = _top(out), _text(_Page(out.read_text()))
    for name in names[:3]:
        assert f"{name} is in no mean: could not be measured (OSError: no {name})." in top
    assert "Neither are broken3, broken4; the reasons are below." in top
    assert "Of scenes some could not be measured; what and why stands below." in top
    assert "broken0, a, random encoder, band statistics, bands rgb (failed): OSError: no broken0" in text
    for path in files.values():
        lines = [line for line in path.read_text().splitlines() if "broken0" in line]
        assert len(lines) == 1
        assert lines[0][2:] == "broken0: could not be measured: OSError: no broken0"
        assert "scenes: some of it could not be measured: ValueError: odd" in path.read_text()


def test_a_model_at_mixed_depths_says_so_and_is_never_bold(tmp_path: Path) -> None:
    depths = (("p", "all", 50), ("q", "depth_0.50", 50))
    records = [record("encoder", outcome(n), task=task, tap=tap) for task, tap, n in depths]
    records += [record("band_statistics", outcome(20), task=task) for task in "pq"]
    markdown = tmp_path / "t.md"
    page = _Page(_write([written(tmp_path, records)], tmp_path / "r.html", markdown=markdown).read_text())
    said = "read at all depths together, mean; read at depth 0.50, mean on q"
    assert f"a {said}" in {row[0] for row in page.rows}
    assert f"| a ({said}) | 83.3 [" in markdown.read_text()
    assert "**" not in markdown.read_text()
    alike = [{**r, "tap": "last"} if r["model"] else r for r in records]
    _write([written(tmp_path / "b", alike)], tmp_path / "r.html", markdown=markdown)
    assert "| a | **83.3** [" in markdown.read_text()


def test_what_has_no_rival_is_not_the_best(tmp_path: Path) -> None:
    markdown = tmp_path / "t.md"
    _write([written(tmp_path, [record("encoder", outcome(40))])], tmp_path / "r.html", markdown=markdown)
    assert "| a | 66.7 [" in markdown.read_text()


def test_a_probe_without_any_number_has_no_table(tmp_path: Path) -> None:
    records = [record("encoder", outcome(40), task=task) for task in "pq"]
    records += [record("band_statistics", outcome(20), task="p")]
    # By logistic there is nothing under the conditions that are compared.
    records += [record("encoder", outcome(9), task="p", probe="logistic", partition="0.10x")]
    out, markdown = tmp_path / "r.html", tmp_path / "t.md"
    page = _Page(_write([written(tmp_path, records)], out, markdown=markdown).read_text())
    headings = [line for line in markdown.read_text().splitlines() if line.startswith("## ")]
    assert headings[-2:] == ["## ridge", "## Margins on p"]
    assert "<h3>logistic</h3>" not in out.read_text()
    assert all(any(cell.strip() for cell in row[1:]) for row in page.rows if len(row) > 1)


# --- what it takes to cite --------------------------------------------------------------------------------------------


def test_the_page_says_what_it_takes_to_cite_it(tmp_path: Path) -> None:
    shape = {"size": "tiny", "embed_dim": 64, "depth": 4, "patch_size": 8}
    source = {"name": "eurosat", "options": {"split": "train"}}
    own = {"name": "hdf5", "options": {}}
    common = {"encoder": shape, "commit": "c0ffee", "n_val": 11, "pool": "cls", "bands": ["R", "G"], "tile": "camera"}
    records = [
        record("encoder", outcome(40), task="eurosat_ms", sources={"train": source, "test": source}, **common),
        record("encoder", outcome(30), task="mine", sources={"train": own}, date="2026-03-04T00:00:00+00:00", **common),
    ]
    text = _text(_Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text()))
    for said in (
        "Frozen features on eurosat_ms, mine; measured 2026-01-01 to 2026-03-04",
        "classification of 3 classes, accuracy %, 90 training, 11 validation and 60 test samples",
        "ViT, 64 wide x 4 blocks, patches of 8 px, weights 11aa, step 30",
        "ssl-eo eval --model a=PATH --tasks eurosat_ms mine.yaml --protocol ridge --partitions 1.00x --bands all"
        " --size native --seeds 0 --taps 1 --pool cls --resamples 100 --out scores",
        'dataset EuroSAT. Helber et al. 2019, "EuroSAT", IEEE JSTARS 12(7)',
        "licence: MIT; Copernicus Sentinel data terms samples",
        "dataset no reference known; read by the source hdf5",
        "training 90 (labels 1.00x), validation 11, test 60",
        "shown camera, 2 bands: R, G",
        "commit c0ffee",
    ):
        assert said in text
    assert "ViT-tiny" not in text


def test_the_command_that_is_cited_can_be_read(tmp_path: Path) -> None:
    taps = ["depth_0.25", "last", "all"]
    every = [(tap, subset) for tap in taps for subset in ("all", "rgb")]
    records = [record("encoder", outcome(40), "a b", tap=t, subset=s, size="native") for t, s in every]
    text = _text(_Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text()))
    command = re.search(r"measured again by (ssl-eo eval .*?--out scores)", text)
    assert command is not None
    arguments = _parser().parse_args(shlex.split(command[1])[1:])
    assert (arguments.model, arguments.tasks, arguments.bands) == ("a b=PATH", ["scenes.yaml"], ["all", "rgb"])
    assert (arguments.taps, arguments.size, arguments.pool) == (["0.25", "1"], ["native"], "mean")


def test_what_one_command_cannot_measure_is_cited_by_several() -> None:
    records = [record("encoder", outcome(40), pool=pool, precision="float32") for pool in ("cls", "mean")]
    records += [record("encoder", outcome(40), task="t", pool="mean", precision="bfloat16")]
    records += [record("encoder", outcome(40), task="maps", pool=None, precision="float32")]
    (facts,) = facts_of_models(Comparison(records))
    commands = [how for what, how in facts.pairs if what == "measured again by"]
    read = [_parser().parse_args(shlex.split(command)[1:]) for command in commands]
    assert [(a.tasks, a.pool, a.precision) for a in read] == [
        (["scenes.yaml", "maps.yaml"], "cls", "float32"),
        (["scenes.yaml"], "mean", "float32"),
        (["t.yaml"], "mean", "bfloat16"),
    ]


def test_members_of_a_collection_have_its_reference_and_their_own_licence() -> None:
    members = {"m-eurosat": "GeoBench v1, m-eurosat. Lacoste et al. 2023", "m-pv4ger": "GeoBench v1, m-pv4ger. Lacoste"}
    for member, begins in members.items():
        source = {"name": "geobench", "options": {"dataset": member}}
        comparison = Comparison([record("encoder", outcome(9), sources={"train": source})])
        (facts,) = facts_of_tasks(comparison)
        assert dict(facts.pairs)["dataset"].startswith(begins)
        assert ("licence: MIT" in dict(facts.pairs)["dataset"]) == (member == "m-eurosat")


def test_a_size_that_a_config_did_not_change_is_told_in_numbers() -> None:
    assert encoder_text({"size": "base", "patch_size": 16}) == "ViT, 768 wide x 12 blocks, patches of 16 px"


def test_a_caption_of_latex_says_all_that_the_table_needs(tmp_path: Path) -> None:
    latex = tmp_path / "t.tex"
    records = [record("encoder", outcome(40), size="native"), record("band_statistics", outcome(20), size="native")]
    _write([written(tmp_path, records)], tmp_path / "r.html", latex=latex)
    text = latex.read_text()
    caption = (
        r"Frozen features scored by ridge: accuracy \%; labels 1.00x, bands all, own size, encoders read at the last"
        r" block, pooled by mean. In brackets: 95 \% of a bootstrap over test samples; after $\pm$: one standard"
        r" deviation over seeds. Bold: the best of a column."
    )
    assert rf"\caption{{{caption}}}" in text
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert labels == ["tab:ridge", "tab:margins-on-scenes"]


def test_a_caption_of_means_names_the_tasks_that_they_are_of(tmp_path: Path) -> None:
    targets = torch.linspace(0, 1, N_TEST)
    records = [record("encoder", outcome(40), task=task) for task in ("p", "q")]
    records += [record("encoder", Regressed(targets + 0.1, targets), task="heights")]  # no ratio: ranked alone
    latex = tmp_path / "t.tex"
    _write([written(tmp_path, records)], tmp_path / "r.html", latex=latex)
    captions = [line for line in latex.read_text().splitlines() if line.startswith(r"\caption{")]
    mean, plain, rank, *_ = captions
    assert "Interquartile mean over tasks, by probes on frozen features of p, q; labels" in mean
    assert "Student's t" in mean
    assert "frozen features of p, q; labels" in plain
    assert "In brackets" not in plain
    assert "frozen features of p, q, heights; labels" in rank


def test_notes_speak_of_means_where_a_probe_has_one(tmp_path: Path) -> None:
    records = [record("encoder", outcome(40), task=task, probe=probe) for task, probe in (("p", "knn"), ("q", "ridge"))]
    text = _text(_Page(_write([written(tmp_path, records)], tmp_path / "r.html").read_text()))
    assert "No means over tasks: they need tasks of two datasets that count in them." in text
    assert "The interquartile mean leaves out" not in text


def test_words_of_the_page_are_plain(results: list[Path], tmp_path: Path) -> None:
    text = _text(_Page(_write(results, tmp_path / "report.html").read_text()))
    assert "read at all," not in text
    every = [record("encoder", outcome(n), tap=tap) for tap, n in (("all", 30), ("last", 20), ("depth_0.25", 10))]
    page = _Page(_write([written(tmp_path, every)], tmp_path / "r.html").read_text())
    assert ["features", "depth 0.25", "the last block", "all depths together"] in page.rows
    assert "encoders read at all depths together" in _text(page)


# --- in a browser -----------------------------------------------------------------------------------------------------

# Draws nothing and loads nothing: it asks the browser what it has drawn and loaded, and writes it into the page.
_ASK = """<script>
const drawn = [...document.querySelectorAll("svg")].map(svg => {
  const shapes = [...svg.querySelectorAll("path, use")].filter(shape => {
    const box = shape.getBBox();
    return box.width + box.height > 0;
  });
  const frame = svg.getBoundingClientRect();
  return {label: svg.getAttribute("aria-label"), shapes: shapes.length, width: frame.width, height: frame.height};
});
const colors = [...document.querySelectorAll("svg path, svg text")].map(e => e.getAttribute("style") || "");
const root = document.documentElement;
const found = {drawn, loaded: performance.getEntriesByType("resource").map(e => e.name),
  overflow: root.scrollWidth - root.clientWidth,
  unresolved: [...new Set(colors.flatMap(s => [...s.matchAll(/var\\((--[\\w-]+)\\)/g)].map(m => m[1])))]
    .filter(name => getComputedStyle(root).getPropertyValue(name).trim() === "")};
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script></body>"""


def _browse(chromium: str, page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no chromium: apt-get install --no-install-recommends chromium")
    return found


@pytest.mark.browser
@pytest.mark.parametrize("width_px", [1200, 600])
def test_a_browser_draws_every_chart_and_complains_of_nothing(
    chromium: str, results: list[Path], tmp_path: Path, width_px: int
) -> None:
    out = _write(results, tmp_path / "report.html")
    asking = tmp_path / "asking.html"
    html = out.read_text()
    asking.write_text(html.replace("</body>", _ASK))
    done = _browse(chromium, asking, tmp_path / "profile", f"--window-size={width_px},1000", "--dump-dom")
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    found = json.loads(unescape(done.stdout.split('<pre id="found">')[1].split("</pre>")[0]))
    assert len(found["drawn"]) == html.count("<svg")
    assert len(found["drawn"]) == 18  # costs 2, bars 6, curves 6, confusions 4
    for chart in found["drawn"]:
        assert chart["shapes"] > 3, chart
        assert chart["width"] > 100, chart
        assert chart["height"] > 50, chart
    assert found["loaded"] == []
    assert found["unresolved"] == []
    assert found["overflow"] <= 0  # tables scroll by themselves, the page does not


@pytest.mark.browser
def test_long_names_stay_on_a_narrow_page(chromium: str, tmp_path: Path) -> None:
    names = [f"an_encoder_with_a_really_very_long_name_of_weights_of_step_{n}" for n in (100, 200)]
    changes = {"classes": ["a class with a name that is long", "another", "third"], "flags": ["x" * 90]}
    for number, name in enumerate(names):
        changes["task"] = f"my/own/folder/with_a_very_long_name_of_a_task_{number}"
        written(
            tmp_path / name, [record("encoder", outcome(40), name, partition=p, **changes) for p in ("0.10x", "1.00x")]
        )
    out = _write([tmp_path / name for name in names], tmp_path / "report.html")
    asking = tmp_path / "asking.html"
    asking.write_text(out.read_text().replace("</body>", _ASK))
    done = _browse(chromium, asking, tmp_path / "profile", "--window-size=500,1000", "--dump-dom")
    found = json.loads(unescape(done.stdout.split('<pre id="found">')[1].split("</pre>")[0]))
    assert found["overflow"] <= 0


@pytest.mark.browser
def test_a_browser_that_complains_is_heard(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!DOCTYPE html><script>undefined.x</script>")
    done = _browse(chromium, page, tmp_path / "profile", "--dump-dom")
    assert any(":CONSOLE" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"out": "results.jsonl"}, "is to be a page, so its name ends in .html or .htm"),
        ({"out": "page.html", "markdown": "results.jsonl"}, "holds what was measured, and is not replaced"),
        ({"out": "page.html", "csv": "plan.jsonl"}, "holds what was measured, and is not replaced"),
        ({"out": "page.html", "markdown": "page.html"}, "each is to be a file of its own"),
        ({"out": "page.html", "latex": "results.csv"}, "is the table of ssl-eo eval in its folder"),
        ({"out": "page.html", "csv": "../scores/results.csv"}, "is the table of ssl-eo eval in its folder"),
        ({"out": "page.htm", "csv": "page.htm"}, "each is to be a file of its own"),
        ({"out": "page.md"}, "is to be a page, so its name ends in .html or .htm"),
    ],
)
def test_what_was_measured_is_not_replaced(files: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "scores", [record("encoder", outcome(50))])
    (folder / "results.csv").write_text("of ssl-eo eval")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        _write([folder], **{name: folder / file for name, file in files.items()})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_that_nobody_named_stay_as_they_are(tmp_path: Path) -> None:
    folder = written(tmp_path / "scores", [record("encoder", outcome(50))])
    for name in ("page.csv", "page-scores.csv", "page.md"):
        (tmp_path / name).write_text("my own")
    assert write_results_page([folder], Files(tmp_path / "page.html")) == [tmp_path / "page.html"]
    assert {(tmp_path / name).read_text() for name in ("page.csv", "page-scores.csv", "page.md")} == {"my own"}
