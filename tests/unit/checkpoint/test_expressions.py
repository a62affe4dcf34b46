"""Every expression against torch (float64 where it computes), in blocks of every size, and its byte ranges."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from branchmix.checkpoint import expressions as ex
from branchmix.checkpoint import generated_tensors, numbers
from branchmix.checkpoint.index import TensorRef, read_header
from branchmix.errors import CheckpointError
from branchmix.upcycling.plan import HOW

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
DTYPES = {code: dtype for dtype, code in CODES.items()}


class Store:
    """Saves tensors and hands out Source expressions over them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0

    def __call__(self, tensor: torch.Tensor) -> ex.Stored:
        self.count += 1
        file = self.folder / f"{self.count}.safetensors"
        save_file({"before": torch.zeros(3), "t": tensor.contiguous()}, file)
        return ex.Stored(next(ref for ref in read_header(file) if ref.name == "t"))


@pytest.fixture
def store(tmp_path) -> Store:
    torch.manual_seed(0)
    return Store(tmp_path)


def to_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(DTYPES[dtype]).reshape(array.shape)


def value(expression: ex.Expression) -> torch.Tensor:
    """The whole value; the same in blocks of any size, column by column, and from its ranges."""
    total = expression.num_rows
    whole = expression.rows(0, total)
    assert whole.dtype == numbers.storage(expression.dtype)
    assert whole.nbytes == expression.nbytes
    for step in (1, 3, 7):
        blocks = [expression.rows(row, min(row + step, total)) for row in range(0, total, step)]
        assert np.array_equal(np.concatenate(blocks), whole)
    if len(expression.shape) == 2:
        width = expression.shape[1]
        assert np.array_equal(expression.rows(0, total, (1, width)), whole[:, 1:])
        strips = [expression.rows(1, total, (left, min(left + 5, width))) for left in range(0, width, 5)]
        assert np.array_equal(np.concatenate(strips, axis=1), whole[1:])
    ranges = expression.ranges()
    if ranges is not None:
        assert stored_bytes(ranges) == np.ascontiguousarray(whole).tobytes()
    return to_torch(whole, expression.dtype).reshape(expression.shape)


def stored_bytes(ranges: list[ex.ByteRange]) -> bytes:
    found = b""
    for file, offset, nbytes in ranges:
        with file.open("rb") as stream:
            stream.seek(offset)
            found += stream.read(nbytes)
    return found


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the bit, the sign of zero included."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
    return torch.equal(*bits)


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to 16 bits with one rounding, without torch's own (double) rounding: the nearer of two neighbours."""
    guess = exact.to(dtype)
    bits = guess.view(torch.int16).to(torch.int32)
    candidates = [(bits + step).to(torch.int16).view(dtype) for step in (-1, 0, 1)]
    distances = torch.stack([(c.double() - exact).abs().nan_to_num(float("inf")) for c in candidates])
    even = torch.stack([c.view(torch.int16) % 2 == 0 for c in candidates])
    best = distances.min(0).values
    choice = torch.where((distances == best) & even, 2, 0) + torch.where(distances == best, 1, 0)
    return torch.stack(candidates).gather(0, choice.argmax(0, keepdim=True))[0]


# Numbers.


def test_bfloat16_conversion_is_torchs_for_all_values():
    bits = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    assert np.array_equal(numbers.to_float32(bits, "BF16"), theirs.numpy(), equal_nan=True)
    back = numbers.from_float32(numbers.to_float32(bits, "BF16"), "BF16")
    number = ~torch.isnan(theirs).numpy()
    assert np.array_equal(back[number], bits[number])
    assert np.isnan(numbers.to_float32(back, "BF16"))[~number].all()


def test_rounding_to_bfloat16_is_torchs_also_at_ties_and_infinities():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    bits[::2] = (bits[::2] & 0xFFFF0000) | 0x8000  # ties
    bits[::7] = (bits[::7] & 0x80000000) | 0x7F7FFFFF  # the largest float32, which becomes infinite
    bits[::11] = (bits[::11] & 0x80000000) | 0x7F800001  # a NaN whose upper half looks infinite
    values = bits.view(np.float32)
    ours = to_torch(numbers.from_float32(values, "BF16"), "BF16")
    assert torch.equal(ours.nan_to_num(nan=7.0), torch.from_numpy(values).bfloat16().nan_to_num(nan=7.0))
    assert torch.equal(ours.isnan(), torch.from_numpy(values).isnan())


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_other_floats_pass_through(dtype):
    values = np.array([0.0, -0.0, 1 / 4, 2.0**-20, np.nan, np.inf]).astype(numbers.storage(dtype))
    again = numbers.from_float32(numbers.to_float32(values, dtype), dtype)
    assert again.dtype == values.dtype
    assert np.array_equal(again, values, equal_nan=True)


# Rearranged bytes.


@pytest.mark.parametrize("shape", [(), (5,), (8, 6), (4, 3, 2)])
@pytest.mark.parametrize("dtype", CODES)
def test_source(store, shape, dtype):
    tensor = (torch.randn(shape) * 100).to(dtype)
    source = store(tensor)
    assert same(value(source), tensor)
    assert list(source.sources()) == [source.ref]
    assert source.ranges() == [(source.ref.file, source.ref.offset, tensor.nbytes)]


def test_rows(store):
    tensor = torch.randn(12, 6).bfloat16()
    picked = ex.Rows(store(tensor), ((8, 10), (0, 2), (2, 5), (5, 5)))
    assert picked.shape == (7, 6)
    assert len(picked.ranges()) == 2, "adjacent ranges are one"
    assert same(value(picked), tensor[[8, 9, 0, 1, 2, 3, 4]])
    with pytest.raises(AssertionError):
        ex.Rows(store(tensor), ((8, 13),))


def test_stack_of_rows_of_stacks(store):
    a, b, c = (torch.randn(n, 6).bfloat16() for n in (4, 3, 5))
    stack = ex.Stack((store(a), ex.Rows(ex.Stack((store(b), store(c))), ((1, 5),)), store(b)))
    assert same(value(stack), torch.cat([a, torch.cat([b, c])[1:5], b]))
    assert len(list(stack.sources())) == 4
    vectors = ex.Stack((store(a[:, 0]), store(b[:, 0])))
    assert same(value(vectors), torch.cat([a[:, 0], b[:, 0]]))
    with pytest.raises(AssertionError):
        ex.Stack((store(a), store(b.float())))
    with pytest.raises(AssertionError):
        ex.Stack((store(a), store(b[:, :5])))


def test_neighbours_in_a_file_become_one_range(tmp_path):
    save_file({"a": torch.randn(4, 4), "b": torch.randn(4, 4)}, tmp_path / "f.safetensors")
    stack = ex.Stack(tuple(ex.Stored(ref) for ref in read_header(tmp_path / "f.safetensors")))
    assert [nbytes for _, _, nbytes in stack.ranges()] == [128]


def test_columns_interleave_the_heads_of_experts(store):
    experts = [torch.randn(10, 24).bfloat16() for _ in range(3)]
    sources = [store(tensor) for tensor in experts]
    segments = tuple((source, 8 * group, 8 * group + 8) for group in range(3) for source in sources)
    wide = ex.Columns(segments)
    expected = torch.stack([e.reshape(10, 3, 8) for e in experts], dim=2).reshape(10, 72)
    assert wide.ranges() is None
    assert len(list(wide.sources())) == 3, "each expert is read once"
    assert same(value(wide), expected)
    assert same(
        value(ex.Columns(((sources[0], 20, 23), (sources[1], 0, 4)))),
        torch.cat([experts[0][:, 20:23], experts[1][:, :4]], 1),
    )
    assert ex.Columns(((sources[0], 0, 24),)).ranges() == sources[0].ranges()
    with pytest.raises(AssertionError):
        ex.Columns(((sources[0], 20, 25),))


def test_transposed(store):
    tensor = torch.randn(9, 7).half()
    assert same(value(ex.Transposed(store(tensor))), tensor.T)
    assert same(value(ex.Rows(ex.Transposed(store(tensor)), ((2, 4), (6, 7)))), tensor.T[[2, 3, 6]])
    assert same(value(ex.Transposed(ex.Rows(store(tensor), ((3, 9),)))), tensor[3:].T)
    assert same(
        value(ex.Transposed(ex.Columns(((store(tensor), 2, 5), (store(tensor), 0, 7))))),
        torch.cat([tensor[:, 2:5], tensor], 1).T,
    )
    twice = ex.Transposed(ex.Transposed(store(tensor)))
    assert twice.ranges() is not None
    assert same(value(twice), tensor)


def test_narrow_strips_of_wide_rows_are_read_alone(store):
    tensor = torch.randn(5, 9000)
    assert same(to_torch(store(tensor).rows(1, 4, (8990, 9000)), "F32"), tensor[1:4, 8990:])
    assert same(to_torch(ex.Transposed(store(tensor)).rows(100, 110), "F32"), tensor[:, 100:110].T)


# Means and other arithmetic.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_parts", [2, 3, 4, 5])
def test_mean_is_the_correctly_rounded_one(store, num_parts, dtype):
    tensors = [torch.randn(100, 500).to(dtype) for _ in range(num_parts)]
    exact = torch.stack([tensor.double() for tensor in tensors]).mean(0)
    found = value(ex.Average(tuple(map(store, tensors))))
    assert same(found, rounded(exact, dtype))
    chained = sum(tensors[1:], tensors[0]) / num_parts
    assert num_parts == 2 or not torch.equal(chained, found), "the test can tell sums in 16 bits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 7])
def test_identical_copies_are_reproduced(store, num_parts, dtype):
    tensor = (torch.randn(50, 400) * 10 ** torch.randint(-4, 4, (50, 1))).to(dtype)
    source = store(tensor)
    assert same(value(ex.Average((source,) * num_parts)), tensor)
    weights = tuple(float(n + 1) / 3 for n in range(num_parts))
    assert same(value(ex.Average((source,) * num_parts, weights)), tensor)


def test_weighted_mean(store):
    a, b = torch.randn(20, 30), torch.randn(20, 30)
    found = value(ex.Average((store(a), store(b)), weights=(3.0, 1.0)))
    assert same(found, ((3 * a.double() + b.double()) / 4).float())
    with pytest.raises(AssertionError):
        ex.Average((store(a), store(b)), weights=(1.0, 0.0))


def test_mean_to_another_dtype_and_of_mixed_ones(store):
    a, b = torch.randn(20, 30).bfloat16(), torch.randn(20, 30)
    mean = ex.Average((store(a), store(b)), dtype="F32")
    assert same(value(mean), ((a.double() + b.double()) / 2).float())
    single = ex.Average((store(b),), dtype="BF16")
    assert single.ranges() is None
    assert same(value(single), b.bfloat16())
    assert ex.Average((store(b),)).ranges() is not None


def test_mean_over_the_parts_that_have_the_row(store):
    short, long, longest = torch.randn(4, 6), torch.randn(9, 6), torch.randn(11, 6)
    mean = value(ex.Average((store(short), store(longest), store(long)), weights=(1.0, 2.0, 5.0)))
    expected = longest.double().clone()
    expected[:9] = (2 * longest[:9].double() + 5 * long.double()) / 7
    expected[:4] = (short.double() + 2 * longest[:4].double() + 5 * long[:4].double()) / 8
    assert same(mean, expected.float())


def test_scaled_gained_and_cast(store):
    tensor, gain = torch.randn(12, 8).bfloat16(), torch.randn(8)
    source = store(tensor)
    assert same(value(ex.Scaled(source, 1 / 3)), (tensor.float() / 3).bfloat16())
    assert ex.Scaled(source, 1.0).ranges() == source.ranges()
    gained = ex.Gained(source, store(gain), offset=1.0)
    assert list(gained.sources())[1].shape == (8,)
    assert same(value(gained), (tensor.float() * (gain + 1)).bfloat16())
    for dtype, code in list(CODES.items())[:4]:
        assert same(value(ex.Cast(source, code)), tensor.to(dtype))
    assert ex.Cast(source, "BF16").ranges() == source.ranges()
    doubled = torch.randn(5, 5, dtype=torch.float64)
    assert same(value(ex.Cast(store(doubled), "F32")), doubled.float())


def test_dtypes_without_arithmetic_are_refused(store):
    whole = store(torch.arange(6))
    for make in (lambda: ex.Average((whole, whole)), lambda: ex.Scaled(whole, 2.0), lambda: ex.Cast(whole, "F32")):
        with pytest.raises(AssertionError):
            make()


# Drawn values.


def test_normal_depends_on_seed_and_key_only():
    draw = generated_tensors.Normal((300, 401), 0.02, seed=1, key="router", dtype="F32")
    first = value(draw)
    assert first.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(first.mean().item()) < 3e-4
    assert (first / 0.02).pow(4).mean().item() == pytest.approx(3.0, rel=0.05)
    assert same(value(generated_tensors.Normal((300, 401), 0.02, 1, "router", "F32")), first)
    for other in (
        generated_tensors.Normal((300, 401), 0.02, 2, "router", "F32"),
        generated_tensors.Normal((300, 401), 0.02, 1, "routes", "F32"),
    ):
        correlation = torch.corrcoef(torch.stack([first.flatten(), value(other).flatten()]))[0, 1].item()
        assert abs(correlation) < 0.02
    assert same(value(generated_tensors.Normal((300, 401), 0.02, 1, "router", "BF16")), first.bfloat16())
    flat = first.flatten()
    assert abs(torch.corrcoef(torch.stack([flat[:50_000], flat[65_536 : 65_536 + 50_000]]))[0, 1].item()) < 0.02


def test_constant():
    assert same(value(generated_tensors.Constant((3, 4), 0.5, "BF16")), torch.full((3, 4), 0.5, dtype=torch.bfloat16))
    assert same(value(generated_tensors.Constant((), 7, "I64")), torch.tensor(7))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partly_redrawn(store, axis, dtype):
    tensor = (torch.randn(200, 300) * torch.linspace(1, 9, 200)[:, None] + 3).to(dtype)
    redrawn = generated_tensors.PartlyRedrawn(store(tensor), 0.5, seed=3, key="up", index_key="expert 1", axis=axis)
    chosen = torch.from_numpy(redrawn.indices)
    assert len(chosen) == len(set(chosen.tolist())) == tensor.shape[axis] // 2
    found = value(redrawn)
    kept = torch.tensor([i for i in range(tensor.shape[axis]) if i not in set(chosen.tolist())])
    assert same(found.index_select(axis, kept), tensor.index_select(axis, kept))
    old, new = tensor.index_select(axis, chosen).double(), found.index_select(axis, chosen).double()
    assert (old == new).float().mean() < 0.02
    assert new.mean().item() == pytest.approx(old.mean().item(), rel=0.05)
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.03)


def test_redrawn_indices_are_shared_within_an_expert_and_differ_between(store):
    up, down = store(torch.randn(64, 16)), store(torch.randn(16, 64))

    def indices(part, axis, index_key, key):
        return generated_tensors.PartlyRedrawn(part, 0.25, 0, key, index_key, axis).indices.tolist()

    assert indices(up, 0, "e0", "gate") == indices(up, 0, "e0", "up") == indices(down, 1, "e0", "down")
    assert indices(up, 0, "e0", "up") != indices(up, 0, "e1", "up")
    nothing = generated_tensors.PartlyRedrawn(up, 0.0, 0, "up", "e0", 0)
    assert nothing.ranges() == up.ranges()
    assert same(value(nothing), value(up))
    everything = generated_tensors.PartlyRedrawn(up, 1.0, 0, "up", "e0", 0)
    assert not (value(everything) == value(up)).any()
    bias = generated_tensors.PartlyRedrawn(store(torch.randn(64)), 0.25, 0, "bias", "e0", 0)
    assert bias.indices.tolist() == indices(up, 0, "e0", "up")
    value(bias)


# Files that change.


def test_a_source_that_is_cut_or_gone(store):
    source = store(torch.randn(50, 50))
    os.truncate(source.ref.file, source.ref.offset + 100)
    with pytest.raises(CheckpointError, match="truncated"):
        source.rows(0, 50)
    with pytest.raises(CheckpointError, match="truncated"):
        source.rows(0, 50, (0, 3))
    source.ref.file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.rows(0, 1)


def test_ranges_are_cut_and_merged():
    file = Path("f")
    ranges = [(file, 100, 10), (file, 0, 5), (file, 5, 7)]
    assert ex.merge_ranges(ranges) == [(file, 100, 10), (file, 0, 12)]
    assert ex.cut_ranges(ranges, 8, 17) == [(file, 108, 2), (file, 0, 5), (file, 5, 2)]
    assert ex.cut_ranges(ranges, 3, 3) == []


def test_dtypes_of_less_than_a_byte_have_no_rows():
    ref = TensorRef("t", "F4", (4,), Path("f"), 0, 2)
    assert ex.Stored(ref).ranges() == [(Path("f"), 0, 2)]
    with pytest.raises(AssertionError):
        ex.Stored(ref).rows(0, 4)


def test_every_kind_has_its_word_in_plans() -> None:
    """A kind without one would end ``--dry-run``; abstract kinds and stored tensors, which are copied, need none."""
    kinds, found = [ex.Expression], set()
    for kind in kinds:  # which grows meanwhile
        kinds += kind.__subclasses__()
        if not (inspect.isabstract(kind) or kind.__name__.startswith("_") or kind is ex.Stored):
            found.add(kind)
    assert found == HOW.keys()
