"""Documents: YAML read strictly and within bounds, plain values and the place in the file of every one of them.

Works on parser events, so that nothing is expanded, nested or built before its bound is checked.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol, cast

import yaml

from stockflow.errors import RecipeError
from stockflow.recipe.wording import NOT_YET, each_hint_once, listed, named, shown
from stockflow.recipe.yaml_mistakes import explained, is_about_tab, wide_space
from stockflow.text.remarks import Remark

MAX_NODES = 20_000
"""Values in one document, aliases counted as often as they are used; some checks compare all with all."""
MAX_TEXT_CHARS = 4096
"""A path on Linux is no longer."""
MAX_NUMBER_CHARS = 400
"""More than the largest float has digits; ``1:1:...`` is a number of base 60 and takes minutes to build."""
MAX_DEPTH = 64
MAX_REPORTED = 20

Scalar = bool | int | float | str | None
Path = tuple[str | int, ...]
"""Keys and list indices from the top of the document."""
Problem = tuple[Path, str]
"""What makes a recipe unusable."""
Mark = tuple[int, int]
"""Line and column, from 1."""

_MERGE = "<<"
_QUOTED_OR_TAB = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|\t""")
_TAG_PREFIX = "tag:yaml.org,2002:"


class _Mark(Protocol):
    line: int
    column: int


_Event = yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent | yaml.AliasEvent


@dataclass(frozen=True, slots=True)
class Node:
    """One value; an alias is the same node again."""

    scalar: Scalar = None
    children: Mapping[str | int, tuple[Mark, "Node"]] = field(default_factory=dict)
    is_list: bool = False
    is_mapping: bool = False
    num_nodes: int = 1
    depth: int = 1

    def plain(self) -> object:
        """Return the value as lists, dicts and scalars, none of them shared."""
        if self.is_list:
            return [child.plain() for _, child in self.children.values()]
        if self.is_mapping:
            return {key: child.plain() for key, (_, child) in self.children.items()}
        return self.scalar


@dataclass(frozen=True, slots=True)
class Notice:
    """Something in a recipe that has no effect, or another than it seems."""

    path: Path
    code: str
    text: str
    models: tuple[str, ...] = ()
    """locations, without secrets"""


@dataclass(frozen=True, slots=True)
class Repetition:
    """A key that a mapping has twice."""

    name: str
    first: Mark
    again: Mark
    is_equal: bool
    """whether it has the same value both times"""


@dataclass(frozen=True, slots=True)
class Document:
    """A mapping read from YAML, with places."""

    source: str
    root: Node
    repetitions: Sequence[Repetition] = ()

    def plain(self) -> dict[str, object]:
        """Return the document as plain values."""
        return {str(key): child.plain() for key, (_, child) in self.root.children.items()}

    def remarks(self, notices: Iterable[Notice]) -> tuple[Remark, ...]:
        """Return notices as plans tell them, in file order, with those of keys that are there twice with one value."""
        found = {(*self._locate(each.path), each.code, each.text, each.models) for each in notices}
        for key in self.repetitions:
            if key.is_equal:
                text = f"`{named(key.name)}` is here again, with the value it has on line {key.first[0]}; keep one"
                found.add((key.again, named(key.name), "repeated-key", text, ()))
        return tuple(
            Remark(code, text, models=models, values={"key": name}, place=self._place(mark))
            for mark, name, code, text, models in sorted(found)
        )

    def problems(self, found: Iterable[Problem]) -> list[tuple[str, str]]:
        """Return problems as place and text, in file order, with those of keys that are there with two values."""
        located = {(*self._locate(path), text) for path, text in found}
        for key in self.repetitions:
            if not key.is_equal:
                text = f"the key `{named(key.name)}` is here again, with another value than on line {key.first[0]}"
                located.add((key.again, "", f"{text}; keep one"))
        ordered = sorted(located)
        texts = each_hint_once(text for _, _, text in ordered)
        return [
            (self._place(mark), f"{name + ': ' if name else ''}{text}")
            for (mark, name, _), text in zip(ordered, texts, strict=True)
        ]

    def filters(self) -> dict[str, str]:
        """Return the first place of each text that is the value of a key `filter`."""
        found: dict[str, Mark] = {}
        waiting = [self.root]
        while waiting:
            for key, (mark, child) in waiting.pop().children.items():
                waiting.append(child)
                if key == "filter" and isinstance(child.scalar, str):
                    found[child.scalar] = min(found.get(child.scalar, mark), mark)
        return {text: self._place(mark) for text, mark in sorted(found.items(), key=itemgetter(1))}

    def line(self, path: Path) -> int:
        """Return the line of the nearest value that exists on the way to ``path``."""
        return self._locate(path)[0][0]

    def _place(self, mark: Mark) -> str:
        return f"{self.source}:{mark[0]}:{mark[1]}"

    def _locate(self, path: Path) -> tuple[Mark, str]:
        """Return the place and the name of the nearest value that exists on the way to ``path``."""
        mark, node, name = (1, 1), self.root, ""
        for index, step in enumerate(path):
            if _is_left_out(node, path[index:]):
                continue
            if step not in node.children:
                break
            mark, node = node.children[step]
            name += f"[{step}]" if isinstance(step, int) else f".{named(step)}"
        return mark, name.removeprefix(".")


def _is_left_out(node: Node, path: Path) -> bool:
    """Return whether the first step is one that short forms do without.

    A lone {filter, value} is read as a list of one, a value as one over the layers, and both as both.
    """
    step = path[0]
    if isinstance(step, int) and node.is_list:
        return path[1:2] == ("value",) and not any(child.is_mapping for _, child in node.children.values())
    return isinstance(step, int) or (step == "value" and not node.is_mapping)


def read_yaml(text: str, source: str) -> Document:
    """Return the single mapping that ``text`` holds.

    Raises:
        RecipeError: not YAML, not one mapping, a non-text key, a tag, too deep or too large.
    """
    loader: yaml.SafeLoader | None = None
    if spot := wide_space(text):
        place = f"{source}:{spot[0]}:{spot[1]}"
        raise RecipeError(f"{place}: a space that is none to YAML, such as web pages have; type it anew")
    try:
        loader = yaml.SafeLoader(text)
        composer = _Composer(loader, source)
        root = composer.document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise RecipeError(
            f"{source}:{line}:{column}: {chr(error.character)!r} is not allowed in YAML; remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        if is_about_tab(error) and (spaced := _with_spaces(text)) != text:
            return read_yaml(spaced, source)
        (line, column), mistake = explained(error, text)
        raise RecipeError(f"{source}:{line}:{column}: not valid YAML: {mistake}") from None
    except (ValueError, OverflowError) as error:
        # PyYAML 6.0.3 leaks these for escapes and version numbers out of range.
        if isinstance(error, RecipeError):
            raise
        mark = loader.get_mark() if loader else None
        raise RecipeError(f"{_place(source, mark)}: not valid YAML: {error}") from None
    if not root.is_mapping:
        found = "a list" if root.is_list else shown(root.scalar)
        raise RecipeError(
            f"{source}:1:1: expected a mapping with `merge_method` and `models`, found {found}; "
            "write `key: value` lines"
        )
    return Document(source, root, tuple(composer.repetitions))


class _Composer:
    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self._loader = loader
        self._source = source
        self._anchors: dict[str, Node] = {}
        self._num_nodes = 0
        self.repetitions: list[Repetition] = []

    def document(self) -> Node:
        """Return the only document; empty ones beside it mean nothing."""
        self._next()
        found: list[tuple[_Event, Node]] = []
        while not self._loader.check_event(yaml.StreamEndEvent):
            start = self._next()
            self._anchors.clear()
            found.append((start, self._node(self._next(), depth=1)))
            self._next()
        full = [(start, node) for start, node in found if node != Node()]
        if len(full) > 1:
            raise self._error(full[1][0], _stages([node for _, node in full]))
        return full[0][1] if full else Node()

    def _next(self) -> _Event:
        return cast(_Event, self._loader.get_event())  # type: ignore[no-untyped-call]

    def _node(self, event: _Event, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._error(event, f"the alias *{named(str(event.anchor))} has no anchor before it; define it")
            node = self._anchors[event.anchor]
            return self._bounded(event, node, depth, node.num_nodes)
        if event.tag is not None:
            raise self._error(event, f"the tag {shown(event.tag)} is not accepted; write the plain value")
        node = self._bounded(event, self._fresh(event, depth), depth, 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _fresh(self, event: _Event, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._error(event, f"nested deeper than {MAX_DEPTH} levels; a recipe needs less than ten")
        children: dict[str | int, tuple[Mark, Node]] = {}
        if isinstance(event, yaml.SequenceStartEvent):
            while not self._loader.check_event(yaml.SequenceEndEvent):
                item = self._next()
                children[len(children)] = (_mark(item), self._node(item, depth + 1))
        elif isinstance(event, yaml.MappingStartEvent):
            while not self._loader.check_event(yaml.MappingEndEvent):
                start = self._next()
                key = self._key(start, depth)
                value = self._node(self._next(), depth + 1)
                if key in children:
                    first, given = children[key]
                    self.repetitions.append(Repetition(key, first, _mark(start), value.plain() == given.plain()))
                else:
                    children[key] = (_mark(start), value)
            self._merge(event, children)
        elif isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar(event))
        self._next()
        nodes = [child for _, child in children.values()]
        return Node(
            children=children,
            is_list=isinstance(event, yaml.SequenceStartEvent),
            is_mapping=isinstance(event, yaml.MappingStartEvent),
            num_nodes=1 + sum(node.num_nodes for node in nodes),
            depth=1 + max((node.depth for node in nodes), default=0),
        )

    def _key(self, event: _Event, depth: int) -> str:
        node = self._node(event, depth + 1)
        if not isinstance(node.scalar, str):
            found = shown(node.plain())
            raise self._error(event, f"expected a text as key, found {found}; put it in quotes")
        return node.scalar

    def _merge(self, event: _Event, children: dict[str | int, tuple[Mark, Node]]) -> None:
        """Replace ``<<`` by the keys of its mapping, or of each in its list, that are not there already."""
        if _MERGE not in children:
            return
        _, given = children.pop(_MERGE)
        for node in [child for _, child in given.children.values()] if given.is_list else [given]:
            if not node.is_mapping:
                raise self._error(event, f"expected a mapping after `{_MERGE}`, found {shown(node.plain())}")
            for key, child in node.children.items():
                children.setdefault(key, child)

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        text: str = event.value
        if len(text) > MAX_TEXT_CHARS:
            raise self._error(event, f"a text of {len(text):,} characters; at most {MAX_TEXT_CHARS:,} are accepted")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise self._error(event, f"{shown(text)} is not valid Unicode; remove the \\u escape")
        tag = str(self._loader.resolve(yaml.ScalarNode, text, event.implicit))  # type: ignore[no-untyped-call]
        if tag.endswith((":int", ":float")) and len(text) > MAX_NUMBER_CHARS:
            raise self._error(event, f"a number of {len(text):,} characters; put it in quotes if it is a text")
        node = yaml.ScalarNode(tag, text)
        match tag.removeprefix(_TAG_PREFIX):
            case "null":
                return None
            case "bool":
                return bool(self._loader.construct_yaml_bool(node))
            case "int":
                return int(self._loader.construct_yaml_int(node))
            case "float":
                return float(self._loader.construct_yaml_float(node))
        return text

    def _bounded(self, event: _Event, node: Node, depth: int, num_new: int) -> Node:
        self._num_nodes += num_new
        if self._num_nodes > MAX_NODES:
            raise self._error(event, f"more than {MAX_NODES:,} values, aliases expanded; shorten it")
        if depth + node.depth - 1 > MAX_DEPTH:
            raise self._error(event, f"nested deeper than {MAX_DEPTH} levels; a recipe needs less than ten")
        return node

    def _error(self, event: _Event, text: str) -> RecipeError:
        return RecipeError(f"{_place(self._source, event.start_mark)}: {text}")


def _with_spaces(text: str) -> str:
    """Replace each tab that only separates by a space, so that places stay; one that indents or is quoted is kept."""
    return "\n".join(map(_spaced, text.split("\n")))


def _spaced(line: str) -> str:
    content = line.lstrip()
    indent = line[: len(line) - len(content)]
    if not content or content.startswith("#"):
        indent = indent.replace("\t", " ")
    return indent + _QUOTED_OR_TAB.sub(lambda found: " " if found[0] == "\t" else found[0], content)


def _stages(documents: Sequence[Node]) -> str:
    """Say what a file of several documents is; a name is the key by which mergekit-multi lets others use a result."""
    names = [f"`{named(str(node.children['name'][1].scalar))}`" for node in documents if "name" in node.children]
    nameless = len(documents) - len(names)
    unnamed = [f"{nameless} without a name"] if nameless else []
    return (
        f"a second document starts here, of {len(documents)}: {listed([*names, *unnamed])}; merges in stages are "
        f"mergekit-multi's, and this {NOT_YET}; write each into a file of its own, merge those first whose names "
        "others use as models, and write the folders of their outputs there"
    )


def _mark(event: _Event) -> Mark:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _place(source: str, mark: _Mark | None) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else f"{source}:1:1"
