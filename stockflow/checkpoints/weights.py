"""Weights of a checkpoint: its tensors, read from those of its files that are the truth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from stockflow.checkpoints.files.candidates import (
    DIFFUSION_STEM,
    OPEN_CLIP_STEM,
    SINGLE_FILE,
    SUFFIXES,
    WRITTEN_STEMS,
    Group,
    chosen_of,
    groups_of,
    written_stem,
)
from stockflow.checkpoints.files.frameworks import on_formats
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.files.index import lines_of, mismatch_of, missing_files, read_index
from stockflow.checkpoints.files.layout import Extent, HeaderCache, Homes, OnFile, Pieces, read_header
from stockflow.checkpoints.heads import aliases_of
from stockflow.errors import CheckpointError, NotFoundError
from stockflow.storage import Stamp, Store
from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some
from stockflow.text.remarks import Remark, Severity
from stockflow.text.sizes import are, counted, gb
from stockflow.text.strictjson import shown

NUM_HEADER_READERS = 16
NUM_NAMED = 3
MAX_COMPARED, COMPARED_BYTES = 64, 4096
"""Tensors, over all the depth, and bytes of each that are compared where two sets of weights have equal headers."""
TWO_SETS = "two-sets-of-weights"
MAX_TENSORS = 10_000
"""names that one remark holds"""

IsSettled = Callable[[str], bool]
"""Whether a recipe's rules say of a tensor that this checkpoint need not hold it."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Where weights are read from, and how."""

    store: Store
    listing: Mapping[str, Stamp]
    config: Mapping[str, object] | None
    cache: HeaderCache
    on_file: OnFile
    is_settled: IsSettled

    @property
    def where(self) -> str:
        """What it is called in messages."""
        return self.store.where()


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a checkpoint and where they lie."""

    specs: Mapping[str, TensorSpec]
    extents: Mapping[str, Extent]
    files: Mapping[str, Stamp]
    """the files they lie in, and the index that was read"""
    remarks: tuple[Remark, ...] = ()
    joined: Mapping[str, Pieces] = field(default_factory=dict)
    """the tensors that lie in several runs of bytes"""

    @property
    def in_one_run(self) -> "Weights":
        """The same without tensors that lie in several runs."""
        if not self.joined:
            return self
        return replace(self, specs={name: spec for name, spec in self.specs.items() if name not in self.joined})


def read_weights(folder: Folder, group: Group | None, of_modules: Sequence[str]) -> Weights:
    """Return the tensors of a model.

    Args:
        folder: where they lie.
        group: its files, chosen by their names; None: it has none of its own.
        of_modules: keys of the weights of its modules, in subfolders.

    Raises:
        CheckpointError: headers or index are malformed, or files are missing.
    """
    if group is None:
        return _read(folder, of_modules)
    weights = _read_group(folder, group)
    if group.index not in weights.files and not group.single:
        group = replace(group, index="")
    weights = replace(weights, remarks=(*_on_choice(folder, group), *weights.remarks))
    return _joined(weights, _read(folder, of_modules)) if of_modules else weights


def _joined(one: Weights, other: Weights) -> Weights:
    return Weights(
        {**one.specs, **other.specs},
        {**one.extents, **other.extents},
        {**one.files, **other.files},
        (*one.remarks, *other.remarks),
    )


def _read_group(folder: Folder, group: Group) -> Weights:
    homes = read_index(folder.store, group.index, folder.cache) if group.index else dict[str, str]()
    if not group.single or group.single in homes.values():
        return _sharded(folder, group, homes)
    if not homes and not group.complete:
        return _read(folder, [group.single])
    return _true_one(folder, group, homes)


def _read(folder: Folder, files: Sequence[str], homes: Homes | None = None) -> Weights:
    read = partial(read_header, folder.store, cache=folder.cache, on_file=folder.on_file, is_listed=homes is not None)
    with ThreadPoolExecutor(NUM_HEADER_READERS) as pool:
        found = dict(zip(files, pool.map(read, files), strict=True))
    headers = {file: contents.tensors for file, (contents, _) in found.items()}
    others = [name for contents, _ in found.values() for name in contents.others]
    layout = folder.cache.collect(folder.where, headers, homes or {})
    formats = {contents.format for contents, _ in found.values()}
    remarks = [
        *_on_doubled(folder, layout.doubled),
        *others_remark(folder, others),
        *on_formats(folder.where, formats, layout.specs),
    ]
    return Weights(layout.specs, layout.extents, {file: stamp for file, (_, stamp) in found.items()}, tuple(remarks))


def _sharded(folder: Folder, group: Group, homes: Homes) -> Weights:
    if not homes:
        return _read(folder, group.complete)
    missing = missing_files(homes, folder.listing)
    if _lost(folder, homes, missing) and (numbered := _set_beside(group, homes)):
        whole = _read(folder, numbered)
        return _with(whole, _on_stale_index(folder, group, homes, whole, missing, numbered))
    _refuse_missing(folder, group, homes, missing)
    weights = _read(folder, sorted({*homes.values()}.difference(missing)), homes)
    return replace(
        weights,
        files={**weights.files, group.index: folder.listing[group.index]},
        remarks=(*weights.remarks, *_on_index(folder, group.index, homes, weights)),
    )


def _true_one(folder: Folder, group: Group, homes: Homes) -> Weights:
    """Return the weights of one of a single file and shards, both there; a refusal where nothing tells them apart."""
    single = _read(folder, [group.single])
    missing = missing_files(homes, folder.listing)
    if missing and not _set_beside(group, homes):
        return _with(single, _on_stale_index(folder, group, homes, single, missing, [group.single]))
    if missing:
        group, homes = replace(group, index=""), {}
    sharded = _sharded(folder, group, homes)
    others = in_a_line(group.index) if group.index else f"the {len(group.complete)} numbered files"
    if _is_hollow(single, sharded):
        text = f"{folder.where}/{in_a_line(group.single)} has tensors of no elements where the shards have some: "
        return _with(sharded, chosen(folder, f"{text}a stray placeholder; {others} is read", "warning"))
    if _is_hollow(sharded, single):
        text = f"{folder.where}: the shards have tensors of no elements where {in_a_line(group.single)} has some"
        return _with(single, chosen(folder, f"{text}; that file is read", "warning"))
    if single.specs != sharded.specs:
        return _with(single, _ambiguity(folder, group, others, single, sharded, _difference(single, sharded)))
    if name := _first_difference(folder.store, single, sharded):
        why = f"names, shapes and dtypes are equal, and the numbers of {shown(name)} are not"
        return _with(single, _ambiguity(folder, group, others, single, sharded, why))
    text = f"{folder.where}/{in_a_line(group.single)} and {others} hold the same, wherever they were looked at"
    return _with(single, chosen(folder, f"{text}: the former is read", "warning"))


def _with(weights: Weights, remark: Remark) -> Weights:
    return replace(weights, remarks=(*weights.remarks, remark))


def _first_difference(store: Store, one: Weights, other: Weights) -> str | None:
    """Return a tensor whose bytes differ in two sets of weights of equal headers; None: no range that was looked at."""
    named = [spec for spec in one.specs.values() if spec.num_bytes]
    looked_at = named[:: -(-len(named) // MAX_COMPARED) or 1]

    def differs(spec: TensorSpec) -> bool:
        return _middle(store, one, spec) != _middle(store, other, spec)

    with ThreadPoolExecutor(NUM_HEADER_READERS) as pool:
        return next(
            (spec.name for spec, is_other in zip(looked_at, pool.map(differs, looked_at), strict=True) if is_other),
            None,
        )


def _middle(store: Store, weights: Weights, spec: TensorSpec) -> bytes:
    extent, size = weights.extents[spec.name], min(spec.num_bytes, COMPARED_BYTES)
    payload = bytearray(size)
    start = extent.start + (spec.num_bytes - size) // 2
    store.read_into(extent.file, start, memoryview(payload), weights.files[extent.file])
    return bytes(payload)


def _is_hollow(one: Weights, other: Weights) -> bool:
    """Whether ``other`` has all tensors of ``one``, and elements where ``one`` has none."""
    empty = [name for name, spec in one.specs.items() if not spec.num_elems]
    return one.specs.keys() <= other.specs.keys() and any(other.specs[name].num_elems for name in empty)


def _set_beside(group: Group, homes: Homes) -> Sequence[str]:
    """Return the numbered files that are all there and of which an index names none."""
    return () if {*group.complete} & {*homes.values()} else group.complete


def _lost(folder: Folder, homes: Homes, missing: Sequence[str]) -> list[str]:
    """Return the tensors of files that are missing which no rule settles."""
    gone = frozenset(missing)
    return [name for name, file in homes.items() if file in gone and not folder.is_settled(name)] if gone else []


def _refuse_missing(folder: Folder, group: Group, homes: Homes, missing: Sequence[str]) -> None:
    """Refuse files that an index names and the folder does not have, unless rules settle all that they would hold."""
    if lost := _lost(folder, homes, missing):
        with suppress(NotFoundError):
            folder.store.read_head(missing[0], 1)  # says what it is if it is no plain file
        files = some(missing, NUM_NAMED, in_a_line)
        fetch = f"fetch {'it' if len(missing) == 1 else f'the {len(missing)} files'}"
        beside = _others_there(folder, group, homes)
        otherwise = f"{beside} remove the index; else {fetch}" if beside else ""
        raise CheckpointError(
            f"{folder.where}: the index names {files}, which {are(len(missing))} not there; with "
            f"{counted(len(lost), 'tensor')}, such as {shown(lost[0])}. "
            f"{otherwise or f'The download or copy did not finish: {fetch}'}"
        )


def _others_there(folder: Folder, group: Group, homes: Homes) -> str:
    """Return which weights lie beside an index that does not name them, and how they are read if they are the model."""
    named = {*homes.values()}
    numbered = [file for files in group.shards.values() for file in files.values() if file not in named]
    if numbered:
        them, they = some(numbered, NUM_NAMED, in_a_line), "it is" if len(numbered) == 1 else "they are"
        meant = f"if {they} the model, see that one whole set is there and"
        return f"{them} {are(len(numbered))} there, which it does not name: {meant}"
    groups = groups_of([key for key in folder.listing if "/" not in key])
    others = [each for each in groups if each.single not in {"", group.single, *named}]
    if other := chosen_of(others):
        return f"{other} is there, which it does not name: if that is the model, name {folder.where}/{other} or"
    return ""


_LIBRARIES = {DIFFUSION_STEM: "a part of a diffusers pipeline", OPEN_CLIP_STEM: "a model of open_clip"}


def _on_choice(folder: Folder, group: Group) -> Iterator[Remark]:
    """Yield why files are read that no loader would find, or under another name than an output has."""
    is_named = folder.store.only
    stem = written_stem([str(group)])
    as_usual = f"a merge is written as {SINGLE_FILE}, whatever else its loader asks for"
    is_renamed = not group.has_usual_stem and not folder.config and stem == WRITTEN_STEMS[0]
    if not group.has_usual_stem and not is_named:
        renamed = f"; {as_usual}" if is_renamed else ""
        yield chosen(folder, f"{folder.where} has no other weights than {group}: they are read{renamed}", "note")
    elif is_renamed:
        yield chosen(folder, f"{group} of {folder.where} is read, and {as_usual}", "note")
    if group.variant and not is_named:
        text = f"{folder.where} has its weights as the variant {shown(group.variant)} only: {group} is read"
        yield chosen(folder, text, "note")
    if group.suffix != SUFFIXES[0]:
        text = f"{folder.where} has its weights in pickles: {group} is read, and nothing that is in it is run"
        yield chosen(folder, f"{text}. A merge is written in safetensors", "note")
    if stem != WRITTEN_STEMS[0]:
        of = _LIBRARIES.get(stem, "in the layout of Mistral's own library")
        text = f"{folder.where} is {of}: {group} is read, and a merge that it gives names to is written as {stem}.*"
        yield chosen(folder, text, "note")
    if not group.single and not group.index:
        count = counted(len(group.complete), "numbered file")
        text = f"{folder.where} has {count} of weights and no index that names them: all of them are read"
        yield chosen(folder, f"{text}, and no tensor is in two", "note")


def _on_doubled(folder: Folder, doubled: Sequence[str]) -> Iterator[Remark]:
    if not doubled:
        return
    text = (
        f"{folder.where}: {counted(len(doubled), 'tensor')} {are(len(doubled))} in several files, such as "
        f"{shown(doubled[0])}; read from the one that the index names"
    )
    yield Remark("doubled-tensors", text, models=(folder.where,), tensors=tuple(doubled))


def others_remark(folder: Folder, others: Sequence[str]) -> Iterator[Remark]:
    """Yield what files of weights hold that is no tensor of the model, and is in no output."""
    if others:
        text = (
            f"{folder.where}: its files hold {counted(len(others), 'value')} that {are(len(others))} no tensor of the "
            f"model, such as {shown(others[0])}: left out"
        )
        yield Remark("no-tensors", text, "note", (folder.where,), tuple(others[:MAX_TENSORS]))


def _on_index(folder: Folder, index: str, homes: Homes, weights: Weights) -> Iterator[Remark]:
    """Yield what index and headers do not agree on, and no rule settles: other names of a tensor, or a refusal."""
    found = folder.cache.found(mismatch_of, homes, weights.extents)
    if not found:
        return
    names = [name for name in found.absent if name not in weights.specs]
    aliases = aliases_of(names, weights.specs, folder.config)
    if aliases:
        name, stored = next(iter(aliases.items()))
        text = (
            f"{folder.where}: the index lists {counted(len(aliases), 'name')} of tied tensors that are stored under "
            f"another, such as {shown(name)} for {shown(stored)}"
        )
        yield Remark("tied-names", text, "note", (folder.where,), tuple(aliases), aliases)
    open_ones = found.without(lambda name: name in aliases or folder.is_settled(name))
    if open_ones:
        count, lines = counted(len(open_ones.names), "tensor"), "\n  ".join(lines_of(open_ones))
        text = (
            f"{folder.where}: {in_a_line(index)} and the files disagree on {count}:\n  {lines}\n  Fetch index and "
            "files again from one place, or leave tensors out by rules with `action: skip`; accepted, what the files "
            "hold counts"
        )
        yield Remark("index-disagrees", text, "refusal", (folder.where,), open_ones.names)


def _on_stale_index(
    folder: Folder, group: Group, homes: Homes, found: Weights, missing: Sequence[str], files: Sequence[str]
) -> Remark:
    """Return what to say of an index whose files are not all there, beside others that are a whole set.

    Raises:
        CheckpointError: these do not have all that the index lists.
    """
    named = {*homes.values()}
    gone = f"{len(missing)} of {counted(len(named), 'file')} of {in_a_line(group.index)} {are(len(missing))} not there"
    absent = [name for name in homes if name not in found.specs and not folder.is_settled(name)]
    aliases = aliases_of(absent, found.specs, folder.config)
    lost = [name for name in absent if name not in aliases]
    one = len(files) == 1
    others = in_a_line(files[0]) if one else f"the {len(files)} numbered files such as {in_a_line(files[0])}"
    if lost:
        raise CheckpointError(
            f"{folder.where} holds no whole model: {gone}, such as {in_a_line(missing[0])}, and {others} "
            f"{'lacks' if one else 'lack'} {counted(len(lost), 'tensor')} that the index lists, such as "
            f"{shown(lost[0])}. Fetch the files, or remove the index if {others} {are(len(files))} the model"
        )
    text = f"{folder.where}: {gone}, and {others} {'has' if one else 'have'} every tensor it lists"
    left = some(sorted(named.difference(missing)), NUM_NAMED, in_a_line)
    if left and not one:
        text += (
            f", beside {left}, which it names. Fetch the missing files, or remove the index and what is left of them"
        )
        text += "; accepted, the whole set is read"
        return Remark(TWO_SETS, text, "refusal", (folder.where,))
    return chosen(folder, f"{text}: {'that file is' if one else 'they are'} read", "warning")


def _ambiguity(folder: Folder, group: Group, others: str, single: Weights, sharded: Weights, why: str) -> Remark:
    first = in_a_line(group.single)
    names = f" by naming {folder.where}/{first} or {folder.where}/{others}" if group.index else ""
    how = f", or choose{names}" if names else ""
    text = (
        f"{folder.where} holds two sets of weights, {first} ({_amounts(single)}) and {others} ({_amounts(sharded)}), "
        f"and nothing tells which is meant: {why}. Remove the one that is not{how}; "
        f"accepted, {first} is read, as loaders do"
    )
    return Remark(TWO_SETS, text, "refusal", (folder.where,))


def _amounts(weights: Weights) -> str:
    size = sum(spec.num_bytes for spec in weights.specs.values())
    return f"{counted(len(weights.specs), 'tensor')}, {gb(size)}"


def _difference(single: Weights, sharded: Weights) -> str:
    """Return in what the headers of two sets of weights differ, in words."""
    one, two = single.specs, sharded.specs
    kinds = (
        ("only in the first", [name for name in one if name not in two]),
        ("only in the second", [name for name in two if name not in one]),
        ("of another shape or dtype", [name for name in one if name in two and one[name] != two[name]]),
    )
    said = [f"{counted(len(names), 'tensor')} {what}, such as {shown(names[0])}" for what, names in kinds if names]
    return "; ".join(said)


def chosen(folder: Folder, text: str, severity: Severity) -> Remark:
    """Return what is said of the files that are read."""
    return Remark("weights-chosen", text, severity, (folder.where,))
