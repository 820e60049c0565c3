"""What an audit found: which formula made a merge, what the wrong one did or would have done; the verdict, in words."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stockflow.checkpoints.opening import Checkpoint
from stockflow.insight.examiner import EXTRAPOLATED, MERGE_NONFINITE, NONFINITE, correct_formula
from stockflow.insight.formulas import WORDS
from stockflow.planning.plan import MergePlan
from stockflow.storage import StorageConfig, redact
from stockflow.text.escaping import in_a_line
from stockflow.text.sizes import counted, gb, share
from stockflow.text.tables import grid

FORMAT = "stockflow-audit-1"
METHOD = "model_stock"
WORTH_IT = 0.01
"""Error relative to the size of the update from which on merging again is called worth it."""
MAX_WORST = 10
MAX_REASONS = 6
MAX_NAMES = 5


@dataclass(frozen=True)
class Merge:
    """What is to be audited: how it should have been merged, and where the result is."""

    plan: MergePlan
    storage: StorageConfig
    merged_url: str | None = None
    merged: Checkpoint | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What was found; rows are plain, in the order of the plan."""

    merge: Merge
    rows: Sequence[dict[str, Any]]
    left_out: Mapping[str, str]
    """tensors that were not looked at, and why"""
    num_bytes_read: int
    seconds: float

    @property
    def num_tuned(self) -> int:
        """N, the number of tuned models."""
        return max(len(job.reading.operands) for job in self.merge.plan.jobs if job.result.method == METHOD) - 1

    @property
    def verdict(self) -> "Verdict":
        """Whether to merge again."""
        return judge(self)

    def facts(self) -> dict[str, Any]:
        """Return what `stockflow audit --json` prints."""
        return summary(self) | {"tensors": list(self.rows)}

    def __str__(self) -> str:
        return "\n".join(audit_lines(self))


@dataclass(frozen=True)
class Verdict:
    """Whether to merge again."""

    answer: str
    """``no``, ``hardly``, ``yes``, ``unrelated``, ``undecided`` (NaN or infinity in a model); without a merge to look
    at ``same`` for ``no``, and never ``unrelated``"""
    distance: float
    """of all tensors together: error relative to the size of the update"""
    share: float
    """of the parameters, in tensors that are not the correct merge"""
    stays: bool = False
    """whether the correct merge is the base: ``distance`` is then relative to the mean task vectors"""


def is_correct(row: Mapping[str, Any], *, extrapolates: bool) -> bool:
    """Return whether a tensor is what the recipe asks for, as far as its numbers tell."""
    return ("extrapolated" if extrapolates else "exact") in row["candidates"]


def judge(found: Audit) -> Verdict:
    """Return whether to merge again, from all tensors together."""
    return _judge_merge(found) if found.merge.merged else _judge_recipe(found)


def _judge_merge(found: Audit) -> Verdict:
    broken = [row for row in found.rows if MERGE_NONFINITE in row["flags"]]
    unknown = [row for row in found.rows if NONFINITE in row["flags"]]
    rows = [row for row in found.rows if row["match"] != "not_finite"]
    extrapolating = _extrapolating(found)
    wrong = [row for row in rows if not is_correct(row, extrapolates=row["name"] in extrapolating)]
    distance, stays = _relative(rows, [row["error"] for row in wrong])
    verdict = Verdict("no", distance, _num_elems([*wrong, *broken]) / max(_num_elems(found.rows), 1), stays)
    if _num_elems(row for row in rows if row["match"] == "none") > 0.5 * _num_elems(rows):
        return replace(verdict, answer="unrelated")
    # Where no tensor should have moved, any change is one too many.
    if broken or distance >= WORTH_IT or (wrong and stays):
        return replace(verdict, answer="yes")
    return replace(verdict, answer="hardly" if wrong else "undecided" if unknown else "no")


def _judge_recipe(found: Audit) -> Verdict:
    if found.num_tuned == 2:  # one formula; clamping, which is another matter, is not what the old one got wrong
        return Verdict("same", 0.0, 0.0)
    rows = [row for row in found.rows if row["match"] != "not_finite"]
    moved = [row for row in rows if row["old_error"]]
    distance, stays = _relative(rows, [row["old_error"] for row in moved])
    verdict = Verdict("same", distance, _num_elems(moved) / max(_num_elems(found.rows), 1), stays)
    if moved:
        return replace(verdict, answer="yes" if stays or distance >= WORTH_IT else "hardly")
    return verdict if len(rows) == len(found.rows) else replace(verdict, answer="undecided")


def _relative(rows: Sequence[Mapping[str, Any]], errors: Sequence[float | None]) -> tuple[float, bool]:
    """Return errors of tensors relative to the update of all; where none moves, to their mean task vectors."""
    update, mean = (math.hypot(*(row[column] or 0.0 for row in rows)) for column in ("update_norm", "mean_norm"))
    size = update or mean
    return (math.hypot(*(error or 0.0 for error in errors)) / size if size else 0.0), not update


def _num_elems(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(row["num_elems"] for row in rows)


def _extrapolating(found: Audit) -> frozenset[str]:
    """The tensors whose recipe asks to extrapolate."""
    jobs = found.merge.plan.jobs
    return frozenset(job.output.name for job in jobs if correct_formula(job) == EXTRAPOLATED)


def shares(found: Audit) -> dict[str, dict[str, float]]:
    """Return how many tensors and parameters carry each label."""
    labels: dict[str, dict[str, float]] = {}
    for row in found.rows:
        counts = labels.setdefault(str(row["match"]), {"tensors": 0, "num_elems": 0})
        counts["tensors"] += 1
        counts["num_elems"] += row["num_elems"]
    return dict(sorted(labels.items(), key=lambda item: -item[1]["num_elems"]))


def summary(found: Audit) -> dict[str, Any]:
    """Return what goes before the rows."""
    decided = judge(found)
    return {
        "format": FORMAT,
        "base": redact(found.merge.plan.models[0].url),
        "models": [redact(ref.url) for ref in found.merge.plan.models[1:]],
        "merged": redact(found.merge.merged_url) if found.merge.merged_url else None,
        "verdict": decided.answer,
        "distance": decided.distance,
        "distance_is_of": "mean task vectors" if decided.stays else "update",
        "share_of_parameters": decided.share,
        "labels": shares(found) if found.merge.merged else {},
        "left_out": dict(found.left_out),
        "notes": list(found.merge.notes),
        "bytes_read": found.num_bytes_read,
        "seconds": found.seconds,
    }


def json_parts(found: Audit) -> Iterator[str]:
    """Yield audit.json, piece by piece: the summary, and one line per tensor."""
    head = json.dumps(summary(found), indent=1, ensure_ascii=False)
    yield head.removesuffix("\n}") + ',\n "tensors": ['
    separator = "\n"
    for row in found.rows:
        yield f"{separator}  {json.dumps(row, ensure_ascii=False)}"
        separator = ",\n"
    yield "\n ]\n}\n"


def audit_lines(found: Audit) -> Iterator[str]:
    """Yield the report, line by line."""
    decided = judge(found)
    yield from (_of_merge if found.merge.merged else _of_recipe)(found, decided)
    yield from _left_out(found)
    for note in found.merge.notes:
        yield f"note: {note}"


def _extent(found: Audit) -> str:
    """What was looked at, and what that took."""
    return (
        f"{counted(len(found.rows), 'tensor')}, {counted(_num_elems(found.rows), 'parameter', cut=True)}, "
        f"{found.num_tuned} models and their base; {found.seconds:.1f} s, read {gb(found.num_bytes_read)}"
    )


def _of_merge(found: Audit, decided: Verdict) -> Iterator[str]:
    yield f"audited {redact(found.merge.merged_url or '')}: {_extent(found)}"
    yield ""
    yield _merge_verdict(found, decided)
    yield ""
    num_elems = _num_elems(found.rows)
    table = [["tensors", "parameters", "made by"]]
    for label, counts in shares(found).items():
        part = share(counts["num_elems"] / num_elems) if num_elems else ""
        table.append([f"{counts['tensors']:,.0f}", part, _words(found, label)])
    yield from grid(table, left=(2,))
    yield from _nonfinite(found)
    yield from _worst(found.rows, "distance", _merge_columns, "furthest from the correct merge")


def _words(found: Audit, label: str) -> str:
    if label != "indistinguishable":
        return f"{WORDS[label]} ({label})"
    sets = {tuple(row["candidates"]) for row in found.rows if row["match"] == label}
    listed = "; ".join(sorted(" or ".join(candidates) for candidates in sets)[:3])
    return f"{WORDS[label]}: {listed}"


def _merge_verdict(found: Audit, decided: Verdict) -> str:
    distance, part = share(decided.distance), share(decided.share)
    every = "every tensor that was compared" if found.left_out else "every tensor"
    if decided.answer == "no":
        return f"A re-merge is not needed: {every} is the correct merge, up to rounding."
    if decided.answer == "undecided":
        return (
            "A re-merge would not help before the models are mended: NaN or infinity in them leaves nothing to compare "
            f"in {counted(_num_flagged(found, NONFINITE), 'tensor')}. Every other one that was compared is the correct "
            "merge."
        )
    if decided.answer == "unrelated":
        return (
            "This is no reading of Model Stock of these models: most of it lies off the line from the base through "
            f"their average{_implied(found)}. Check base, models and their number, or the method it was made by."
        )
    if decided.answer == "hardly":
        return (
            f"A re-merge is hardly worth it: tensors with {part} of the parameters differ from the correct merge, all "
            f"together by {distance} of {_whole(decided)}."
        )
    worth = f"A re-merge is worth it: tensors with {part} of the parameters are not the correct merge."
    if broken := _num_flagged(found, MERGE_NONFINITE):
        worth += f" {broken} of {len(found.rows)} tensors hold NaN or infinity, and no model does there."
    if decided.distance:
        worth += f" {'The others' if broken else 'All together they'} miss it by {distance} of {_whole(decided)}."
    return worth


def _whole(decided: Verdict) -> str:
    """What a distance is relative to."""
    if decided.stays:
        return "the size of the mean task vectors (the correct merge is the base: no cosine is positive)"
    return "the size of the update"


def _num_flagged(found: Audit, flag: str) -> int:
    return sum(flag in row["flags"] for row in found.rows)


def _nonfinite(found: Audit) -> Iterator[str]:
    """Tensors without numbers, which no table has."""
    for flag, where in ((MERGE_NONFINITE, "in the merge, and in no model"), (NONFINITE, "in a model")):
        names = [in_a_line(row["name"]) for row in found.rows if flag in row["flags"]]
        if names:
            more = f" and {len(names) - MAX_NAMES:,} more (--json lists them)" if len(names) > MAX_NAMES else ""
            yield f"NaN or infinity {where}: {', '.join(names[:MAX_NAMES])}{more}"


def _implied(found: Audit) -> str:
    """The weights that fit the largest tensor without an explanation."""
    unexplained = [row for row in found.rows if row["match"] == "none" and row["implied_weights"]]
    if not unexplained:
        return ""
    row = max(unexplained, key=lambda row: row["num_elems"])
    weights = ", ".join(f"{weight:.3f}" for weight in row["implied_weights"])
    return f" (the weights nearest to {in_a_line(row['name'])} are {weights})"


def _of_recipe(found: Audit, decided: Verdict) -> Iterator[str]:
    yield f"compared formulas for {_extent(found)}"
    yield ""
    yield from _nonfinite(found)
    if decided.answer == "undecided":
        yield "The old formula gives the same merge wherever there is something to compare; mend these models first."
        return
    if decided.answer == "same":
        why = " (for two models both are one)" if found.num_tuned == 2 else ""
        yield f"The old formula gives the same merge{why}: nothing to do."
        return
    worth = "is worth" if decided.answer == "yes" else "is hardly worth"
    yield (
        f"A merge of these models by the old formula, t = 2 cos / (1 + cos) for every N, misses the correct one by "
        f"{share(decided.distance)} of {_whole(decided)}, all tensors together: merging it again {worth} it."
    )
    yield "Name the merged checkpoint too (stockflow audit RECIPE MERGED) to see which formula made it."
    yield from _worst(found.rows, "old_distance", _recipe_columns, "where the old formula is furthest off")


def _worst(rows: Sequence[Mapping[str, Any]], column: str, columns: Any, title: str) -> Iterator[str]:
    ranked = sorted((row for row in rows if row[column]), key=lambda row: -row[column])[:MAX_WORST]
    if not ranked:
        return
    yield ""
    yield f"{title}:"
    table = [columns(row) for row in ranked]
    heads = list(table[0])
    yield from grid([heads, *([cells[head] for head in heads] for cells in table)], left=(0, len(heads) - 1))


def _merge_columns(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "tensor": in_a_line(row["name"]),
        "t correct": number(row["ratio_correct"]),
        "t implied": number(row["implied_ratio"]),
        "off by": share(row["distance"]),
        "rounding": share(row["rounding_noise"]) if row["rounding_noise"] is not None else "",
        "equal": share(row["equal_share"]),
        "roundings": f"{row['mean_roundings']:.3g}, at most {row['max_roundings']:.3g}",
        "made by": row["match"] if row["match"] != "indistinguishable" else " or ".join(row["candidates"]),
    }


def _recipe_columns(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "tensor": in_a_line(row["name"]),
        "t": number(row["ratio_correct"]),
        "old t": number(row["ratio_two_model"]),
        "off by": share(row["old_distance"]),
        "roundings": f"{row['old_roundings']:.2g}" if row["old_roundings"] is not None else "",
        "": ", ".join(row["flags"]),
    }


def _left_out(found: Audit) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for name, why in found.left_out.items():
        reasons.setdefault(why, []).append(name)
    if reasons:
        yield ""
    for why, names in sorted(reasons.items(), key=lambda item: -len(item[1]))[:MAX_REASONS]:
        named = f"{in_a_line(names[0])}{', ...' if len(names) > 1 else ''}"
        yield f"left out: {counted(len(names), 'tensor')}, {why} ({named})"
    if len(reasons) > MAX_REASONS:
        yield f"left out for {len(reasons) - MAX_REASONS} more reasons (--json lists them)"


def number(value: float | None) -> str:
    """Return a ratio as it goes into a table."""
    return "" if value is None else f"{value:.4f}"
