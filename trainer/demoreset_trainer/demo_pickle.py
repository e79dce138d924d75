"""Reading a pickle without running it.

A pickle is a program that names functions and calls them; loading one with Python's own machinery
does what its author wanted. Here `pickletools` splits it into instructions, and a small machine
carries out those that numbers, texts, lists, dictionaries and numpy's one-dimensional arrays of
numbers need. It calls nothing: what a pickle names is a mark in a table, and any other name, or
any other instruction, is refused. A claimed size is compared with the bytes that are there before
anything is made of it.
"""

import pickletools
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from demoreset_api.errors import UserError

T = TypeVar("T")

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # up to numpy 1, from numpy 2 on
_NAMES = {
    ("numpy", "dtype"): "kind",
    ("numpy", "ndarray"): "array's class",
    ("_codecs", "encode"): "bytes",  # how protocol 2 writes bytes
    **{(module, "_reconstruct"): "array" for module in _NUMPY},
    **{(module, "scalar"): "number" for module in _NUMPY},
    ("numpy._core.numeric", "_frombuffer"): "whole array",  # protocol 5
}
_KINDS = {f"{letter}{size}" for letter in "iuf" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}
MAX_INSTRUCTIONS = 5_000_000  # two hours of play have as many; the worst take some 100 bytes each
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8"),
}


@dataclass
class Array:
    """An array of the pickle; its numbers come after it was made."""

    numbers: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names; nothing but its role in our table."""

    role: str


@dataclass
class _Kind:
    """An array's type of numbers."""

    code: str
    order: str = "<"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


def read(content: bytes, name: str) -> Any:
    """The value that a pickle of numbers, texts, containers and arrays stands for.

    Raises:
        UserError: it is damaged, or asks for anything else; `name` is what the message calls it.
    """
    with warnings.catch_warnings():
        # A damaged text may have escapes that Python frowns upon; the reader's business, not ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        return _read(content, name)


def _read(content: bytes, name: str) -> Any:
    machine = _Machine()
    place = 0
    try:
        for count, (instruction, argument, position) in enumerate(pickletools.genops(content)):
            place = position or 0
            if count == MAX_INSTRUCTIONS:
                raise UserError(f"{name}: too large a pickle (most: {count:,} instructions)")
            if instruction.name == "STOP":
                return machine.pop(object)
            machine.step(instruction.name, argument)
    except _Refused as refused:
        raise UserError(
            f"{name}: {refused} (at byte {place}); a demonstration has numbers, lists and numpy "
            "arrays only, and a pickle can run any program: nothing of it was run"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{name}: a damaged pickle (after byte {place}: {reason})") from None
    raise UserError(f"{name}: a damaged pickle (it has no end)")


class _Refused(Exception):
    """The pickle asks for what no demonstration needs."""


class _Machine:
    """The pickle machine: a stack, the stacks below its marks, and what it was told to remember."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop(self, kind: type[T]) -> T:
        """Take the top of the stack."""
        return _a(kind, self._stack.pop())

    def step(self, instruction: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self._stack
        if instruction in _LITERALS:
            stack.append(argument)
            return
        match instruction:
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[instruction])
            case "GLOBAL":
                stack.append(_named(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(str), self.pop(str)
                stack.append(_named(module, name))
            case "REDUCE":
                arguments, function = self.pop(tuple), self.pop(_Name)
                stack.append(_made(function.role, arguments))
            case "BUILD":
                state = self.pop(tuple)
                _complete(stack[-1], state)
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction[-1])
                if len(stack) < count:
                    raise IndexError("a tuple of more than there is")
                self._stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = self._since_mark()
                self._stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _a(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._since_mark()
                _a(list, self._stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), self.pop(str)
                _a(dict, stack[-1])[key] = value
            case "SETITEMS":
                items = self._since_mark()
                keys = [_a(str, key) for key in items[::2]]
                _a(dict, self._stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "PROTO" | "FRAME":
                pass
            case _:
                raise _Refused(f"it holds the instruction {instruction}")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items


def _a(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        # Not the value itself: a list that holds itself twice, and so on, has no end when printed.
        raise ValueError(f"{type(value).__name__} where {kind.__name__} is needed")
    return value


def _named(module: str, name: str = "") -> _Name:
    role = _NAMES.get((module, name))
    if role is None:
        raise _Refused(f"it names {f'{module}.{name}'[:80]!a}")
    return _Name(role)


def _made(role: str, arguments: tuple[Any, ...]) -> Any:
    """What a call stands for."""
    match role, arguments:
        case "array", (_Name(role="array's class"), *_):
            return Array()
        case "kind", (str(code), *_) if code.lstrip("<>|=") in _KINDS:
            return _Kind(code.lstrip("<>|="), code[0] if code[0] in "<>" else "<")
        case "kind", (str(code), *_):
            raise _Refused(f"it holds arrays of {code[:20]!a}")
        case "number", (_Kind() as kind, bytes(raw)) if len(raw) == kind.dtype.itemsize:
            return np.frombuffer(raw, kind.dtype)[0].item()
        case "whole array", (bytes(raw) | bytearray(raw), _Kind() as kind, (int(count),), *_):
            return Array(_numbers_of(raw, kind, count))
        case "bytes", (str(text), "latin1"):
            return text.encode("latin1")
    raise ValueError(f"a {role} made of something else")


def _complete(value: object, state: tuple[Any, ...]) -> None:
    """Give a value what the pickle says about it after it was made."""
    match value, state:
        case _Kind(), (int(), str(order), None, None, None, *_) if order in ("<", ">", "|", "="):
            value.order = order if order == ">" else "<"
        case Array(), (int(), (int(count),), _Kind() as kind, bool(), bytes(raw)):
            value.numbers = _numbers_of(raw, kind, count)
        case Array(), (int(), tuple(shape), *_) if len(shape) != 1:
            raise ValueError(f"an array of {len(shape)} dimensions")
        case _:
            raise ValueError(f"{type(value).__name__} with a state of another kind")


def _numbers_of(raw: bytes | bytearray, kind: _Kind, count: int) -> npt.NDArray[Any]:
    if count * kind.dtype.itemsize != len(raw):
        raise ValueError(f"an array of {count} numbers in {len(raw)} bytes")
    return np.frombuffer(bytes(raw), kind.dtype)


def numbers(value: object) -> npt.NDArray[np.float64]:
    """A list or array of a pickle as finite numbers.

    Raises:
        ValueError: it is none, or holds something else.
    """
    if isinstance(value, Array) and value.numbers is not None:
        found = value.numbers.astype(np.float64)
    elif isinstance(value, list):
        if not all(type(entry) in (int, float) for entry in value):
            strange = next(entry for entry in value if type(entry) not in (int, float))
            raise ValueError(f"{type(strange).__name__} among the numbers")
        found = np.array(value, np.float64)
    else:
        raise ValueError(f"{type(value).__name__}, not a list of numbers")
    if not np.isfinite(found).all():
        raise ValueError("an infinite number, or one that is none (NaN)")
    return found
