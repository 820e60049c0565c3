"""Weights of a folder: which of its files hold the model, told from their names.

Loaders ask for ``model.safetensors`` and then for the index of shards, diffusers for ``diffusion_pytorch_model`` in the
place of ``model``, open_clip for ``open_clip_model.safetensors`` alone; where there is none of these, for
``pytorch_model.bin`` and its index. What loaders would not find without help is read where only one thing can be meant:
numbered shards without an index, a variant (``model.fp16.safetensors``), or the only weights there are.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from stockflow.text.escaping import in_a_line

DIFFUSION_STEM = "diffusion_pytorch_model"
OPEN_CLIP_STEM = "open_clip_model"
MISTRAL_STEM = "consolidated"
"""In the layout of Mistral's own library, which is read where the file is named."""
SUFFIXES = (".safetensors", ".bin")
"""Of files of weights, in the order in which they are preferred."""
STEMS = {
    ".safetensors": ("model", DIFFUSION_STEM, OPEN_CLIP_STEM),
    ".bin": ("pytorch_model", DIFFUSION_STEM, "open_clip_pytorch_model"),
}
"""What the names of weights begin with, by how they end, in the order in which they are preferred."""
WRITTEN_STEMS = (*STEMS[SUFFIXES[0]], MISTRAL_STEM)
"""What names of an output's weights may begin with: the first, or what the donor's library asks for."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"

_SUFFIX = rf"({'|'.join(map(re.escape, SUFFIXES))})"
_INDEX = re.compile(rf"(.+){_SUFFIX}\.index(?:\.([\w-]+))?\.json")
_SHARD = re.compile(rf"(.+?)-(\d{{5,6}})-of-(\d{{5,6}})(?:\.([\w-]+))?{_SUFFIX}")
_SINGLE = re.compile(rf"(.+){_SUFFIX}")
_VARIANT = re.compile(rf"(model|pytorch_model|{DIFFUSION_STEM})\.([\w-]+)")
PRECISIONS = frozenset({"fp16", "bf16", "fp32", "f16", "f32", "float16", "float32", "bfloat16"})
"""Variants that are the plain weights in another dtype."""
_OF_A_RANK = re.compile(
    r"model(?P<of_many>\d{1,6})-mp(?P<total>\d{1,6})|consolidated\.(?P<of_meta>\d{2})"
    r"|(?:.+[-_.])?(?:rank|[mt]p(?:[-_]?rank)?)[-_]?(?P<rank>\d{1,6})(?:[-_.].+)?"
)
"""DeepSeek's ``model0-mp8``, Meta's ``consolidated.00``, Megatron's ``mp_rank_00``, vLLM's ``model-rank-0-part-0``."""
_OF_A_SAVER = re.compile(r"shard-(\d+)-model")
_NUMBER = re.compile(r"\d+")
_OF_A_RUN = re.compile(r"(?i:.*(epoch|step|iter|checkpoint|ckpt|run|seed|fold|trial|v|version|rev)[-_.]?)")
"""What stands before a number that counts models, not parts of one."""
NO_MODEL = re.compile(
    r"(adapter_model|adapters?|pytorch_lora_weights|consolidated(\.\d+)?|(\w+_)?(optimizer|scheduler|states?)([-_]\w+)?"
    r"|optim|trainer|ema|random_states(_\d+)?|embeddings|learned_embeds|tokenizer|mm_projector|value_head|v_head)"
)
"""Beginnings of the names of weights that are no model, or one in a layout of its own."""


MOST_NAMED = 5


class Naming(NamedTuple):
    """What the name of a file of weights says."""

    stem: str
    variant: str
    """``fp16``; empty where there is none"""
    suffix: str
    number: int = 0
    """of a shard, from 1; 0: the file is all, or the index"""
    total: int = 0
    is_index: bool = False


@dataclass(slots=True)
class Group:
    """Files of one model: what they may be read from."""

    stem: str
    variant: str
    suffix: str
    single: str = ""
    index: str = ""
    shards: dict[int, dict[int, str]] = field(default_factory=dict)
    """by how many there should be, and by number"""

    @property
    def complete(self) -> tuple[str, ...]:
        """The numbered files, if they are all there and of one count."""
        whole = [files for total, files in self.shards.items() if _is_whole(files, total)]
        return tuple(name for _, name in sorted(whole[0].items())) if len(whole) == 1 else ()

    @property
    def is_readable(self) -> bool:
        """Whether there is something to read; with an index the headers will tell."""
        return bool(self.single or self.index or self.complete)

    @property
    def has_usual_stem(self) -> bool:
        """Whether its names begin as those of weights do."""
        return self.stem in STEMS[self.suffix]

    def __str__(self) -> str:
        """Return what it is called in a message."""
        return in_a_line(self.single or self.index or next(iter(next(iter(self.shards.values())).values())))


def naming_of(file: str) -> Naming | None:
    """Return what a name says; None if it is not that of weights or their index."""
    if match := _INDEX.fullmatch(file):
        stem, variant = _split(match[1])
        return Naming(stem, variant or match[3] or "", match[2], is_index=True)
    if match := _SHARD.fullmatch(file):
        stem, variant = _split(match[1])
        return Naming(stem, variant or match[4] or "", match[5], int(match[2]), int(match[3]))
    if match := _SINGLE.fullmatch(file):
        return Naming(*_split(match[1]), match[2])
    return None


def written_stem(files: Collection[str]) -> str:
    """Return what the names of a merge's weights begin with, where its donor is read from these files."""
    stems = {(said.suffix, said.stem) for file in files if (said := naming_of(file))}
    if (SUFFIXES[0], MISTRAL_STEM) in stems:
        return MISTRAL_STEM
    asked = (STEMS[suffix].index(stem) for suffix, stem in stems if stem in STEMS[suffix])
    return WRITTEN_STEMS[max(asked, default=0)]


def index_of(shard: str) -> str:
    """Return the name of the index that lists a shard of an output."""
    said = naming_of(shard)
    return f"{said.stem if said else WRITTEN_STEMS[0]}{SUFFIXES[0]}.index.json"


def groups_of(names: Collection[str], only: str = "") -> list[Group]:
    """Return the weights of a folder, those first that loaders would find.

    Args:
        names: of its files; of what may be anything, such as ``.bin``, those are weights that are called so.
        only: the one file that was named: it is of weights whatever it is called.
    """
    groups: dict[tuple[str, str, str], Group] = {}
    for name in sorted(names):
        said = naming_of(name)
        if said is None or not (said.suffix == SUFFIXES[0] or said.stem in STEMS[said.suffix] or name == only):
            continue
        group = groups.setdefault(said[:3], Group(*said[:3]))
        if said.is_index:
            group.index = name
        elif said.number:
            group.shards.setdefault(said.total, {})[said.number] = name
        else:
            group.single = name
    return sorted(groups.values(), key=_preference)


def chosen_of(groups: Collection[Group], only: str = "") -> Group | None:
    """Return the weights that are meant: those a loader finds, else the only ones; None: it cannot be told.

    Args:
        groups: all weights of a folder, in order.
        only: the one file that was named; of several numbered ones it is no model.
    """
    parts = parts_of_ranks(groups)
    whole = [group for group in groups if group not in parts]
    if only:
        return _named(whole, only)
    readable = [group for group in whole if group.is_readable and not NO_MODEL.fullmatch(group.stem)]
    found = [group for group in readable if group.has_usual_stem and not group.variant]
    return found[0] if found else readable[0] if len(readable) == 1 else None


def parts_of_ranks(groups: Collection[Group]) -> list[Group]:
    """Return what each of several processes held of one model: parts of every matrix, numbered from 0."""
    found = {group.stem: match for group in groups if (match := _OF_A_RANK.fullmatch(group.stem))}
    ranks = {int(match["of_many"] or match["of_meta"] or match["rank"]) for match in found.values()}
    if len(ranks) > 1 and 0 in ranks:
        return [group for group in groups if group.stem in found]
    return [group for group in groups if group.stem in found and int(found[group.stem]["total"] or 1) > 1]


def parts_of_savers(groups: Collection[Group]) -> list[Group]:
    """Return what each of several processes wrote of one model: parts of rows that PyTorch's DCP did not join."""
    found = [group for group in groups if _OF_A_SAVER.fullmatch(group.stem)]
    return found if len(found) > 1 else []


def alike_but_for_a_number(file: str, files: Collection[str]) -> list[str]:
    """Return files of weights that are called as one of them is but for one number, from 0: itself among them.

    Empty where it is alone, or its number is that of a run's epoch, of a version and the like.
    """
    for match in _NUMBER.finditer(file):
        before, after = file[: match.start()], file[match.end() :]
        pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
        found = {int(each[1]): each[0] for name in files if (each := pattern.fullmatch(name))}
        if len(found) > 1 and sorted(found) == list(range(len(found))) and not _OF_A_RUN.fullmatch(before):
            return [found[number] for number in sorted(found)]
    return []


def _named(groups: Collection[Group], only: str) -> Group | None:
    for group in groups:
        if group.single == only:
            return Group(group.stem, group.variant, group.suffix, single=only)
        if group.index == only:
            return Group(group.stem, group.variant, group.suffix, index=only)
    return None


def lacking(groups: Collection[Group]) -> Iterator[str]:
    """Yield which numbered files are missing among weights without an index."""
    for group in groups:
        for total, files in group.shards.items():
            if _is_whole(files, total) or group.single or group.index:
                continue
            absent = list(islice((number for number in range(1, total + 1) if number not in files), MOST_NAMED))
            numbers = ", ".join(map(str, absent)) + (" ..." if total - len(files) > len(absent) else "")
            what = f"number {numbers} is" if len(absent) == total - len(files) == 1 else f"numbers {numbers} are"
            yield f"of {total} files like {in_a_line(min(files.values()))}, {what} missing"


def _is_whole(files: Mapping[int, str], total: int) -> bool:
    return len(files) == total and min(files) == 1 and max(files) == total


def _split(stem: str) -> tuple[str, str]:
    match = _VARIANT.fullmatch(stem)
    return (match[1], match[2]) if match else (stem, "")


def _preference(group: Group) -> tuple[bool, bool, int, int, str, str]:
    stems = STEMS[group.suffix]
    place = stems.index(group.stem) if group.has_usual_stem else len(stems)
    is_second = group.stem == stems[-1]  # open_clip's, beside which others are those that config.json is of
    return bool(group.variant), is_second, SUFFIXES.index(group.suffix), place, group.stem, group.variant
