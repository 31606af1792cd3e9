"""Training on labels: a model for each learning rate, the best on validation is kept.

N training samples, B of a batch, K outputs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_eo.adapt.examples import Examples, Features
from ssl_eo.adapt.losses import LossConfig, LossName, build_loss, check_loss
from ssl_eo.adapt.model import TaskModel
from ssl_eo.adapt.sampling import balanced_rows, check_balanced, class_counts, drawn_classes
from ssl_eo.adapt.scoring import Scorer
from ssl_eo.adapt.selection import GATE_LR_RATIO, GatedDecoder
from ssl_eo.eval.decoders import TapMaps
from ssl_eo.eval.kinds import Kind
from ssl_eo.eval.metrics import HIGHER_IS_BETTER, Outcome
from ssl_eo.eval.splits import Shown
from ssl_eo.schedules import WarmupCosine
from ssl_eo.seeding import derive_seed, torch_generator
from ssl_eo.train.optim import OptimConfig, param_groups, set_hyper_parameters

__all__ = ["Fitted", "Labels", "Samples", "TrainingConfig", "autocast", "check_labelled", "fit", "loss_for", "predict"]

logger = logging.getLogger(__name__)

_WARMUP_RATIO = 0.1
_USUAL_LOSS: dict[Kind, LossName] = {
    "classification": "ce",
    "multilabel": "bce",
    "segmentation": "ce",
    "regression": "mse",
}


@dataclass
class TrainingConfig:
    """How a model is trained on labels: AdamW, a short warm-up, a cosine to 0."""

    n_steps: int = 1000  # of each learning rate
    batch_size: int = 8  # samples of a step; never more than there are to train on
    # Peaks that are tried; the best on validation is kept, so that no width of encoder is favoured.
    lrs: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    # finetune: lr of the encoder, over that of the decoder, at which all else learns: adapters, the patch embedding of
    # retrain_input, encoders that begin with random weights.
    encoder_lr_ratio: float = 0.1
    layer_decay: float = 0.75  # finetune: lr of block i is multiplied by layer_decay ** (depth - i)
    weight_decay: float = 0.05  # of AdamW; not of biases, norms and tokens
    clip_grad_norm: float | None = 1.0  # one global norm over all that trains
    n_evaluations: int = 4  # on validation, evenly over the steps; the weights of the best are kept
    sampling: Literal["natural", "balanced"] = "natural"  # balanced: every class as often as the others
    symmetries: bool = False  # turn and flip samples at random
    precision: Literal["float32", "bfloat16"] = "float32"  # of matmuls; weights stay in float32
    features_gb: float = 4.0  # features of a frozen encoder are computed once where they take no more
    loss: LossConfig | None = None  # None: cross-entropy, for several labels a sample bce, for numbers mse

    def __post_init__(self) -> None:
        for key in ("n_steps", "batch_size", "n_evaluations"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if not self.lrs or min(self.lrs) <= 0 or len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"lrs must name one at least, positive and each once, got {self.lrs}")
        if self.n_evaluations > self.n_steps:
            raise ValueError(f"n_evaluations {self.n_evaluations} exceeds n_steps {self.n_steps}")
        if self.encoder_lr_ratio <= 0 or not 0 < self.layer_decay <= 1:
            raise ValueError(
                "encoder_lr_ratio must be positive and layer_decay in (0, 1], got"
                f" {self.encoder_lr_ratio} and {self.layer_decay}"
            )
        for key in ("weight_decay", "features_gb"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be finite and at least 0, got {getattr(self, key)}")
        if self.sampling == "balanced" and self.loss is not None and self.loss.name == "logit_adjusted":
            raise ValueError(
                "sampling: balanced with loss logit_adjusted: both correct for the same thing, and of balanced batches"
                " the priors are equal; take one of the two"
            )
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ValueError(f"clip_grad_norm must be positive or null, got {self.clip_grad_norm}")

    def check_kind(self, kind: Kind) -> None:
        """Raise `ValueError` unless labels of `kind` can be learned so."""
        if self.loss is not None:
            check_loss(self.loss.name, kind)
        if self.sampling == "balanced":
            check_balanced(kind)


@dataclass(frozen=True)
class Labels:
    """What is predicted, and by which metric the best is found. `no_data` are classes of a map that mean unknown."""

    shown: Shown
    headline: str
    no_data: tuple[int, ...] = ()

    @property
    def n_outputs(self) -> int:
        return 1 if self.shown.kind == "regression" else self.shown.n_classes


@dataclass(frozen=True)
class Samples:
    """Samples of one split, and what a frozen backbone makes of them, where that is known."""

    examples: Examples
    features: Features | None = None

    def taps(self, model: TaskModel, rows: Tensor) -> TapMaps:
        """What the backbone makes of the samples `rows`, from what is kept where it is."""
        return model.taps(self.examples.batch(rows)[0]) if self.features is None else self.features.at(rows)

    def channels(self, index: Sequence[Tensor]) -> Samples:
        """The same samples, of whose kept features the channels `index [d]` of each tap are left."""
        return self if self.features is None else Samples(self.examples, self.features.channels(index))

    def logits(self, model: TaskModel, rows: Tensor, symmetries: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Those of the samples `rows`, and their labels."""
        examples = self.examples
        if self.features is not None and symmetries is None:
            rows = rows.to(examples.device)  # once, for features and labels
            return model.decode(self.features.at(rows), examples.shown, examples.size), examples.labels[rows]
        inputs, labels = examples.batch(rows, symmetries)
        return model(inputs, examples.size), labels


@dataclass(frozen=True)
class Fitted:
    """The model with the best weights, in eval mode, and how it came to be.

    `curves` holds for each learning rate the headline on validation at each evaluation, nan from where it diverged.
    """

    model: TaskModel
    lr: float
    step: int  # of the weights
    curves: dict[float, list[float]]
    seconds: float  # of all learning rates
    n_trained: int  # weights that were trained


def fit(
    make_model: Callable[[], TaskModel],
    labels: Labels,
    train: Samples,
    val: Samples,
    cfg: TrainingConfig,
    seed: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train a model of `make_model` at each learning rate on `train`, and keep what is best on `val`.

    All models begin with the same weights, and see the same batches. `tell` is told (steps done, all of them), over all
    learning rates. Raises `ValueError` where every learning rate diverges, and for samples without any label.
    """
    for split, samples in (("train", train), ("val", val)):
        check_labelled(labels, split, samples.examples)
    start = time.perf_counter()
    best = -math.inf, math.nan, 0
    kept: dict[str, Tensor] = {}
    curves: dict[float, list[float]] = {}
    sign = 1 if HIGHER_IS_BETTER[labels.headline] else -1
    trial = _Trial(labels, train, val, cfg, seed)
    for n_before, lr in enumerate(cfg.lrs):
        advance = _advance(tell, n_before * cfg.n_steps, len(cfg.lrs) * cfg.n_steps)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "adapt", labels.shown.task))
            model = make_model()
            curves[lr] = []
            for step, score in trial.evaluated(model, lr, advance):
                curves[lr].append(score)
                if math.isfinite(score) and sign * score > best[0]:
                    best, kept = (sign * score, lr, step), _changed_state(model)
    if not kept:
        raise ValueError(
            f"task {labels.shown.task}: at every learning rate of {cfg.lrs} training diverged, or {labels.headline} is"
            " undefined on validation; try smaller ones"
        )
    model.load_state_dict(kept, strict=False)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Fitted(model.eval(), best[1], best[2], curves, time.perf_counter() - start, n_trained)


def predict(model: TaskModel, labels: Labels, samples: Samples, cfg: TrainingConfig) -> Outcome:
    """What `model` predicts for `samples`, beside their labels."""
    model.eval()
    scorer = Scorer(labels.shown, labels.no_data)
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(samples.examples)), cfg.batch_size):
            with autocast(samples.examples.device, cfg):
                logits, truth = samples.logits(model, rows)
            scorer.add(model.values(logits.float()), truth)
    return scorer.outcome()


def check_labelled(labels: Labels, split: str, examples: Examples) -> None:
    """Raise `ValueError` where no sample of `split` has a label: nothing can be learned from it, or told by it."""
    shown, truth = labels.shown, examples.labels
    unknown = set() if shown.ignore is None else {shown.ignore}
    if labels.headline == "miou_valid":  # all others take such classes for classes like others
        unknown.update(labels.no_data)
    if shown.kind == "regression":
        is_known = truth.isfinite()
    else:
        is_known = torch.ones_like(truth, dtype=torch.bool)
        for value in unknown:
            is_known &= truth != value
    if not is_known.any():
        of = f": all are {', '.join(map(str, sorted(unknown)))}, which stand for unknown" if unknown else ""
        what = "pixel" if shown.kind == "segmentation" else "sample"
        raise ValueError(f"task {shown.task}: no {what} of {split} has a label{of}; look at the labels of {split}")


def loss_for(labels: Labels, train: Examples, cfg: TrainingConfig) -> nn.Module:
    """The loss on `train`, on its device. Raises `ValueError` for one that its labels cannot have."""
    shown, truth = labels.shown, train.labels
    counts = None
    if shown.kind != "regression":
        counts = class_counts(truth, shown.kind, shown.n_classes, shown.ignore)
    loss = LossConfig(_USUAL_LOSS[shown.kind]) if cfg.loss is None else cfg.loss
    return build_loss(loss, shown.kind, labels.n_outputs, counts, shown.ignore).to(truth.device)


def _advance(tell: Callable[[int, int], None] | None, n_before: int, n_all: int) -> Callable[[int], None]:
    def advance(step: int) -> None:
        if tell is not None:
            tell(n_before + step, n_all)

    return advance


@dataclass(frozen=True)
class _Trial:
    """What the learning rates of one `fit` share."""

    labels: Labels
    train: Samples
    val: Samples
    cfg: TrainingConfig
    seed: int

    def evaluated(self, model: TaskModel, lr: float, advance: Callable[[int], None]) -> Iterator[tuple[int, float]]:
        """Train, and give (steps done, headline on `val`) at each evaluation, when weights are those of that step."""
        cfg, labels, device = self.cfg, self.labels, self.train.examples.device
        optimizer, parameters = _optimizer(model, cfg)
        schedule = WarmupCosine(lr, 0.0, cfg.n_steps, round(_WARMUP_RATIO * cfg.n_steps))
        if labels.shown.kind == "regression":
            model.measure_outputs(self.train.examples.labels)
        due = {round(cfg.n_steps * (i + 1) / cfg.n_evaluations) for i in range(cfg.n_evaluations)}
        is_finite = torch.ones((), device=device, dtype=torch.bool)
        model.train()
        for step, rows in enumerate(_batches(self.train.examples, labels, cfg, self.seed), start=1):
            set_hyper_parameters(optimizer, schedule(step - 1), cfg.weight_decay, step)
            with autocast(device, cfg):
                logits, some = self.train.logits(model, rows, self._symmetries(len(rows), step))
            value = self._loss_of(logits.float(), model.targets(some))
            is_finite &= value.isfinite()
            value.backward()
            if cfg.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, cfg.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            advance(step)
            if step in due:
                if not bool(is_finite):  # read here alone: it waits for the device
                    logger.warning("task %s: training diverged at lr %g before step %d", labels.shown.task, lr, step)
                    yield step, math.nan
                    return
                yield step, predict(model, labels, self.val, cfg).scores().get(labels.headline, math.nan)
                model.train()

    @cached_property
    def _loss_of(self) -> nn.Module:
        return loss_for(self.labels, self.train.examples, self.cfg)

    def _symmetries(self, n: int, step: int) -> Tensor | None:
        """Of the samples of a step, the same at every learning rate."""
        if not self.cfg.symmetries:
            return None
        generator = torch_generator(self.seed, "symmetries", self.labels.shown.task, step)
        return self.train.examples.drawn_symmetries(n, generator)


def _batches(examples: Examples, labels: Labels, cfg: TrainingConfig, seed: int) -> Iterator[Tensor]:
    """Rows of each step, epoch after epoch, each in an order of its own; the rest of an epoch begins the next batch."""
    shown, size = labels.shown, min(cfg.batch_size, len(examples))
    classes = None  # that balanced epochs show each sample for
    if cfg.sampling == "balanced":
        classes = drawn_classes(examples.labels, shown.kind, shown.n_classes, shown.ignore).cpu()
    left = torch.empty(0, dtype=torch.long)
    epoch = 0
    for _ in range(cfg.n_steps):
        while len(left) < size:
            address = (seed, "adapt", shown.task, epoch)
            if classes is None:
                rows = torch.randperm(len(examples), generator=torch_generator(*address))
            else:
                rows = balanced_rows(classes, derive_seed(*address))
            left, epoch = torch.cat([left, rows]), epoch + 1
        rows, left = left[:size], left[size:]
        yield rows


def _optimizer(model: TaskModel, cfg: TrainingConfig) -> tuple[torch.optim.AdamW, list[nn.Parameter]]:
    """AdamW over what trains: all at the rate of the decoder, but for a pretrained backbone, at less, by depth."""
    named = [(name.removeprefix("backbone."), p) for name, p in model.named_parameters() if p.requires_grad]
    is_finetuned = model.backbone.is_finetuned
    of_backbone = {"^(?!decoder\\.)": cfg.encoder_lr_ratio} if is_finetuned else {}
    has_adapters = any(".lora_" in name for name, _ in named)
    of_adapters = {"\\.lora_": 0.0} if has_adapters else {}  # decay would only shrink them
    of_gate = {"^decoder\\.gate\\.": GATE_LR_RATIO} if isinstance(model.decoder, GatedDecoder) else {}
    rules = OptimConfig(
        weight_decay=cfg.weight_decay,
        betas=(0.9, 0.999),
        layer_decay=cfg.layer_decay if is_finetuned else 1.0,
        lr_multipliers={**of_backbone, **of_gate},
        weight_decay_multipliers=of_adapters,
    )
    groups = param_groups(named, model.backbone.depth, rules)
    return torch.optim.AdamW(groups, betas=rules.betas, eps=rules.eps, fused=True), [p for _, p in named]


def autocast(device: torch.device, cfg: TrainingConfig) -> torch.autocast:
    """The precision of matmuls."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


def _changed_state(model: TaskModel) -> dict[str, Tensor]:
    """A copy of what training changes: all of the decoder, and of a backbone that trains."""
    state = model.state_dict()
    is_frozen = model.is_frozen
    kept = [name for name in state if not (is_frozen and name.startswith("backbone."))]
    return {name: state[name].detach().clone() for name in kept}
