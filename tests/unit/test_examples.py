"""A few of many names in messages."""

import pytest

from stockflow.text.escaping import in_a_line
from stockflow.text.examples import some, such


@pytest.mark.parametrize(
    ("names", "most", "found"),
    [
        (["a"], 2, "'a'"),
        (["a", "b"], 2, "'a', 'b'"),
        (["a", "b", "c"], 2, "'a', 'b' and 1 more"),
        ([str(number) for number in range(1202)], 2, "'0', '1' and 1,200 more"),
        (["a\nb"], 2, r"'a\nb'"),
    ],
)
def test_the_first_names_are_quoted_and_the_others_counted(names: list[str], most: int, found: str) -> None:
    assert some(names, most) == found


def test_names_are_counted_with_their_noun_and_quoted_as_asked() -> None:
    assert such(["a"]) == "1 tensor such as 'a'"
    assert such(["d e", "c"], "scale", in_a_line, most=2) == "2 scales such as d e, c"
