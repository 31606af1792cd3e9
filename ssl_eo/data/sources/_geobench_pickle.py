"""What a pickle says, told without unpickling it: nothing that it names is imported, and nothing is called.

A pickle is a program for a small stack machine (its instructions are described in Python's `pickletools`). This runs
those that build plain values, and that GeoBench's writer needs. Where the program names something of a module there is
a `Global`, where it would call something a `Call`: both only say so. Every other instruction is refused by name.

K classes.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Call", "Global", "array_of", "interpret"]

_MAX_BYTES = 4 << 20
_MAX_INSTRUCTIONS = 100_000  # a sample of 13 bands takes some 600
_MAX_STRING_BYTES = 1 << 20  # of one text; outlines of forest loss are long
_MAX_RAW_BYTES = 1 << 16  # of one byte string: a label, a date
_MAX_INTEGER_BYTES = 8
_MAX_KEY = 1 << 31  # larger numbers can be chosen such that many have one hash
_MAX_DIMENSIONS = 2
_MAX_NESTING = 64
_MAX_PROTOCOL = 5
_LABEL_TYPES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])  # NumPy's codes
# What a sample is described with. A pickle that names anything else was not written by GeoBench.
_PACKAGES = ("geobench", "ccb", "affine", "rasterio", "datetime", "numpy")
_NUMPY_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and after NumPy 2


@dataclass(frozen=True)
class Global:
    """Something of a module, by name alone."""

    module: str
    name: str


@dataclass(eq=False, repr=False)
class Call:
    """A call that unpickling would have made, and the state that the result would have been given."""

    target: Global
    arguments: tuple[Any, ...]
    state: Any = None


def interpret(data: bytes) -> Any:
    """The value of a pickle: None, bool, int, float, str, bytes, tuple, list, dict, `Global` or `Call`.

    Keys of dicts are str, or int below 2^31. Raises `ValueError` for anything else, for what is not a whole pickle, and
    for one that is larger, longer or more deeply nested than a sample's description can be.
    """
    if len(data) > _MAX_BYTES:
        raise ValueError(f"the pickle has {len(data):,} bytes, expected at most {_MAX_BYTES:,}")
    machine = _Machine(data)
    for _ in range(_MAX_INSTRUCTIONS):
        at = machine.at
        code = machine.take(1)
        if at == 0 and code != pickle.PROTO:
            raise ValueError(f"a pickle begins with the instruction PROTO, found byte {code!r}")
        if code == pickle.STOP:
            return _result(machine)
        if code not in _INSTRUCTIONS:
            raise ValueError(
                f"the pickle has the instruction {_name_of(code)} at byte {at}, which the description of a sample does"
                f" not need (allowed: {', '.join(sorted(map(_name_of, _INSTRUCTIONS)))})"
            )
        _INSTRUCTIONS[code](machine)
    raise ValueError(f"the pickle has more than {_MAX_INSTRUCTIONS:,} instructions")


def array_of(value: Any) -> NDArray[Any] | None:
    """The NumPy array or scalar that a `Call` describes, from its raw bytes; None where it describes something else.

    Raises `ValueError` for an array that contradicts itself, or whose elements are no numbers.
    """
    if not isinstance(value, Call) or value.target.module not in _NUMPY_ARRAYS:
        return None
    if value.target.name == "scalar" and len(value.arguments) == 2:
        dtype, raw = value.arguments
        return _from_bytes(dtype, (), raw)
    if value.target.name != "_reconstruct" or not isinstance(value.state, tuple) or len(value.state) != 5:
        return None
    _, shape, dtype, is_fortran, raw = value.state
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array in the pickle has a shape that is none")
    if len(shape) > (1 if is_fortran else _MAX_DIMENSIONS):
        order = " in column order" if is_fortran else ""
        raise ValueError(f"an array in the pickle has {len(shape)} dimensions{order}, which no label has")
    return _from_bytes(dtype, shape, raw)


def _from_bytes(dtype: Any, shape: tuple[int, ...], raw: Any) -> NDArray[Any]:
    code = dtype.arguments[0] if isinstance(dtype, Call) and dtype.target == Global("numpy", "dtype") else None
    if not isinstance(code, str) or code not in _LABEL_TYPES or not isinstance(raw, bytes):
        raise ValueError(f"an array in the pickle must hold numbers ({', '.join(sorted(_LABEL_TYPES))})")
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    if order not in ("<", ">", "|"):
        raise ValueError("an array in the pickle has no known byte order")
    found = np.dtype(code if order == "|" else order + code)
    # Sizes may be numbers of any length, so they are looked at one by one first, and never shown.
    if any(n > len(raw) for n in shape) or math.prod(shape) * found.itemsize != len(raw):
        raise ValueError(f"an array in the pickle has {len(raw)} bytes of {found}, which are not those of its shape")
    return np.frombuffer(raw, found).reshape(shape)


@dataclass(repr=False)  # what a hostile pickle builds may be too large to print
class _Machine:
    """The stack machine: `marks` are heights of the stack, below which only the instruction that ends one may reach."""

    data: bytes
    at: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def take(self, n: int) -> bytes:
        """The next `n` bytes of the program."""
        end = self.at + n
        if end > len(self.data):
            raise ValueError(f"the pickle is cut off after {len(self.data)} bytes")
        taken, self.at = self.data[self.at : end], end
        return taken

    def number(self, layout: str) -> Any:
        """The next bytes as one number, in a layout of `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def counted(self, layout: str, limit: int) -> bytes:
        """As many of the next bytes as the number before them says."""
        n = self.number(layout)
        if n > limit:
            raise ValueError(f"the pickle has a string of {n:,} bytes at byte {self.at}, expected at most {limit:,}")
        return self.take(n)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, n: int) -> list[Any]:
        """The `n` topmost values, in the order in which they were pushed."""
        if len(self.stack) - n < (self.marks[-1] if self.marks else 0):
            raise ValueError(f"the pickle takes more values than it has put down, before byte {self.at}")
        values = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return values

    def pop_mark(self) -> list[Any]:
        """The values above the last mark."""
        if not self.marks:
            raise ValueError(f"the pickle ends a group that it has not begun, before byte {self.at}")
        values = self.pop(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return values

    def top(self, kind: type) -> Any:
        """The topmost value, which stays."""
        (value,) = self.pop(1)
        if not isinstance(value, kind):
            raise ValueError(
                f"the pickle treats {type(value).__name__} as {kind.__name__.lower()}, before byte {self.at}"
            )
        self.push(value)
        return value


def _result(machine: _Machine) -> Any:
    if machine.at != len(machine.data) or machine.marks or len(machine.stack) != 1:
        raise ValueError(
            f"the pickle ends at byte {machine.at} of {len(machine.data)} with {len(machine.stack)} values, expected"
            " one value at the last byte"
        )
    _check_nesting(machine.stack[0])
    return machine.stack[0]


def _check_nesting(value: Any) -> None:
    """Raise `ValueError` for a value that is nested too deeply, or holds itself. Shared parts are looked at once."""
    height: dict[int, int] = {}  # of parts that are done, by id: all are alive below `value`
    entered: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting[-1]
        if id(part) in height:
            waiting.pop()
            continue
        inner = [p for p in _parts(part) if isinstance(p, (tuple, list, dict, Call))]
        if left := [p for p in inner if id(p) not in height]:
            if id(part) in entered:  # what waits above it is done, so it waits for itself
                raise ValueError("the pickle has a value that holds itself")
            entered.add(id(part))
            waiting += left
            continue
        height[id(part)] = 1 + max((height[id(p)] for p in inner), default=0)
        if height[id(part)] > _MAX_NESTING:
            raise ValueError(f"the pickle is nested more than {_MAX_NESTING} deep")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, Call):
        return (value.arguments, value.state)
    return value if isinstance(value, (tuple, list)) else ()


# --- instructions -----------------------------------------------------------------------------------------------------


def _protocol(machine: _Machine) -> None:
    if (found := machine.number("<B")) > _MAX_PROTOCOL:
        raise ValueError(f"the pickle has protocol {found}, expected at most {_MAX_PROTOCOL}")


def _frame(machine: _Machine) -> None:
    if (n := machine.number("<Q")) > len(machine.data) - machine.at:
        raise ValueError(f"the pickle is cut off: a frame of {n:,} bytes at byte {machine.at} of {len(machine.data)}")


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


def _text(layout: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.counted(layout, _MAX_STRING_BYTES).decode("utf-8", "surrogatepass"))


def _integer(machine: _Machine) -> None:
    if (n := machine.number("<B")) > _MAX_INTEGER_BYTES:
        raise ValueError(f"the pickle has an integer of {n} bytes at byte {machine.at}, expected at most 8")
    machine.push(int.from_bytes(machine.take(n), "little", signed=True))


def _raw(layout: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.counted(layout, _MAX_RAW_BYTES))


def _tuple(n: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(tuple(m.pop(n)))


def _put(layout: str) -> Callable[[_Machine], None]:
    def run(machine: _Machine) -> None:
        machine.memo[machine.number(layout)] = machine.top(object)

    return run


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.top(object)


def _get(layout: str) -> Callable[[_Machine], None]:
    def run(machine: _Machine) -> None:
        if (number := machine.number(layout)) not in machine.memo:
            raise ValueError(f"the pickle asks for value {number}, which it has not kept, before byte {machine.at}")
        machine.push(machine.memo[number])

    return run


def _append(machine: _Machine) -> None:
    values = machine.pop(1)
    machine.top(list).extend(values)


def _appends(machine: _Machine) -> None:
    values = machine.pop_mark()
    machine.top(list).extend(values)


def _set_item(machine: _Machine) -> None:
    _fill(machine, machine.pop(2))


def _set_items(machine: _Machine) -> None:
    _fill(machine, machine.pop_mark())


def _fill(machine: _Machine, pairs: list[Any]) -> None:
    keys, values = pairs[::2], pairs[1::2]
    # Others could take for ever to hash: a tuple of tuples that are the same twice, and so on.
    if len(keys) != len(values) or not all(map(_is_key, keys)):
        raise ValueError(
            f"the pickle has keys that are no text or number below 2^31, or no value, before byte {machine.at}"
        )
    machine.top(dict).update(zip(keys, values, strict=True))


def _is_key(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < _MAX_KEY)


def _global(machine: _Machine) -> None:
    module, name = machine.pop(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(f"the pickle names something by no text, before byte {machine.at}")
    if module.partition(".")[0] not in _PACKAGES:
        raise ValueError(
            f"the pickle names {module!r:.80}.{name!r:.80}, which no sample is described with (known:"
            f" {', '.join(_PACKAGES)}); it may have been made to do harm, and was not run"
        )
    machine.push(Global(module, name))


def _call(machine: _Machine) -> None:
    target, arguments = machine.pop(2)
    if not isinstance(target, Global) or not isinstance(arguments, tuple):
        raise ValueError(f"the pickle calls something that it has not named, before byte {machine.at}")
    machine.push(Call(target, arguments))


def _build(machine: _Machine) -> None:
    (state,) = machine.pop(1)
    machine.top(Call).state = state


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: _frame,
    pickle.MARK: _mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: _integer,
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.SHORT_BINUNICODE: _text("<B"),
    pickle.BINUNICODE: _text("<I"),
    pickle.SHORT_BINBYTES: _raw("<B"),
    pickle.BINBYTES: _raw("<I"),
    pickle.EMPTY_TUPLE: _tuple(0),
    pickle.TUPLE1: _tuple(1),
    pickle.TUPLE2: _tuple(2),
    pickle.TUPLE3: _tuple(3),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_items,
    pickle.MEMOIZE: _memoize,
    pickle.BINPUT: _put("<B"),
    pickle.LONG_BINPUT: _put("<I"),
    pickle.BINGET: _get("<B"),
    pickle.LONG_BINGET: _get("<I"),
    pickle.STACK_GLOBAL: _global,
    pickle.REDUCE: _call,
    pickle.NEWOBJ: _call,
    pickle.BUILD: _build,
}


def _name_of(code: bytes) -> str:
    known = pickletools.code2op.get(code.decode("latin-1"))  # type: ignore[attr-defined]
    return known.name if known is not None else f"{code!r}, which is none"
