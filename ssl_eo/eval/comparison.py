"""Results of several models on several tasks side by side: what is compared with what.

Part of the training set, bands and size are conditions: one for all on a task. Where features are read, and how tokens
are pooled, is how a model is used: each has its own. Nothing is left out in silence: `absence`, `flags` and `left_out`
say what a table lacks and why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_eo.eval.bootstrap import FEW_GROUPS, FEWEST_GROUPS, Interval
from ssl_eo.eval.entrants import Entrant, entrants_of, identity_of, is_encoder, shape_of
from ssl_eo.eval.experiments import AXES, CONDITIONS, Score, Setting, newest_whole, paired_interval, split_digest
from ssl_eo.eval.leaks import LEAK
from ssl_eo.eval.partitions import parse_partition
from ssl_eo.eval.records import QUESTION, RESULTS, Record, read_results
from ssl_eo.eval.summary import Margin, best_of, tap_rank

__all__ = ["WORDS_OF_CONDITIONS", "Comparison", "PairedMargin"]

WORDS_OF_CONDITIONS = {"partition": "labels", "subset": "bands", "size": "size"}
_Place = tuple[str, str, str]  # identity of the entrant, task, probe
_Conditions = tuple[str, str, str]  # values of `CONDITIONS`


@dataclass(frozen=True)
class PairedMargin:
    """How much better a model is than a rival that needs no training, in the metric's own unit; above 0 is better."""

    model: Entrant
    rival: Entrant
    margin: Margin
    interval: Interval | None  # of the gain over the test samples, the same resamples for both
    reading: str  # of the rival, where there is another, as of an encoder where the model is read otherwise


class Comparison:
    """All results of some evaluations."""

    def __init__(self, records: Iterable[Record]) -> None:
        """Raises `ValueError` where a task is ranked by several metrics."""
        every = list(records)
        self.results = [r for r in every if r["kind"] == "result"]
        self.problems = _distinct(_unanswered(every))
        self._of: dict[str, list[Record]] = {}
        for r in self.results:
            self._of.setdefault(str(r["task"]), []).append(r)
        self.tasks = list(self._of)
        self.probes = list(dict.fromkeys(str(r["probe"]) for r in self.results))
        self.metrics = {task: _metric_of(task, of) for task, of in self._of.items()}
        self.entrants = entrants_of(self.results)
        self.left_out = {task: why for task, of in self._of.items() if (why := _leak(of))}
        self._shapes = {identity_of(r): shape_of(r) for r in self.results if r["features"] == "encoder"}
        self._steps = {(task, axis): _steps(of, axis) for task, of in self._of.items() for axis in AXES}
        self._conditions = {task: _commonest_conditions(of) for task, of in self._of.items()}
        self._scores = _scores(self.results)
        self._readings = {place: self._reading_of(place[1], of) for place, of in self._scores.items()}
        self._examples = {task: self._find_example(task) for task in self.tasks}

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Comparison:
        """Of the results in all `folders`. Raises `ValueError` where one has none."""
        for folder in folders:
            if not (folder / RESULTS).is_file():
                raise ValueError(f"{folder} has no {RESULTS}: it is not a folder that ssl-eo eval wrote to")
        return cls([r for folder in folders for r in read_results(folder)])

    @property
    def models(self) -> list[Entrant]:
        return [e for e in self.entrants if e.kind == "model"]

    def steps(self, task: str, axis: str) -> list[str]:
        """Values that an axis has in the results of a task; parts of the training set by size."""
        return self._steps[task, axis]

    def condition(self, task: str, axis: str) -> str:
        """Where entrants are compared: what most of them have; of equals most labels, all bands, the task's size."""
        return self._conditions[task][CONDITIONS.index(axis)]

    def score(self, entrant: Entrant, task: str, probe: str, **fixed: str) -> Score | None:
        """Under the conditions of the task, read as the entrant is, but for the axes that are `fixed`.

        None where that was not measured, see `absence`.
        """
        place = (entrant.identity, task, probe)
        if place not in self._scores:
            return None
        usual = Setting(*self._conditions[task], *self._readings[place])
        return self._scores[place].get(usual._replace(**fixed))

    def reading(self, entrant: Entrant, tasks: Sequence[str], probes: Sequence[str]) -> str:
        """How an entrant is read on `tasks` by `probes`; empty where encoders are read alike, controls in one way."""
        if entrant.kind == "control":
            differs = any(self._n_readings(entrant, task, probe) > 1 for task in tasks for probe in probes)
        else:
            differs = self.readings_differ(tasks, probes)
        if not differs:
            return ""
        own = (self._reads(entrant, task, probe) for task in tasks for probe in probes)
        return "; ".join(dict.fromkeys(_reading_text(reads) for reads in own if reads is not None))

    def readings_differ(self, tasks: Sequence[str], probes: Sequence[str]) -> bool:
        """Whether encoders are read in different ways on one of `tasks` by one of `probes`."""
        encoders = [e for e in self.entrants if e.kind != "control"]
        return any(
            len({self._reads(e, task, probe) for e in encoders} - {None}) > 1 for task in tasks for probe in probes
        )

    def absence(self, entrant: Entrant, task: str, probe: str) -> str:
        """What there is instead of a score under the conditions of the task."""
        settings = self._scores.get((entrant.identity, task, probe))
        if settings is None:
            return "not measured"
        usual = Setting(*self._conditions[task], "", "")
        differing = [axis for axis in CONDITIONS if all(getattr(s, axis) != getattr(usual, axis) for s in settings)]
        own = {axis: dict.fromkeys(getattr(s, axis) for s in settings) for axis in differing or CONDITIONS}
        return "only with " + ", ".join(f"{WORDS_OF_CONDITIONS[axis]} {' or '.join(of)}" for axis, of in own.items())

    def example(self, task: str) -> Score:
        """A score of the test samples that most scores of the task are of."""
        return self._examples[task]

    def is_compared(self, task: str, score: Score) -> bool:
        """Whether it is of the test samples that most scores of the task are of."""
        return score.is_on_the_samples_of(self.example(task))

    def shown(self, task: str) -> list[tuple[Entrant, str, Score]]:
        """Entrants, probes and scores under the conditions of a task."""
        found = ((e, p, self.score(e, task, p)) for p in self.probes for e in self.entrants)
        return [(entrant, probe, score) for entrant, probe, score in found if score is not None]

    def margins(self, task: str, probe: str) -> list[PairedMargin]:
        """Each model against the random encoder of its shape and against the best control, on the same test samples.

        How a model is read is fixed beforehand, and what is best of a rival is chosen by the score that is compared: so
        no choice flatters the model.
        """
        found = []
        for model in self.models:
            own = self.score(model, task, probe)
            if own is not None:
                for rival, score in self._rivals(model, own, task, probe):
                    margin = Margin(probe, self.metrics[task], own.value, rival.title, score.value)
                    if rival.kind == "control":
                        is_plain = self._n_readings(rival, task, probe) == 1
                    else:
                        is_plain = score.setting[3:] == own.setting[3:]
                    reading = "" if is_plain else _reading_text(score.setting[3:])
                    found.append(PairedMargin(model, rival, margin, paired_interval(own, score), reading))
        return found

    def flags(self, task: str) -> list[str]:
        """Known defects of a task, and those that were found in its results."""
        found = [flag for r in self._of[task] for flag in r["flags"]]
        if n_leaked := _n_leaked(self._of[task]):
            found.append(f"{n_leaked} test samples have the content of a training sample")
        scores = self.shown(task)
        if apart := dict.fromkeys(e.title for e, _, score in scores if not self.is_compared(task, score)):
            found.append(f"scored on other test samples than the rest, and not compared with it: {', '.join(apart)}")
        n_fitted_on = len({split_digest(score.records[0], "train") for _, _, score in scores})
        if n_fitted_on > 1:
            found.append(f"the probes were fitted on {n_fitted_on} different sets of training samples")
        n_groups = min((score.n_groups for _, _, score in scores), default=FEW_GROUPS)
        if n_groups < FEWEST_GROUPS:
            found.append(f"no intervals: test samples are of {n_groups} places, fewer than {FEWEST_GROUPS}")
        elif n_groups < FEW_GROUPS:
            found.append(f"intervals are too narrow: test samples are of {n_groups} places, fewer than {FEW_GROUPS}")
        return list(dict.fromkeys([*found, *_flags_of_experiments(scores)]))

    def _n_readings(self, entrant: Entrant, task: str, probe: str) -> int:
        return len({setting[3:] for setting in self._scores.get((entrant.identity, task, probe), {})})

    def _reads(self, entrant: Entrant, task: str, probe: str) -> tuple[str, str] | None:
        return None if (score := self.score(entrant, task, probe)) is None else score.setting[3:]

    def _reading_of(self, task: str, settings: Collection[Setting]) -> tuple[str, str]:
        """Tap and pool of an entrant: all taps, else the last, else the deepest; of several pools the task's first."""
        pools = self.steps(task, "pool")
        at_conditions = [s for s in settings if s[:3] == self._conditions[task]]
        chosen = max(
            at_conditions or settings, key=lambda s: (tap_rank(s.tap), -pools.index(s.pool) if s.pool in pools else 0)
        )
        return chosen.tap, chosen.pool

    def _find_example(self, task: str) -> Score:
        every = [s for place, of in self._scores.items() if place[1] == task for s in of.values()]
        candidates = [score for _, _, score in self.shown(task)] or every
        return max(candidates, key=lambda a: sum(a.is_on_the_samples_of(b) for b in candidates))

    def _rivals(self, model: Entrant, own: Score, task: str, probe: str) -> list[tuple[Entrant, Score]]:
        """The random encoder as it is read best, and the best control."""
        found: dict[str, list[tuple[Entrant, Score]]] = {"random": [], "control": []}
        for e in self.entrants:
            if e.kind == "control" or e.identity == self._shapes[model.identity]:
                of = self._scores.get((e.identity, task, probe), {})
                scores = [score for setting, score in of.items() if setting[:3] == self._conditions[task]]
                found[e.kind] += [(e, score) for score in scores if score.is_on_the_samples_of(own)]
        return [best_of(self.metrics[task], of, lambda pair: pair[1].value) for of in found.values() if of]


def _metric_of(task: str, records: Sequence[Record]) -> str:
    found = list(dict.fromkeys(str(r["metric"]) for r in records))
    if len(found) > 1:
        raise ValueError(f"task {task} is ranked by {' and '.join(found)} in these results: report them apart")
    return found[0]


def _n_leaked(records: Sequence[Record]) -> int:
    return max(int(r.get("n_leaked") or 0) for r in records)


def _leak(records: Sequence[Record]) -> str:
    """Why the task of these records is left out of what is said of all tasks; empty where it is not."""
    admitted = dict.fromkeys(flag for r in records for flag in r["flags"] if flag.startswith(LEAK))
    n_leaked = _n_leaked(records)
    counted = [f"leak: {n_leaked} test samples have the content of a training sample"] if n_leaked else []
    return "; ".join(admitted or counted)


def _steps(records: Sequence[Record], axis: str) -> list[str]:
    """Taps and pools are of encoders, pools not of their patches."""
    of_encoders = [r for r in records if axis in CONDITIONS or (is_encoder(r) and r[axis])]
    found = dict.fromkeys(str(r[axis]) for r in of_encoders)
    if axis == "partition":
        return sorted(found, key=lambda name: (parse_partition(name).ratio, name))
    return list(found)


def _commonest_conditions(records: Sequence[Record]) -> _Conditions:
    found: dict[_Conditions, set[str]] = {}
    for r in records:
        condition = (str(r["partition"]), str(r["subset"]), str(r["size"]))
        found.setdefault(condition, set()).add(identity_of(r))

    def rank(condition: _Conditions) -> tuple[float, ...]:
        name, subset, size = condition
        part = parse_partition(name)
        return len(found[condition]), part.ratio, not part.is_nested, subset == "all", size == "task"

    return max(found, key=rank)


def _scores(results: Sequence[Record]) -> dict[_Place, dict[Setting, Score]]:
    records: dict[_Place, dict[Setting, list[Record]]] = {}
    for r in results:
        settings = records.setdefault((identity_of(r), str(r["task"]), str(r["probe"])), {})
        settings.setdefault(Setting.of(r), []).append(r)
    return {place: {s: newest_whole(s, of) for s, of in settings.items()} for place, settings in records.items()}


def _reading_text(reading: Sequence[str]) -> str:
    tap, pool = reading
    return f"read at {tap.replace('_', ' ')}{'' if pool == 'None' else f', {pool}'}"


def _flags_of_experiments(scores: Sequence[tuple[Entrant, str, Score]]) -> list[str]:
    """Of which entrants there are results that were not all got in the same way."""
    probes: dict[tuple[str, str, str], list[str]] = {}
    for entrant, probe, score in scores:
        if score.others:
            day = max(str(r["date"]) for r in score.records)[:10]
            probes.setdefault((entrant.title, ", ".join(score.others), day), []).append(probe)
    return [
        f"{title} has results of several experiments by {', '.join(of)}, which differ in {keys}: shown is the newest"
        f" whole one, of {day}"
        for (title, keys, day), of in probes.items()
    ]


def _unanswered(records: Sequence[Record]) -> list[Record]:
    """What could not be measured, unless a later result is what was asked for, or one of the job that failed."""
    found: dict[tuple[str, ...], Record] = {}
    for r in records:
        question = tuple(str(r.get(key)) for key in QUESTION)
        whole_job = (str(r["job"]),)
        if r["kind"] == "result":
            found.pop(question, None)
            found.pop(whole_job, None)
        else:
            found[question if "probe" in r else whole_job] = r
    return list(found.values())


def _distinct(problems: Sequence[Record]) -> list[Record]:
    """Controls are measured anew for each model, and fail alike."""
    keys = ("kind", "task", "features", "model", "subset", "size", "tap", "probe", "partition", "seed", "error")
    return list({tuple(str(r.get(k)) for k in keys): r for r in problems}.values())
