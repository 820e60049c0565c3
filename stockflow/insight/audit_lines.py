"""An audit in words, for a terminal: the verdict first, then what it rests on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stockflow.insight.audit import Audit, Verdict, judge, shares
from stockflow.insight.examiner import MERGE_NONFINITE, NONFINITE
from stockflow.insight.formulas import WORDS
from stockflow.insight.inspection_lines import grid, share
from stockflow.planning.budget import gb
from stockflow.storage import redact
from stockflow.text.escaping import in_a_line

MAX_WORST = 10
MAX_REASONS = 6
MAX_NAMES = 5


def audit_lines(found: Audit) -> Iterator[str]:
    """Yield the report, line by line."""
    decided = judge(found)
    yield from (_of_merge if found.merge.merged else _of_recipe)(found, decided)
    yield from _left_out(found)
    for note in found.merge.notes:
        yield f"note: {note}"


def _of_merge(found: Audit, decided: Verdict) -> Iterator[str]:
    num_elems = sum(row["num_elems"] for row in found.rows)
    yield (
        f"audited {redact(found.merge.merged_url or '')}: {len(found.rows)} tensors, {num_elems / 1e9:.3g} B "
        f"parameters, {found.num_tuned} models and their base; {found.seconds:.1f} s, read {gb(found.num_bytes_read)}"
    )
    yield ""
    yield _merge_verdict(found, decided)
    yield ""
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
            f"in {_num_flagged(found, NONFINITE)} tensors. Every other one that was compared is the correct merge."
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
    num_elems = sum(row["num_elems"] for row in found.rows)
    yield (
        f"compared formulas for {len(found.rows)} tensors, {num_elems / 1e9:.3g} B parameters, {found.num_tuned} "
        f"models and their base; {found.seconds:.1f} s, read {gb(found.num_bytes_read)}"
    )
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
        yield f"left out: {len(names)} tensors, {why} ({in_a_line(names[0])}{', ...' if len(names) > 1 else ''})"
    if len(reasons) > MAX_REASONS:
        yield f"left out for {len(reasons) - MAX_REASONS} more reasons (--json lists them)"


def number(value: float | None) -> str:
    """Return a ratio as it goes into a table."""
    return "" if value is None else f"{value:.4f}"
