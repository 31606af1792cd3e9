"""How often classes occur, and epochs in which all are seen equally often.

N samples, K classes, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_eo.eval._confusion import check_classes
from ssl_eo.eval.kinds import Kind
from ssl_eo.seeding import torch_generator

__all__ = ["balanced_rows", "check_balanced", "class_counts", "drawn_classes"]

_MOST_COUNTED = 1 << 22  # labels at a time: as numbers of 64 bits, all would take many times the memory of the labels
_SHAPES: dict[Kind, tuple[int, str]] = {
    "classification": (1, "[N]"),
    "segmentation": (3, "[N, H, W]"),
    "multilabel": (2, "[N, K] of 0 and 1"),
}


def class_counts(labels: Tensor, kind: Kind, n_classes: int, ignore: int | None = None) -> Tensor:
    """How often each class occurs in `labels`, int64: `[K]`, or for `multilabel` `[2, K]`, samples without and with it.

    Labels are `[N]`, `[N, H, W]` or `[N, K]` by kind. Counts of parts of a data set add up to those of the whole.
    Raises `ValueError` for labels that are not classes from 0 to K - 1 (or `ignore`), and for `regression`.
    """
    _check_shape(labels, kind)
    if kind == "multilabel":
        check_classes("labels", labels, 2)
        if labels.shape[1] != n_classes:
            raise ValueError(f"labels must be [N, {n_classes}], got {list(labels.shape)}")
        with_class = labels.long().sum(0)
        return torch.stack([len(labels) - with_class, with_class])
    counts = torch.zeros(n_classes, dtype=torch.int64, device=labels.device)
    for part in torch.split(labels.flatten(), _MOST_COUNTED):
        known = part if ignore is None else part[part != ignore]
        check_classes("labels", known, n_classes)
        counts += torch.bincount(known.long(), minlength=n_classes)
    return counts


def check_balanced(kind: Kind) -> None:
    """Raise `ValueError` unless labels of `kind` have classes of which one can be drawn for each sample."""
    if kind not in ("classification", "segmentation"):
        raise ValueError(f"balanced sampling is for classification and segmentation, got {kind}")


def drawn_classes(labels: Tensor, kind: Kind, n_classes: int, ignore: int | None = None) -> Tensor:
    """The class that a balanced epoch shows each sample for, `[N]` int64; -1 for a sample without any label.

    Of `classification` the label `[N]`; of `segmentation` the rarest class, by pixels of all `labels [N, H, W]`, among
    those of the sample. Raises `ValueError` as `class_counts` does, and for other kinds.
    """
    check_balanced(kind)
    counts = class_counts(labels, kind, n_classes, ignore)
    if kind == "classification":
        return labels.long() if ignore is None else torch.where(labels == ignore, -1, labels).long()
    order = counts.argsort(stable=True)  # [K], from the rarest on
    known = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    found = torch.stack([((labels == c) & known).flatten(1).any(1) for c in order.tolist()], dim=1)  # [N, K]
    return torch.where(found.any(1), order[found.int().argmax(1)], -1)


def balanced_rows(classes: Tensor, seed: int, n_rows: int | None = None) -> Tensor:
    """Rows for an epoch in which each of `classes [N]` is shown equally often, in random order, `[n_rows]` int64.

    `classes` are those of `drawn_classes`, on the CPU; samples of -1 are left out. Classes that occur differ by at most
    one row, and so do the samples of one class: those of rare classes come again and again, those of frequent ones may
    be left out. By default there are as many rows as samples with a label. The rows are a function of the classes and
    `seed`, which is to differ from epoch to epoch (`seeding.derive_seed`). Raises `ValueError` where no sample has a
    label.
    """
    n_labelled = int((classes >= 0).sum())
    n_rows = n_labelled if n_rows is None else n_rows
    if n_labelled == 0 or n_rows < 1:
        raise ValueError(f"a balanced epoch needs a labelled sample and a row at least, got {n_labelled} and {n_rows}")
    generator = torch_generator(seed, "balanced_rows")
    present = torch.bincount(classes[classes >= 0]).nonzero()[:, 0]
    present = present[torch.randperm(len(present), generator=generator)]  # the first of them get what is left over
    share, n_over = divmod(n_rows, len(present))
    parts = []
    for i, c in enumerate(present):
        rows = (classes == c).nonzero()[:, 0]
        n_times, n_more = divmod(share + (i < n_over), len(rows))
        parts += [rows.repeat(n_times), rows[torch.randperm(len(rows), generator=generator)[:n_more]]]
    drawn = torch.cat(parts)
    return drawn[torch.randperm(len(drawn), generator=generator)]


def _check_shape(labels: Tensor, kind: Kind) -> None:
    if kind not in _SHAPES:
        raise ValueError(f"classes are counted of {', '.join(_SHAPES)}, got {kind}")
    n_dims, shape = _SHAPES[kind]
    if labels.ndim != n_dims:
        raise ValueError(f"labels of {kind} must be {shape}, got {list(labels.shape)}")
