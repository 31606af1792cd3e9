"""What a piece of training would take: its floating point operations, and the bytes that are alive at its worst moment.

The code itself runs, on tensors that have a shape and no values: torch's fake tensors, which nothing is computed for.
Unlike tensors on the meta device they know autocast, and attention takes the kernel that real ones would take.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ssl_eo.models import alibi, position, space_time

__all__ = ["Alive", "Ledger", "blank", "without_values"]

Kind = Literal["state", "activations", "gradients"]


@dataclass(frozen=True)
class Alive:
    """Bytes at one moment: what backward and the code itself hold on to, and gradients of parameters."""

    activations: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients


@dataclass
class _Held:
    """A storage that is alive, and what it counts for."""

    storage: weakref.ref[torch.UntypedStorage]
    kind: Kind
    n_bytes: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered: FLOPs of all that runs, and bytes of what that makes and has not let go, phase by phase.

    `flop` and `peaks` are by phase; a phase that comes again adds to its FLOPs and may raise its peak. Operations of
    matrix products, convolutions and attention are counted, two a multiply-add.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flop: Counter[str] = Counter()
        self.peaks: dict[str, Alive] = {}
        self._phase = ""
        self._held: dict[int, _Held] = {}
        self._n_bytes: Counter[Kind] = Counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside belongs to `name`."""
        self._phase = name
        self._note_peak()
        try:
            yield
        finally:
            self._phase = ""

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These were there before, and are counted elsewhere."""
        for tensor in tensors:
            self._see(tensor, "state", 0)

    def watch_gradients(self, parameters: Mapping[str, nn.Parameter], bytes_of: Callable[[str], int]) -> None:
        """From when it is complete the gradient of a parameter counts as a gradient, of `bytes_of(name)`."""
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                hook: Any = parameter.register_post_accumulate_grad_hook
                hook(partial(self._is_complete, bytes_of(name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := _FORMULAS.get(func.overloadpacket)) is not None:
            self.flop[self._phase] += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor, "activations", None)
        return out

    def _see(self, tensor: Tensor, kind: Kind, n_bytes: int | None) -> None:
        """Count the storage of `tensor`, unless it is known: of a view, or of what was changed in place."""
        storage = tensor.untyped_storage()
        key = id(storage)  # one Python object as long as the storage lives
        if key in self._held:
            return
        n_bytes = storage.nbytes() if n_bytes is None else n_bytes
        self._held[key] = _Held(weakref.ref(storage, partial(self._let_go, key)), kind, n_bytes)
        self._n_bytes[kind] += n_bytes
        self._note_peak()

    def _let_go(self, key: int, _: object) -> None:
        held = self._held.pop(key)
        self._n_bytes[held.kind] -= held.n_bytes

    def _is_complete(self, n_bytes: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        held = self._held[id(parameter.grad.untyped_storage())]
        self._n_bytes[held.kind] -= held.n_bytes
        held.kind, held.n_bytes = "gradients", n_bytes
        self._n_bytes["gradients"] += n_bytes

    def _note_peak(self) -> None:
        now = Alive(self._n_bytes["activations"], self._n_bytes["gradients"])
        if self._phase and now.total >= self.peaks.get(self._phase, Alive()).total:
            self.peaks[self._phase] = now


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Tensors made inside are fake. Raises `ValueError` for code that would look at a value, or has no fake form."""
    _forget_tables()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ValueError(
            f"the training step cannot be planned: {error.args[0]} gives what depends on the values of tensors"
        ) from error
    finally:
        _forget_tables()


def blank(tensor: Tensor) -> Tensor:
    """A tensor of the layout of `tensor` on the CPU, whose numbers nobody has set."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _forget_tables() -> None:
    """Tables of positions are kept from call to call; fake and real ones must not meet."""
    for module in (alibi, position, space_time):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def _attention_flop(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flop: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return flop


def _attention_backward_flop(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    flop: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return flop


# torch's, which know the attention of GPUs, and that of CPUs.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}
