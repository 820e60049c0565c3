"""Pickles that others wrote, read without running anything: what they would call is kept by its name.

A pickle is a program for a machine with a stack, and Python's own machine calls whatever the program names. This one
knows the instructions with which tensors, containers and records of numbers and texts are written, in the protocols 2
to 5, and calls nothing: ``os.system`` would be a pair of texts. Names outside of what the caller expects are refused.
Source: ``pickletools`` of the standard library.
"""

import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from stockflow.errors import CheckpointError
from stockflow.text.strictjson import shown


class Global(NamedTuple):
    """A class or function, by its name."""

    module: str
    name: str

    def __str__(self) -> str:
        """Return what Python calls it."""
        return f"{self.module}.{self.name}"


class Persistent(NamedTuple):
    """What lies outside of the pickle, by the id it has there."""

    id: object


class Pairs(list[tuple[object, object]]):
    """A mapping: its pairs in order. Keys are anything, and not compared."""


@dataclass(eq=False, slots=True)
class Made:
    """An object that would be made by calling something."""

    by: Global
    args: tuple[object, ...]
    state: object = None
    """what its attributes would be set from"""


ORDERED_DICT = Global("collections", "OrderedDict")


class _BadPickle(Exception):
    """What is wrong with an instruction."""


def read_pickle(payload: bytes, allowed: Collection[Global], max_steps: int, where: str) -> object:
    """Return what a pickle describes: constants, lists, tuples, ``Pairs``, ``Global``, ``Persistent`` and ``Made``.

    Memory is some 100 bytes per step at most, beside the texts.

    Args:
        payload: the whole of it.
        allowed: what it may name.
        max_steps: instructions that are followed.
        where: names it in messages.

    Raises:
        CheckpointError: it names something else, uses other instructions, is too long, or is damaged.
    """
    machine = _Machine(payload, frozenset(allowed))
    try:
        return machine.run(max_steps)
    except _BadPickle as bad:
        raise CheckpointError(f"{where}: its pickle {bad}") from None
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise CheckpointError(
            f"{where}: its pickle is damaged at byte {machine.at:,}; fetch the file again, or write it again"
        ) from None


class _Machine:
    def __init__(self, payload: bytes, allowed: frozenset[Global]) -> None:
        self.at = 0
        self._payload = payload
        self._allowed = allowed
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        """stacks under the marks"""
        self._memo: dict[int, object] = {}

    def run(self, max_steps: int) -> object:
        payload = self._payload
        for _ in range(max_steps):
            code = payload[self.at]
            self.at += 1
            if code == _STOP:
                (result,) = self._stack
                return result
            act = _ACTS.get(code)
            if act is None:
                name = shown(chr(code))
                raise _BadPickle(f"has the instruction {name} at byte {self.at - 1:,}, which no tensor needs: refused")
            act(self)
        raise _BadPickle(f"has more than {max_steps:,} instructions, which is more than is read")

    def take(self, num_bytes: int) -> bytes:
        """Return the next bytes."""
        taken = self._payload[self.at : self.at + num_bytes]
        if len(taken) < num_bytes:
            raise ValueError
        self.at += num_bytes
        return taken

    def number(self, num_bytes: int) -> int:
        """Return the next bytes as a number from 0."""
        return int.from_bytes(self.take(num_bytes), "little")

    def line(self) -> str:
        """Return the text up to the end of the line."""
        end = self._payload.index(b"\n", self.at)
        text = self.take(end - self.at).decode()
        self.at += 1
        return text

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def pop(self) -> object:
        """Take the last value off the stack."""
        return self._stack.pop()

    def pop_tuple(self, count: int) -> None:
        """Put the last values back as one tuple."""
        if count > len(self._stack):
            raise ValueError
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def mark(self) -> None:
        """Begin a stack above this one."""
        self._below.append(self._stack)
        self._stack = []

    def unmark(self) -> list[object]:
        """End the stack that ``mark`` began, and return what is on it."""
        above, self._stack = self._stack, self._below.pop()
        return above

    def put(self, index: int) -> None:
        """Remember the last value."""
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        """Remember the last value under the next number."""
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        """Put a remembered value on the stack."""
        self.push(self._memo[index])

    def name(self, module: object, name: object) -> None:
        """Put a class or function on the stack."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise _BadPickle(f"names something by no text at byte {self.at - 1:,}: refused")
        found = Global(module, name)
        if found not in self._allowed:
            raise _BadPickle(f"names {shown(str(found))}, which is not part of plain tensors: refused, and nothing ran")
        self.push(found)

    def make(self) -> None:
        """Put down what calling something would make."""
        args, by = self.pop(), self.pop()
        if not isinstance(by, Global) or not isinstance(args, tuple):
            raise _BadPickle(f"calls what is no plain name at byte {self.at - 1:,}: refused")
        self.push(Pairs() if by == ORDERED_DICT and not args else Made(by, args))

    def set_state(self) -> None:
        """Set the attributes of what was made; those of mappings say nothing of their pairs."""
        state, made = self.pop(), self._stack[-1]
        if isinstance(made, Made):
            made.state = state
        elif not isinstance(made, Pairs):
            raise _BadPickle(f"sets attributes of what has none at byte {self.at - 1:,}: refused")

    def extend(self, values: list[object]) -> None:
        """Append to the list that is last on the stack."""
        target = self._stack[-1]
        if type(target) is not list:
            raise ValueError
        target.extend(values)

    def update(self, values: list[object]) -> None:
        """Add pairs to the mapping that is last on the stack."""
        target = self._stack[-1]
        if not isinstance(target, Pairs) or len(values) % 2:
            raise ValueError
        target.extend(zip(values[::2], values[1::2], strict=True))

    def popped(self, count: int) -> list[object]:
        """Take several values off the stack."""
        return [self.pop() for _ in range(count)][::-1]


def _text(machine: _Machine, width: int) -> None:
    machine.push(machine.take(machine.number(width)).decode("utf-8", "surrogatepass"))


def _bytes(machine: _Machine, width: int) -> None:
    machine.push(machine.take(machine.number(width)))


def _signed(machine: _Machine, num_bytes: int) -> None:
    machine.push(int.from_bytes(machine.take(num_bytes), "little", signed=True))


def _float(machine: _Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0])


def _global(machine: _Machine) -> None:
    machine.name(machine.line(), machine.line())


def _stack_global(machine: _Machine) -> None:
    machine.name(*machine.popped(2))


_STOP = ord(".")
_ACTS: Mapping[int, Callable[[_Machine], object]] = {
    0x80: lambda machine: machine.take(1),  # protocol
    0x95: lambda machine: machine.take(8),  # frame
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("K"): lambda machine: machine.push(machine.number(1)),
    ord("M"): lambda machine: machine.push(machine.number(2)),
    ord("J"): lambda machine: _signed(machine, 4),
    0x8A: lambda machine: _signed(machine, machine.number(1)),
    ord("G"): _float,
    ord("X"): lambda machine: _text(machine, 4),
    0x8C: lambda machine: _text(machine, 1),
    0x8D: lambda machine: _text(machine, 8),
    ord("B"): lambda machine: _bytes(machine, 4),
    ord("C"): lambda machine: _bytes(machine, 1),
    0x8E: lambda machine: _bytes(machine, 8),
    ord("("): _Machine.mark,
    ord(")"): lambda machine: machine.push(()),
    ord("t"): lambda machine: machine.push(tuple(machine.unmark())),
    0x85: lambda machine: machine.pop_tuple(1),
    0x86: lambda machine: machine.pop_tuple(2),
    0x87: lambda machine: machine.pop_tuple(3),
    ord("]"): lambda machine: machine.push([]),
    ord("a"): lambda machine: machine.extend(machine.popped(1)),
    ord("e"): lambda machine: machine.extend(machine.unmark()),
    ord("}"): lambda machine: machine.push(Pairs()),
    ord("s"): lambda machine: machine.update(machine.popped(2)),
    ord("u"): lambda machine: machine.update(machine.unmark()),
    ord("q"): lambda machine: machine.put(machine.number(1)),
    ord("r"): lambda machine: machine.put(machine.number(4)),
    0x94: _Machine.memoize,
    ord("h"): lambda machine: machine.get(machine.number(1)),
    ord("j"): lambda machine: machine.get(machine.number(4)),
    ord("Q"): lambda machine: machine.push(Persistent(machine.pop())),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _Machine.make,
    0x81: _Machine.make,
    ord("b"): _Machine.set_state,
}
"""By instruction. What is not here either calls something, or has no place among tensors."""
