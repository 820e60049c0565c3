"""What classifiers' outputs are: their names, and how loaders make scores of them: softmax, sigmoid or nothing."""

import re
from collections.abc import Mapping

_CLASSIFIES = re.compile(r"For(Sequence|Image|Audio|Video)Classification")
_USUALLY = 2
"""outputs of a classifier whose config does not say how many"""


def labels(section: Mapping[str, object]) -> object:
    """Return the names of a classifier's outputs; None for those that nobody named."""
    given = section.get("id2label")
    if not isinstance(given, dict) or all(str(value) == f"LABEL_{key}" for key, value in given.items()):
        return None
    return dict(sorted((str(key), value) for key, value in given.items()))


def problem(section: Mapping[str, object]) -> object:
    """Return what a section says of it; None for models that are known to be no such classifiers."""
    return section.get("problem_type") if _classifies(section) is not False else None


def usual_problem(section: Mapping[str, object]) -> object:
    """Return what loaders take where a classifier's section says nothing: they go by the number of outputs.

    Source: the pipeline text-classification of transformers 5.23.
    """
    if not _classifies(section):
        return None
    names = section.get("id2label")
    number = len(names) if isinstance(names, dict) else section.get("num_labels", _USUALLY)
    return "multi_label_classification" if number == 1 else "single_label_classification"


def _classifies(section: Mapping[str, object]) -> bool | None:
    classes = section.get("architectures")
    return any(_CLASSIFIES.search(str(name)) for name in classes) if isinstance(classes, list) else None
