"""Codes and scales paired by what headers hold: which grids are read, and which are errors."""

import pytest

from stockflow.checkpoints.decodes.stored import BlockScaled, GroupScaled
from stockflow.checkpoints.files.header import TensorSpec
from stockflow.checkpoints.packed import leftover_scales
from stockflow.checkpoints.quantised import Hints, Scheme, Tensors, hints_of, tensors_of
from stockflow.errors import CheckpointError

Shape = tuple[int, ...]
M = "layers.0.mlp.up_proj"


def paired(hints: Hints = Hints(), **tensors: tuple[str, Shape]) -> Tensors:  # noqa: B008
    specs = {f"{M}.{own}": TensorSpec(f"{M}.{own}", dtype, shape) for own, (dtype, shape) in tensors.items()}
    return tensors_of(specs, hints, {}, "there")


def block(code: Shape, scale: Shape, dtype: str = "F32", asked: tuple[int, int] | None = None) -> tuple[int, int]:
    found = paired(Hints(asked), weight=("F8_E4M3", code), weight_scale_inv=(dtype, scale)).stored[f"{M}.weight"]
    assert isinstance(found.decode, BlockScaled)
    return found.decode.block


@pytest.mark.parametrize(
    ("code", "scale", "dtype", "asked", "expected"),
    [
        ((576, 7168), (5, 56), "F32", (128, 128), (128, 128)),
        ((576, 7168), (5, 56), "F32", None, (128, 128)),
        ((576, 7168), (9, 112), "F32", (64, 64), (64, 64)),
        ((576, 7168), (576, 224), "U8", (128, 128), (1, 32)),
        ((576, 7168), (576, 224), "F8_E8M0", None, (1, 32)),
        ((576, 7168), (576, 1), "BF16", (128, 128), (1, 7168)),
        ((576, 7168), (576,), "F32", None, (1, 7168)),
        ((576, 7168), (), "F32", (128, 128), (576, 7168)),
        ((576, 7168), (1,), "F32", None, (576, 7168)),
        ((576, 7168), (1, 1), "F32", None, (576, 7168)),
        ((576, 7168), (5, 1, 56, 1), "F32", None, (128, 128)),
        ((8, 576, 7168), (8, 5, 56), "F32", (128, 128), (128, 128)),
        ((8, 576, 7168), (8, 1, 1), "F32", None, (576, 7168)),
        ((8, 576, 7168), (8, 576, 1), "F32", None, (1, 7168)),
        ((100, 100), (1, 1), "F32", (128, 128), (100, 100)),
    ],
)
def test_a_grid_says_what_its_blocks_are(
    code: Shape, scale: Shape, dtype: str, asked: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    assert block(code, scale, dtype, asked) == expected


@pytest.mark.parametrize(
    ("code", "scale", "asked", "said"),
    [
        ((576, 7168), (4, 56), (128, 128), r"grid of \[5, 56\]; one of the two is not true"),
        ((576, 7168), (5, 56), (64, 64), r"blocks \[64, 64\] that its config names make a grid of \[9, 112\]"),
        ((576, 7168), (4, 57), None, "no blocks that are in use make such a grid"),
        ((576, 7168), (2, 5, 56), None, "other dimensions"),
        ((8, 576, 7168), (5, 56), (128, 128), "other dimensions"),
    ],
)
def test_grids_that_fit_no_blocks_are_errors_that_name_both(
    code: Shape, scale: Shape, asked: tuple[int, int] | None, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        block(code, scale, asked=asked)
    assert f"there: '{M}.weight' has the shape {list(code)} and '{M}.weight_scale_inv' {list(scale)}" in str(
        caught.value
    )


def test_codes_of_eight_bits_with_scales_of_integers_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="expected floats or exponents"):
        block((128, 128), (1, 1), "I32")


@pytest.mark.parametrize(
    ("tensors", "shape", "decode"),
    [
        (
            {"weight_packed": ("I32", (64, 32)), "weight_scale": ("BF16", (64, 8)), "weight_shape": ("I32", (2,))},
            (64, 256),
            GroupScaled("I32", "I4", "BF16", 32, 256),
        ),
        (
            {"weight_packed": ("I32", (64, 32)), "weight_scale": ("F16", (64, 1))},
            (64, 256),
            GroupScaled("I32", "I4", "F16", 256, 256),
        ),
        (
            {"weight": ("I8", (64, 128)), "scale": ("F8_E8M0", (64, 8))},
            (64, 256),
            GroupScaled("I8", "F4", "F8_E8M0", 32, 256),
        ),
        (
            {"weight": ("U8", (64, 128)), "weight_scale": ("F8_E4M3", (64, 16)), "weight_scale_2": ("F32", ())},
            (64, 256),
            GroupScaled("U8", "F4", "F8_E4M3", 16, 256, "multiplies"),
        ),
    ],
)
def test_codes_of_four_bits_are_as_wide_as_their_containers(
    tensors: dict[str, tuple[str, Shape]], shape: Shape, decode: GroupScaled
) -> None:
    found = paired(**tensors)

    assert found.specs == {f"{M}.weight": TensorSpec(f"{M}.weight", "BF16", shape)}
    assert found.stored[f"{M}.weight"].decode == decode


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight_packed": ("I32", (64, 32)), "weight_scale": ("BF16", (64, 7))},
        {"weight_packed": ("U8", (64, 128)), "weight_scale": ("U8", (64, 7))},
        {"weight": ("I8", (64, 128)), "scale": ("F8_E8M0", (64, 4))},
        {"weight": ("U8", (64, 128)), "weight_scale": ("F8_E4M3", (64, 16)), "weight_scale_2": ("F32", (2,))},
    ],
)
def test_groups_that_do_not_fit_are_errors(tensors: dict[str, tuple[str, Shape]]) -> None:
    with pytest.raises(CheckpointError, match="up_proj"):
        paired(**tensors)


@pytest.mark.parametrize("beside", ["weight_zero_point", "weight_g_idx"])
def test_what_is_packed_otherwise_stays_as_it_is(beside: str) -> None:
    tensors = {"weight_packed": ("I32", (64, 32)), "weight_scale": ("BF16", (64, 8)), beside: ("I32", (8, 8))}

    assert not paired(**tensors).stored


def test_scales_of_activations_are_no_weights() -> None:
    found = paired(
        weight=("F8_E4M3", (64, 64)), weight_scale=("F32", ()), input_scale=("F32", ()), bias=("BF16", (64,))
    )

    assert found.specs.keys() == {f"{M}.weight", f"{M}.bias"}
    assert found.static_scales.keys() == {f"{M}.input_scale"}


def test_a_config_says_blocks_and_groups_wherever_it_has_them() -> None:
    assert hints_of({"quantization_config": {"weight_block_size": [128, 64]}}) == Hints((128, 64))
    assert hints_of({"text_config": {"quantization_config": {"bits": 4, "group_size": 32}}}) == Hints(
        None, (Scheme(4, 32),)
    )
    weights = {"num_bits": 8, "block_structure": [64, 64]}
    assert hints_of({"compression_config": {"config_groups": {"FP8_BLOCK": {"weights": weights}}}}) == Hints(
        (64, 64), (Scheme(8),)
    )
    assert hints_of({"quantization_config": {"weight_block_size": None, "group_size": True}}) == Hints()
    assert hints_of(None) == Hints()


INT4 = {"num_bits": 4, "group_size": 32, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("said", "is_read"),
    [
        ([INT4], True),
        ([FP8, INT4], True),
        ([INT4, FP8], True),
        ([FP8], False),
        ([{**INT4, "symmetric": False}], False),
        ([{**INT4, "type": "float"}], False),
        ([{**INT4, "num_bits": 8}], False),
    ],
)
def test_words_of_eight_codes_are_read_where_a_scheme_of_the_config_is_of_such(
    said: list[object], is_read: bool
) -> None:
    groups = {f"group_{number}": {"weights": weights} for number, weights in enumerate(said)}
    hints = hints_of({"quantization_config": {"config_groups": groups}})
    found = paired(hints, weight_packed=("I32", (16, 8)), weight_scale=("BF16", (16, 2)))

    assert bool(found.stored) == is_read


def test_nibbles_in_bytes_are_no_integers_and_a_scale_of_a_row_is_none_of_a_group() -> None:
    hints = hints_of({"quantization_config": {"config_groups": {"a": {"weights": INT4}}}})

    assert not paired(hints, weight_packed=("U8", (16, 32)), weight_scale=("U8", (16, 2))).stored
    with pytest.raises(CheckpointError, match="32 columns to a scale"):
        paired(hints, weight_packed=("I32", (16, 8)), weight_scale=("BF16", (16, 1)))


def test_a_scheme_of_whole_rows_beside_one_of_groups_is_read() -> None:
    rows = {**INT4, "group_size": None, "strategy": "channel"}
    hints = hints_of({"quantization_config": {"config_groups": {"a": {"weights": INT4}, "b": {"weights": rows}}}})

    for num_groups in (1, 2):
        assert paired(hints, weight_packed=("I32", (16, 8)), weight_scale=("BF16", (16, num_groups))).stored


@pytest.mark.parametrize("shape", [(12, 64), (16, 32), (16, 72)])
@pytest.mark.parametrize(
    ("codes", "scales", "words"),
    [
        (("I32", (16, 8)), ("BF16", (16, 2)), "these do not go together"),
        (("U8", (16, 32)), ("U8", (16, 2)), r"codes of \[16, 64\] numbers, and beside it is the shape"),
    ],
)
def test_a_shape_that_its_codes_do_not_have_is_refused(
    shape: Shape, codes: tuple[str, Shape], scales: tuple[str, Shape], words: str
) -> None:
    tensors = {"weight_packed": codes, "weight_scale": scales, "weight_shape": ("I64", (2,))}
    specs = {f"{M}.{own}": TensorSpec(f"{M}.{own}", dtype, shape) for own, (dtype, shape) in tensors.items()}

    with pytest.raises(CheckpointError, match=words):
        tensors_of(specs, Hints(), {f"{M}.weight_shape": shape}, "there")


def test_scales_without_their_codes_are_left_over() -> None:
    specs = {
        name: TensorSpec(name, "F32", (2, 2))
        for name in ("a.weight", "a.weight_scale_inv", "b.weight_scale", "c.gate_up_proj_scale_inv", "d.rope_scale")
    }
    packed = {"e.weight_packed": TensorSpec("e.weight_packed", "I32", (2, 2))}
    packed["e.weight_scale"] = TensorSpec("e.weight_scale", "F32", (2, 2))

    # sparse weights of compressed-tensors
    packed["s.compressed"] = TensorSpec("s.compressed", "F8_E4M3", (4,))
    packed["s.weight_scale"] = TensorSpec("s.weight_scale", "F32", (2, 1))

    assert leftover_scales(specs | packed) == (["a.weight_scale_inv"], ["b.weight_scale", "c.gate_up_proj_scale_inv"])
