"""Tokenizers of one vocabulary that cut texts in different ways, or put other tokens around them."""

from collections.abc import Iterator

from stockflow.checkpoints.tokens.cutting import ADDED, LENGTHS, MOST, SIDES, Cutting
from stockflow.planning.looks.proposal import Proposal
from stockflow.storage import redact
from stockflow.text.examples import some
from stockflow.text.remarks import Remark, Severity

MAX_SHOWN = 4


def other_cutting(proposal: Proposal) -> Iterator[Remark]:
    """Yield which models were tuned on texts that were cut in another way than the tokenizer that goes out does."""
    donor = proposal.recipe.vocabulary_donor
    if not proposal.tokenizers or donor >= len(proposal.tokenizers):
        return
    published = proposal.tokenizers[donor]
    by_parts: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for checkpoint, own in zip(proposal.checkpoints, proposal.tokenizers, strict=True):
        if own.vocabulary == published.vocabulary:
            both = (part for part in own.cutting if part in published.cutting)
            parts = tuple(part for part in both if _is_other(part, own.cutting, published.cutting))
            said = tuple(_said(part, own.cutting, published.cutting) for part in parts)
            by_parts.setdefault((parts, said), []).append(redact(checkpoint.url))
    for (parts, said), urls in by_parts.items():
        if parts:
            where = redact(proposal.checkpoints[donor].url)
            text = (
                f"{', '.join(urls)}: the same tokens as in {where}, whose tokenizer goes out, but texts were cut in "
                f"another way, or other tokens put around them; what differs: {some(said, MAX_SHOWN, str)}"
            )
            severity: Severity = "note" if all(map(_says_little, parts)) else "warning"
            yield Remark("tokenizers-differ", text, severity, tuple(urls), values=dict.fromkeys(parts, "differs"))


def _is_other(part: str, own: Cutting, published: Cutting) -> bool:
    """Return whether a part differs; that the published tokenizer lets texts be as long as they are is no harm."""
    return own[part] != published[part] and not (part in (*LENGTHS, MOST) and published[part] == "none")


def _said(part: str, own: Cutting, published: Cutting) -> str:
    """Return what a part is called, with the lengths, or the flags of an added token, in both."""
    if part == MOST:
        return f"{part} ({own[part]} there, {published[part]} here)"
    if part in LENGTHS:
        return f"{part} of every text ({own[part]} there, {published[part]} here)"
    if not part.startswith(ADDED):
        return part
    there, here = (each[part] or "no flag" for each in (own, published))
    return f"{part} ({there} there, {here} here)"


def _says_little(part: str) -> bool:
    """Whether it decides how ids are shown, how a single token is found, or what batches look like."""
    return part in ("decoder", "tokenizer_class", MOST, *SIDES) or part.startswith(ADDED)
