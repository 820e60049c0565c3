"""What to write in place of a filter that no name contains: what is for about as much as was meant, or nothing."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from stockflow.checkpoints.naming import Projection, holds_fused_experts, projection_of
from stockflow.planning.looks.proposal import Proposal
from stockflow.text.examples import some
from stockflow.text.strictjson import shown

MEANS = "did you mean"
"""Before what was meant, where that is known."""
MOST_FILTERS = 20
"""For which something is looked for."""
_LEAST_ALIKE = 0.7
_LEAST_BEGINNING = 0.5
"""Share of a filter that is worth to be told."""
_MARKS = frozenset("*\\|^$[](")
_ANY = re.compile(r"(?:\\[dw]|\[[^\]]*\]|(?<!\\)\.)[*+]\??|\\d")
"""What stands for any text in a pattern, beside ``*``."""
_DIGITS = re.compile(r"\[(\d)-(\d)\](?![*+])")
_WHOLE_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_TOGETHER = "gate_up_proj"
_ONE_EXPERT = re.compile(r"experts\.\d+")


def nearest(texts: Iterable[str], proposal: Proposal) -> dict[str, str]:
    """Return, for filters that no name contains, what is said of each: what to write instead."""
    found: dict[str, str] = {}
    windows: dict[int, dict[str, None]] = {}
    for text in texts:
        found[text] = ""
        if len(found) > MOST_FILTERS:
            continue
        means = "a filter is a part of a name, no pattern; `*` alone is all"
        found[text] = f" ({means})" if _MARKS & set(text) else ""
        found[text] += f"; {_advice(text, proposal, windows)}"
    return found


def _advice(text: str, proposal: Proposal, windows: dict[int, dict[str, None]]) -> str:
    if separate := _of_experts(text, proposal):
        return separate
    written = proposal.filtered
    meant = [_as_spelled(each, written) or _misspelled(each, written, windows) for each in _alternatives(text)]
    meant = list(dict.fromkeys(filter(None, meant)))
    if meant:
        return f"{MEANS} {'' if len(meant) == 1 else 'a filter each for '}{some(meant)}?"
    if beginning := _beginning(text, written):
        name = next(lines_with(beginning, written))
        return f"names go along with it up to {shown(beginning)}, as {shown(name)} does: correct it, or remove it"
    return "correct it, or remove it"


def _of_experts(text: str, proposal: Proposal) -> str:
    """Return what makes a filter act that is for experts as they are stored elsewhere: one by one, or together."""
    asked = text.strip(".")
    parts = (job for job in proposal.jobs if job.whole and asked in job.output.name)
    fused = (job for job in proposal.jobs if holds_fused_experts(job.stored_name, len(job.reading.shape)))
    if job := next(parts, None) or (_ONE_EXPERT.search(asked) and next(fused, None)):
        return (
            f"all experts of a layer are one tensor here, {shown(job.stored_name)}: with `stockflow: {{experts: "
            "separate}` they are written one by one, and filters see each"
        )
    if asked.endswith(_TOGETHER) and any(asked in f"{each.stem}.{_TOGETHER}" for each in _single_experts(proposal)):
        return "experts are stored one by one here: with `stockflow: {experts: fused}` those of a layer are one tensor"
    return ""


def _single_experts(proposal: Proposal) -> Iterator[Projection]:
    return (found for name in proposal.filtered.split("\n") if (found := projection_of(name)))


def _alternatives(text: str) -> list[str]:
    """Return what a text means that names several things: ``a|b``, ``a,b``, ``layers.[0-3].``."""
    found = re.split(r"[|,]", text.strip("^$() "))
    if (digits := _DIGITS.search(text)) and len(found) == 1:
        numbers = range(int(digits[1]), int(digits[2]) + 1)
        found = [found[0].replace(digits[0], str(number)) for number in numbers]
    return found


def _as_spelled(text: str, written: str) -> str:
    """Return the part of names that is for just the tensors which a text with capitals, escapes or wildcards means."""
    pieces = [
        piece for piece in re.sub(r"\\(.)", r"\1", _ANY.sub("*", text.strip("^$() "))).lower().split("*") if piece
    ]
    if not pieces:
        return "*" if "*" in text else ""
    if not any(len(piece.strip(".")) > 1 for piece in pieces):
        return ""
    names = {name for name in lines_with(pieces[0], written.lower()) if _are_in_order(pieces, name)}
    for piece in sorted(pieces, key=len, reverse=True):
        if names and set(lines_with(piece, written.lower())) == names:
            at = written.lower().find(piece)
            return written[at : at + len(piece)]
    return ""


def _are_in_order(pieces: Sequence[str], name: str) -> bool:
    at = 0
    for piece in pieces:
        at = name.find(piece, at) + len(piece)
        if at < len(piece):
            return False
    return True


def _misspelled(text: str, written: str, windows: dict[int, dict[str, None]]) -> str:
    """Return the part of names, of as many words with the same numbers, of which a text seems to be a slip."""
    core = text.strip(".")
    num_words = core.count(".") + 1
    if num_words not in windows:
        windows[num_words] = dict.fromkeys(_windows(num_words, written))
    asked = _WHOLE_NUMBER.sub("#", core)
    swapped = [each for each in _swapped(asked) if each in windows[num_words]]
    for near in swapped or get_close_matches(asked, windows[num_words], cutoff=_LEAST_ALIKE):
        if not _is_slip(asked, near):
            continue
        numbers = iter(_WHOLE_NUMBER.findall(core))
        found = re.sub("#", lambda _: next(numbers), near)  # noqa: B023
        begins, ends = text[: text.index(core)], text[text.index(core) + len(core) :]
        for candidate in (begins + found + ends, found):
            if candidate in written:
                return candidate
    return ""


def _swapped(text: str) -> Iterator[str]:
    """Yield a text with two neighbours in each other's place: of short words much, as `mpl` is of `mlp`."""
    for at in range(len(text) - 1):
        yield text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _windows(num_words: int, written: str) -> Iterator[str]:
    for name in dict.fromkeys(_WHOLE_NUMBER.sub("#", name) for name in written.split("\n")):
        words = name.split(".")
        for first in range(len(words) - num_words + 1):
            yield ".".join(words[first : first + num_words])


def _is_slip(text: str, near: str) -> bool:
    """Return whether two texts are one with a slip: not so where numbers or first letters tell things apart."""
    pairs = list(zip(text.split("."), near.split("."), strict=True))
    are_as_long = all(abs(len(one) - len(other)) <= max(1, len(one) // 4) for one, other in pairs)
    begin_alike = all(one[:1] == other[:1] for one, other in pairs)
    return are_as_long and begin_alike and re.findall(r"\d+|#", text) == re.findall(r"\d+|#", near)


def _beginning(text: str, written: str) -> str:
    """Return as much of a text as names contain, nothing if that is little."""
    length = next((length for length in range(len(text), 0, -1) if text[:length] in written), 0)
    return text[:length] if length >= _LEAST_BEGINNING * len(text) else ""


def lines_with(text: str, written: str) -> Iterator[str]:
    """Yield the lines that contain a text, one after the other."""
    at = written.find(text)
    while at >= 0:
        end = written.find("\n", at)
        end = len(written) if end < 0 else end
        yield written[written.rfind("\n", 0, at) + 1 : end]
        at = written.find(text, end)
