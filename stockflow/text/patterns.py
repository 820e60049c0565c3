"""Regular expressions that others wrote, tried in a time that is bounded: by RE2, which never goes back.

Python's own take years for ``(a+)+b`` and a name of fifty letters.
"""

from collections.abc import Sequence


def fitting(pattern: str, names: Sequence[str]) -> set[str]:
    """Return the names that a pattern fits from begin to end.

    Raises:
        ValueError: it is no regular expression, or one that takes going back, as what looks around or repeats a group.

    Source: https://github.com/google/re2/wiki/Syntax
    """
    import pyarrow
    import pyarrow.compute

    try:
        are_fit = pyarrow.compute.match_substring_regex(pyarrow.array(names, pyarrow.string()), rf"^(?:{pattern})$")
    except (pyarrow.ArrowException, UnicodeEncodeError) as error:
        raise ValueError(str(error)) from None
    return {name for name, is_fit in zip(names, are_fit.to_pylist(), strict=True) if is_fit}
