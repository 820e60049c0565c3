"""The oracle against closed forms and results worked out by hand: who judges must be judged first."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.checkpoints import BUFFERS, ZOO, make_family, make_tensors, write_checkpoint

SCOPES: tuple[oracle.Scope, ...] = ("tensor", "row", "leading")


def vectors_with_cosine(cosine: float, num_tuned: int) -> list[oracle.Floats]:
    """Return unit vectors whose pairwise cosines are all ``cosine``: columns of a Cholesky factor."""
    gram = np.full((num_tuned, num_tuned), cosine) + (1.0 - cosine) * np.eye(num_tuned)
    return list(np.linalg.cholesky(gram))


# --- Model Stock


@pytest.mark.parametrize(
    ("cosine", "num_tuned", "ratio"),
    [
        (0.5, 2, 2 / 3),
        (0.5, 3, 3 / 4),
        (0.5, 4, 4 / 5),
        (0.2, 2, 1 / 3),
        (0.2, 6, 0.6),
        (0.75, 3, 0.9),
        (0.0, 5, 0.0),
    ],
)
def test_the_ratio_follows_the_closed_form(cosine: float, num_tuned: int, ratio: float) -> None:
    deltas = vectors_with_cosine(cosine, num_tuned)
    base = np.linspace(-1.0, 1.0, num_tuned)

    result = oracle.model_stock(base, [base + delta for delta in deltas])

    assert result.facts["mean_cosine"] == pytest.approx([cosine], abs=1e-15)
    assert result.facts["ratio"] == pytest.approx([ratio], abs=1e-14)
    assert result.facts["coefficients"] == pytest.approx(np.full((1, num_tuned), ratio / num_tuned), abs=1e-14)
    assert result.out == pytest.approx(base + ratio * np.mean(deltas, axis=0), abs=1e-15)


def test_two_models_make_the_legacy_formula_right_and_three_do_not() -> None:
    two = oracle.model_stock(np.zeros(2), vectors_with_cosine(0.5, 2)).facts
    three = oracle.model_stock(np.zeros(3), vectors_with_cosine(0.5, 3)).facts

    assert two["legacy_ratio"] == pytest.approx(two["ratio"], abs=1e-15)
    assert three["legacy_ratio"] == pytest.approx([2 / 3])
    assert three["ratio"] == pytest.approx([3 / 4])


def test_the_mean_is_of_cosines_not_of_angles() -> None:
    """fusion_bench averages angles, which differs for three: here 60 degrees, cosine 0.5, not 0.455."""
    angles = np.radians([0.0, 60.0, 90.0])
    tuned = [np.array([math.cos(angle), math.sin(angle)]) for angle in angles]

    facts = oracle.model_stock(np.zeros(2), tuned).facts

    expected = (0.5 + 0.0 + math.cos(math.radians(30.0))) / 3
    assert facts["mean_cosine"] == pytest.approx([expected], abs=1e-15)


def test_copies_of_the_base_give_the_base_bit_for_bit() -> None:
    base = np.array([-0.0, 0.1, 1e-300, -3.0])

    result = oracle.model_stock(base, [base.copy(), base.copy(), base.copy()])

    assert result.out.tobytes() == base.tobytes()
    assert result.facts["ratio"].tolist() == [0.0]
    assert result.facts["cosines"].tolist() == np.zeros((1, 3, 3)).tolist()


def test_copies_of_one_tuned_model_give_that_model() -> None:
    base, tuned = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, 2.5])

    result = oracle.model_stock(base, [tuned, tuned, tuned])

    assert result.facts["ratio"].tolist() == [1.0]
    assert result.out.tolist() == tuned.tolist()


def test_a_zero_task_vector_counts_as_orthogonal() -> None:
    deltas = [np.array([1.0, 0.0]), np.array([1.0, 0.0]), np.zeros(2)]

    facts = oracle.model_stock(np.zeros(2), deltas).facts

    assert facts["cosines"][0].tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert facts["mean_cosine"] == pytest.approx([1 / 3])
    assert facts["ratio"] == pytest.approx([3 * (1 / 3) / (1 + 2 / 3)])
    assert facts["delta_norms"].tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize(("cosine", "ratio"), [(-0.5, -2.0), (-0.9, -18.0), (-0.99, -198.0)])
def test_opposing_task_vectors_are_clamped_or_extrapolated(cosine: float, ratio: float) -> None:
    """The ratios are what mergekit 0.1.5 was seen to use."""
    deltas = vectors_with_cosine(cosine, 2)

    clamped = oracle.model_stock(np.ones(2), [1.0 + delta for delta in deltas])
    extrapolated = oracle.model_stock(np.zeros(2), deltas, on_negative="extrapolate")

    assert clamped.out.tolist() == [1.0, 1.0]
    assert extrapolated.facts["ratio"] == pytest.approx([ratio])
    assert extrapolated.out == pytest.approx(ratio * (deltas[0] + deltas[1]) / 2)
    assert np.isnan(extrapolated.facts["legacy_ratio"]).all()


def test_opposite_task_vectors_have_no_ratio() -> None:
    delta = np.array([3.0, -4.0])

    assert oracle.model_stock(np.zeros(2), [delta, -delta]).facts["ratio"].tolist() == [0.0]
    with pytest.raises(ZeroDivisionError, match="cancel"):
        oracle.model_stock(np.zeros(2), [delta, -delta], on_negative="extrapolate")


@pytest.mark.parametrize("scale", [1e-160, 1e-30, 1e-12, 1e30, 1e160])
def test_the_scale_of_task_vectors_changes_nothing(scale: float) -> None:
    deltas = vectors_with_cosine(0.5, 3)

    facts = oracle.model_stock(np.zeros(3), [scale * delta for delta in deltas]).facts

    assert facts["ratio"] == pytest.approx([0.75], abs=1e-14)


def test_each_scope_equals_its_groups_one_by_one() -> None:
    random = np.random.default_rng(0)
    base, *tuned = random.standard_normal((4, 3, 5, 7))

    by_row = oracle.model_stock(base, tuned, scope="row")
    by_leading = oracle.model_stock(base, tuned, scope="leading")

    for index in np.ndindex(3, 5):
        alone = oracle.model_stock(base[index], [tensor[index] for tensor in tuned])
        assert by_row.out[index].tolist() == alone.out.tolist()
        assert by_row.facts["ratio"][np.ravel_multi_index(index, (3, 5))] == alone.facts["ratio"][0]
    for expert in range(3):
        alone = oracle.model_stock(base[expert], [tensor[expert] for tensor in tuned])
        assert by_leading.out[expert].tolist() == alone.out.tolist()


@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((), (1, 1, 1)), ((5,), (1, 1, 1)), ((2, 5), (1, 2, 1)), ((2, 3, 5), (1, 6, 2)),
        ((2, 1, 3, 5), (1, 6, 2)), ((0,), (1, 1, 1)),
        ((0, 5), (1, 0, 1)), ((3, 0), (1, 3, 1)), ((3, 0, 2), (1, 0, 3)),
    ],
)  # fmt: skip
def test_scopes_count_their_groups(shape: tuple[int, ...], num_groups: tuple[int, ...]) -> None:
    base = np.ones(shape)

    results = [oracle.model_stock(base, [base + 1.0, base + 2.0], scope=scope) for scope in SCOPES]

    assert [result.facts["ratio"].size for result in results] == list(num_groups)
    assert all(result.out.tolist() == (base + 1.5).tolist() for result in results)


def test_blocks_do_not_change_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = (tensor.numpy() for tensor in make_tensors("long", (40, 101), 3))
    whole = oracle.model_stock(base, tuned, scope="row")

    monkeypatch.setattr(oracle, "BLOCK_ELEMS", 64)
    in_blocks = oracle.model_stock(base, tuned, scope="row")

    assert in_blocks.facts["ratio"] == pytest.approx(whole.facts["ratio"], abs=1e-16)
    assert in_blocks.out == pytest.approx(whole.out, abs=1e-17)


# --- linear, task arithmetic, SLERP


def test_linear_by_hand() -> None:
    tensors = [np.array([1.0, 2.0]), np.array([5.0, -2.0])]

    assert oracle.linear(tensors, [1.0, 3.0]).out.tolist() == [4.0, -1.0]
    assert oracle.linear(tensors, [1.0, 3.0], normalize=False).out.tolist() == [16.0, -4.0]
    assert oracle.linear(tensors, [1.0, 3.0]).facts["coefficients"].tolist() == [[0.25, 0.75]]


def test_task_arithmetic_by_hand() -> None:
    base, tuned = np.array([1.0, 1.0]), [np.array([2.0, 1.0]), np.array([1.0, 3.0])]

    assert oracle.task_arithmetic(base, tuned, [1.0, 3.0]).out.tolist() == [2.0, 7.0]
    assert oracle.task_arithmetic(base, tuned, [1.0, 3.0], lam=0.5).out.tolist() == [1.5, 4.0]
    assert oracle.task_arithmetic(base, tuned, [1.0, 3.0], normalize=True).out.tolist() == [1.25, 2.5]
    assert oracle.task_arithmetic(base, tuned, [1.0, -1.0], normalize=True).out.tolist() == [2.0, -1.0]


def test_slerp_over_a_right_angle() -> None:
    first, second = np.array([2.0, 0.0]), np.array([0.0, 3.0])

    middle = oracle.slerp(first, second, 0.5)
    third = oracle.slerp(first, second, 1 / 3)

    assert middle.facts["dot"].tolist() == [0.0]
    assert middle.out == pytest.approx([2 * math.sqrt(0.5), 3 * math.sqrt(0.5)], abs=1e-15)
    assert third.out == pytest.approx([2 * math.cos(math.pi / 6), 3 * 0.5], abs=1e-15)


def test_slerp_falls_back_to_a_straight_line() -> None:
    base = np.array([1.0, 0.0])

    assert oracle.slerp(base, np.array([3.0, 0.0]), 0.25).out.tolist() == [1.5, 0.0]
    assert oracle.slerp(base, np.array([-1.0, 0.0]), 0.25).out.tolist() == [0.5, 0.0]


def test_slerp_treats_a_tiny_norm_as_it_is() -> None:
    """As in mergekit: the dot product of something below 1e-8 is about 0, so the angle is a right one."""
    result = oracle.slerp(np.array([1e-9, 0.0]), np.array([1.0, 0.0]), 0.5)

    assert result.facts["dot"] == pytest.approx([1e-9])
    assert result.out == pytest.approx([math.sqrt(0.5), 0.0], abs=1e-8)


# --- TIES


def test_ties_by_hand() -> None:
    """Two of four are kept. Votes +5 -2 +3: two agree; 0 -4 0: one; +1 +6 0: two; 0 0 -2: one."""
    base = np.full(4, 10.0)
    deltas = [
        np.array([5.0, 0.5, 1.0, -0.5]),
        np.array([-2.0, -1.0, 6.0, 0.0]),
        np.array([3.0, 1.0, 0.5, -2.0]),
    ]

    result = oracle.ties(base, [base + delta for delta in deltas], [1.0] * 3, [0.5] * 3)

    assert result.facts["kept_shares"].tolist() == [[0.5, 0.5, 0.5]]
    assert result.out.tolist() == [10 + (5 + 3) / 2, 10.0, 10 + (1 + 6) / 2, 10 - 2]


def test_ties_weighs_scales_and_normalizes() -> None:
    base = np.zeros(2)
    tuned = [np.array([1.0, 2.0]), np.array([3.0, -8.0])]

    normalized = oracle.ties(base, tuned, [1.0, 3.0], [1.0, 1.0])
    plain = oracle.ties(base, tuned, [1.0, 3.0], [1.0, 1.0], lam=0.5, normalize=False)

    assert normalized.out.tolist() == [(1 + 9) / 4, -24 / 3]
    assert plain.out.tolist() == [0.5 * (1 + 9), 0.5 * -24]


def test_ties_counts_a_drawn_vote_as_positive_and_lets_negative_weights_turn_votes() -> None:
    base = np.zeros(1)

    drawn = oracle.ties(base, [np.array([2.0]), np.array([-2.0])], [1.0, 1.0], [1.0, 1.0])
    turned = oracle.ties(base, [np.array([2.0]), np.array([-3.0])], [1.0, -1.0], [1.0, 1.0])

    assert drawn.out.tolist() == [2.0]
    assert drawn.facts["margin"].tolist() == [0.0]
    # Both votes are positive (2 and 3), the weights that agree sum to 0, and so count as 1.
    assert turned.out.tolist() == [5.0]


@pytest.mark.parametrize(
    ("density", "kept"),
    [(0.0, []), (0.01, [4]), (0.2, [4]), (0.4, [0, 4]), (0.79, [0, 3, 4]), (0.8, [0, 1, 3, 4]), (1.0, [0, 1, 3, 4])],
)
def test_ties_keeps_the_largest_and_the_first_of_those_that_equal_the_last(density: float, kept: list[int]) -> None:
    """Magnitudes 4 3 3 1 0: the second and third are told apart by their place."""
    delta = np.array([3.0, -1.0, 0.0, -3.0, 4.0])

    result = oracle.ties(np.zeros(5), [delta], [1.0], [density])

    assert result.facts["kept_shares"].tolist() == [[len(kept) / 5 if density < 1 else 1.0]]
    assert np.nonzero(result.out)[0].tolist() == kept


def test_ties_ranks_float32_task_vectors() -> None:
    """Of two elements that only float64 tells apart the first is kept, as it is."""
    delta = np.array([1.0 + 2.0**-31, 1.0 + 2.0**-30, 0.5])

    narrow = oracle.ties(np.zeros(3), [delta], [1.0], [0.34])
    wide = oracle.ties(np.zeros(3), [delta], [1.0], [0.34], float_bits=64)

    assert narrow.out.tolist() == [1.0 + 2.0**-31, 0.0, 0.0]
    assert wide.out.tolist() == [0.0, 1.0 + 2.0**-30, 0.0]


# --- rounding

BF16_MAX = (2 - 2**-7) * 2.0**127
F16_MAX = 65504.0


@pytest.mark.parametrize(
    ("dtype", "value", "bits"),
    [
        ("BF16", 1.0, 0x3F80),
        ("BF16", -2.5, 0xC020),
        ("BF16", -0.0, 0x8000),
        ("BF16", 1 + 2**-8, 0x3F80),  # half, down to even
        ("BF16", 1 + 3 * 2**-8, 0x3F82),  # half, up to even
        ("BF16", 1 + 2**-8 + 2**-52, 0x3F81),  # just over half: by way of float32 it would go down
        ("BF16", 1 + 3 * 2**-8 - 2**-52, 0x3F81),  # just under half: by way of float32 it would go up
        ("BF16", 2 - 2**-9, 0x4000),  # carry into the exponent
        ("BF16", BF16_MAX, 0x7F7F),
        ("BF16", BF16_MAX + 2.0**118, 0x7F7F),
        ("BF16", BF16_MAX + 2.0**119, 0x7F80),  # half a place over the largest
        ("BF16", -1e300, 0xFF80),
        ("BF16", 2.0**-126, 0x0080),  # smallest normal
        ("BF16", 2.0**-133, 0x0001),  # smallest subnormal
        ("BF16", 2.0**-134, 0x0000),  # half of it, down to even
        ("BF16", 3 * 2.0**-134, 0x0002),  # half, up to even
        ("BF16", 2.0**-134 * (1 + 2**-52), 0x0001),
        ("BF16", 2.0**-126 - 2.0**-135, 0x0080),  # a subnormal rounds up to the smallest normal
        ("BF16", 5e-324, 0x0000),
        ("BF16", math.inf, 0x7F80),
        ("BF16", math.nan, 0x7FC0),
        ("F16", 1.0, 0x3C00),
        ("F16", 1 + 2**-11, 0x3C00),
        ("F16", 1 + 2**-11 + 2**-40, 0x3C01),
        ("F16", F16_MAX, 0x7BFF),
        ("F16", 65519.999, 0x7BFF),
        ("F16", 65520.0, 0x7C00),
        ("F16", -(2.0**-24), 0x8001),
        ("F16", 2.0**-25, 0x0000),
        ("F16", math.nan, 0x7E00),
        ("F32", 1 + 2**-24, 0x3F800000),
        ("F32", 1 + 2**-24 + 2**-52, 0x3F800001),
        ("F32", 2.0**-149, 0x00000001),
        ("F32", 2.0**-150, 0x00000000),
        ("F32", 3.5e38, 0x7F800000),
        ("F64", 0.1, 0x3FB999999999999A),
    ],
)
def test_rounding_by_hand(dtype: str, value: float, bits: int) -> None:
    assert hex(bits) == hex(int(oracle.round_to(dtype, value)))


@pytest.mark.parametrize(("dtype", "native"), [("F16", np.float16), ("F32", np.float32)])
def test_rounding_agrees_with_numpy_on_arbitrary_bits(dtype: str, native: type[np.floating[Any]]) -> None:
    random = np.random.default_rng(1)
    exponents = random.uniform(-160.0 if dtype == "F32" else -30.0, 130.0 if dtype == "F32" else 17.0, 1 << 18)
    values = random.standard_normal(1 << 18) * np.exp2(exponents)

    with np.errstate(over="ignore"):
        expected = values.astype(native).view(oracle.FORMATS[dtype].carrier)

    assert np.array_equal(expected, oracle.round_to(dtype, values))


def test_rounding_agrees_with_torch_on_every_exponent() -> None:
    """Torch rounds float32 to bfloat16, so float32 values have one rounding on both sides."""
    random = np.random.default_rng(2)
    patterns = random.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    values = patterns[np.isfinite(patterns.view(np.float32))].view(np.float32)

    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()

    assert np.array_equal(expected, oracle.round_to("BF16", values.astype(np.float64)))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_survives_widening_and_rounding(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = oracle.widen(dtype, bits)

    assert np.array_equal(bits[~np.isnan(values)], oracle.round_to(dtype, values[~np.isnan(values)]))


def test_ulp_distance_counts_representable_numbers() -> None:
    values = [1.0, -0.0, 2.0**-133, -(2.0**-133)]
    others = [1.0 + 2**-6, 0.0, -(2.0**-133), -(2.0**-132)]

    distance = oracle.ulp_distance("BF16", oracle.round_to("BF16", values), oracle.round_to("BF16", others))

    assert distance.tolist() == [2, 0, 2, 1]


# --- whole checkpoints


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: make_tensors(name, shape, 1)[0].to(dtype) for name, shape in ZOO.items()} | BUFFERS

    single = oracle.load_checkpoint(write_checkpoint(tmp_path / "single", tensors))
    sharded = oracle.load_checkpoint(write_checkpoint(tmp_path / "sharded", tensors, num_shards=5, seed=3))

    assert tensors.keys() == single.keys() == sharded.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == single[name].array.shape
        assert np.array_equal(tensor.double().numpy(), single[name].array.astype(np.float64))
        assert single[name].dtype == sharded[name].dtype
        assert np.array_equal(single[name].array, sharded[name].array)


def test_seeds_shard_differently(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.zeros(1) for number in range(20)}

    folders = [write_checkpoint(tmp_path / str(seed), tensors, num_shards=4, seed=seed) for seed in (0, 0, 1)]

    layouts = [(folder / "model.safetensors.index.json").read_bytes() for folder in folders]
    assert layouts[0] == layouts[1] != layouts[2]


@pytest.mark.parametrize(("num_tuned", "cosine"), [(2, 0.5), (4, 0.9), (3, 0.0), (3, -0.4), (2, 1.0)])
def test_a_family_has_the_cosine_asked_for(tmp_path: Path, num_tuned: int, cosine: float) -> None:
    shapes = {"weight": (257, 1025)}
    family = make_family(tmp_path, num_tuned, shapes, torch.float32, cosine=cosine, delta_scale=0.1)

    facts = oracle.merge_folder("model_stock", family.base, family.tuned)["weight"].facts

    assert facts["mean_cosine"] == pytest.approx([cosine], abs=0.01)
    assert facts["delta_norms"] == pytest.approx(np.full((1, num_tuned), 0.1 * math.sqrt(257 * 1025)), rel=0.02)


def test_a_folder_is_merged_whole(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, num_shards=2, heavy_tailed=True, base_dtype=torch.float32)

    merged = oracle.merge_folder("model_stock", family.base, family.tuned, out_dtype="BF16", scope="row")
    average = oracle.merge_folder("linear", None, family.tuned, weights=[1.0, 1.0, 2.0])
    trimmed = oracle.merge_folder("ties", family.base, family.tuned, weights=[1, 1, 1], densities=[0.2, 0.5, 1])

    assert ZOO.keys() | BUFFERS.keys() == merged.keys() == average.keys() == trimmed.keys()
    assert {merged[name].dtype for name in ZOO} == {"BF16"} == {average[name].dtype for name in ZOO}
    assert {trimmed[name].dtype for name in ZOO} == {"F32"}
    for name, shape in ZOO.items():
        assert merged[name].bits.dtype == np.uint16
        assert merged[name].bits.shape == average[name].bits.shape == trimmed[name].bits.shape == shape
    for name, buffer in BUFFERS.items():
        assert np.array_equal(buffer.numpy(), merged[name].bits)


def test_a_buffer_that_differs_is_refused(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", {"steps": torch.tensor(1)})
    second = write_checkpoint(tmp_path / "second", {"steps": torch.tensor(2)})

    with pytest.raises(ValueError, match="'steps' is I64"):
        oracle.merge_folder("linear", first, [second], weights=[1.0])
