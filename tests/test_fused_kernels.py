"""The kernels of the fused engine: rounding, bytes read and written, assembly for GPUs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import interpreting, need, need_triton

torch = need("torch")
need_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from test_fused import DEVICE, write  # noqa: E402

from lars_tree._backends.torch import kernel_math, kernels  # noqa: E402
from lars_tree._backends.torch.layers import Layer  # noqa: E402
from lars_tree._numerics import bfloat16  # noqa: E402
from lars_tree._numerics.formula import Rule  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreter")

_load, _rounded, _store, _is_finite = (
    kernels._load,
    kernel_math.rounded,
    kernels._store,
    kernel_math.is_finite,
)

# The interpreter takes the same time for a block of any size.
BLOCK = 2**18 if DEVICE.type == "cpu" else 1024

with interpreting():

    @triton.jit
    def convert(x, size, out, flags, FROM: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < size
        value = _load(tl.load(x), i, mask, FROM, False, True)
        new = _rounded(value, TO)
        _store(tl.load(out), i, mask, new, TO, False, True)
        tl.store(flags + i, _is_finite(new, TO).to(tl.int8), mask=mask)


def converted(x, to):
    """The tensor in another format, and whether each result is finite, by the kernels."""
    x = x.to(DEVICE)
    out = torch.empty(x.shape, dtype=to, device=DEVICE)
    flags = torch.empty(x.shape, dtype=torch.int8, device=DEVICE)
    addresses = (torch.tensor(y.data_ptr(), device=DEVICE) for y in (x, out))
    x_address, out_address = addresses
    formats = (getattr(tl, str(y.dtype).removeprefix("torch.")) for y in (x, out))
    grid = (triton.cdiv(x.numel(), BLOCK),)
    convert[grid](x_address, x.numel(), out_address, flags, *formats, BLOCK)
    return out.cpu(), flags.bool().cpu()


HALF = pytest.mark.parametrize("name", ["float16", "bfloat16"])


def every_number(name):
    """All bits of a format of 2 bytes, and their values as float64."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(np.float16).astype(float) if name == "float16" else bfloat16.decode(bits)
    return torch.from_numpy(bits.view(np.int16)).view(getattr(torch, name)), values


def bits_of(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize]).numpy()


@HALF
def test_all_numbers_of_half_precision_are_read_and_written_exactly(name):
    x, values = every_number(name)
    wide, is_finite = converted(x, torch.float64)
    assert np.array_equal(wide.numpy(), values, equal_nan=True)
    numbers = ~np.isnan(values)  # the sign of NaN may differ
    assert np.array_equal(np.signbit(wide.numpy())[numbers], np.signbit(values)[numbers])
    assert np.array_equal(is_finite, np.isfinite(values))
    again, is_finite = converted(torch.from_numpy(values), x.dtype)
    assert np.array_equal(is_finite, np.isfinite(values))
    assert np.array_equal(bits_of(again)[numbers], bits_of(x)[numbers])
    assert again[~torch.from_numpy(numbers)].isnan().all()


def check_midpoints(ordered, step, dtype):
    """Midpoints of neighbours are rounded to the even one; numbers near them to the nearer one.

    `step` is the distance from the largest number to the one that would follow: numbers from half
    of it on become infinite.
    """
    upper = np.append(ordered[1:], np.inf)
    middle = np.append((ordered[1:] + ordered[:-1]) / 2, ordered[-1] + step / 2)
    below, above = (np.nextafter(middle, end) for end in (-np.inf, np.inf))
    for sign in (1, -1):
        given = torch.from_numpy(sign * np.concatenate([middle, below, above]))
        at, low, high = np.split(converted(given, dtype)[0].double().numpy(), 3)
        assert np.array_equal(low, sign * ordered)
        assert np.array_equal(high, sign * upper)
        rounded = torch.from_numpy(at).to(dtype)
        assert (bits_of(rounded) % 2 == 0).all()
        assert ((at == low) | (at == high)).all()


@HALF
def test_half_precision_is_rounded_once_to_nearest_even(name):
    """Rounding to float32 first would round some neighbours of midpoints to the wrong side."""
    x, values = every_number(name)
    ordered = np.unique(values[np.isfinite(values) & (values >= 0)])
    assert len(ordered) > 31_000
    check_midpoints(ordered, ordered[-1] - ordered[-2], x.dtype)


def test_float32_is_rounded_once_to_nearest_even():
    rng = np.random.default_rng(0)
    ends = [0, 1, 2, 0x007FFFFE, 0x007FFFFF, 0x00800000, 0x00800001, 0x7F7FFFFE]
    bits = np.concatenate([ends, rng.integers(0, 0x7F7FFFFE, 10_000)]).astype(np.int32)
    for first in bits[:8], bits[8:]:
        for number in np.unique(first) if len(first) == 8 else [first]:
            pair = np.stack([number, number + 1]).reshape(2, -1)
            low, high = (x.view(np.float32).astype(float) for x in pair)
            middle = (low + high) / 2
            near, far = np.nextafter(middle, low), np.nextafter(middle, high)
            given = torch.from_numpy(np.concatenate([near, middle, far]))
            down, at, up = np.split(bits_of(converted(given, torch.float32)[0]), 3)
            assert np.array_equal(down, pair[0])
            assert np.array_equal(up, pair[1])
            assert np.array_equal(at, pair[0] + pair[0] % 2)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_numbers_out_of_range_become_infinite_or_zero(name):
    dtype = getattr(torch, name)
    inf, nan = torch.inf, torch.nan
    numbers = [inf, -inf, nan, 0.0, -0.0, 1e308, -1e308, 5e-324, -5e-324]
    given = torch.tensor(numbers, dtype=torch.float64)
    given[2:3].view(torch.int64)[:] = 2**63 - 1  # a NaN whose bits are all 1
    out, is_finite = converted(given, dtype)
    expected = given if name == "float64" else given.to(dtype)
    assert np.array_equal(out.double(), expected.double(), equal_nan=True)
    assert np.array_equal(np.signbit(out.double().numpy()), np.signbit(given.numpy()))
    assert is_finite.tolist() == expected.isfinite().tolist()
    assert name == "float64" or expected[5:].abs().tolist() == [inf, inf, 0, 0]


# ---- Bytes


@pytest.fixture
def traffic(monkeypatch):
    """Counts the addresses that the interpreter reads and writes, by the sizes of elements."""
    if DEVICE.type != "cpu":
        pytest.skip("counts what the interpreter does")
    from triton.runtime.interpreter import InterpreterBuilder

    found = []

    def watched(name):
        original = getattr(InterpreterBuilder, f"create_masked_{name}")

        def access(builder, pointers, *args):
            mask = args[name == "store"].data
            addresses = np.asarray(pointers.data)[np.broadcast_to(mask, pointers.data.shape)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            found.append((name, addresses, size))
            return original(builder, pointers, *args)

        monkeypatch.setattr(InterpreterBuilder, f"create_masked_{name}", access)

    watched("load")
    watched("store")
    return found


def times(found, x):
    """How many times each byte of a tensor is read and written."""
    start, end = x.data_ptr(), x.data_ptr() + x.nbytes
    counts = Counter()
    for name, addresses, size in found:
        inside = (addresses >= start) & (addresses < end)
        counts[name] += int(inside.sum()) * size
    assert all(count % max(x.nbytes, 1) == 0 for count in counts.values())
    return tuple(counts[name] // max(x.nbytes, 1) for name in ("load", "store"))


def layer(dtype, size, moves=True, **options):
    w, dcdw = (torch.ones(size, dtype=dtype, device=DEVICE) for _ in range(2))
    kept = torch.float32 if dtype.itemsize == 2 else dtype
    velocity = torch.ones(size, dtype=kept, device=DEVICE) if moves else None
    return Layer(w, dcdw, w, velocity, Rule(0.1, momentum=0.9 * moves, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_reads_and_writes_7_bytes_for_each_byte_of_the_weights(dtype, traffic):
    layers = [layer(dtype, size) for size in (16384 + 3, 5, 0)]
    layers[1] = layers[1]._replace(rule=layers[0].rule._replace(joint_norm=True, decay_lambda=0.1))
    write(layers)
    for x in layers[:2]:
        assert times(traffic, x.w) == (2, 1)
        assert times(traffic, x.dcdw) == (2, 0)
        assert times(traffic, x.velocity) == (1, 1)
    if dtype == torch.float32:
        w = layers[0].w
        moved = sum(sum(times(traffic, x)) * x.nbytes for x in layers[0][:2] + layers[0][3:4])
        assert moved == 7 * w.nbytes
    tables = sum(len(addresses) * size for _, addresses, size in traffic)
    tables -= sum(sum(times(traffic, x)) * x.nbytes for y in layers[:2] for x in (*y[:2], y[3]))
    assert tables < 4000  # five chunks of two layers


def test_steps_without_adaptation_or_momentum_read_less(traffic):
    layers = [layer(torch.float32, 5, moves=False), layer(torch.float32, 5, adapt=False)]
    write(layers)
    assert times(traffic, layers[0].w) == (2, 1)
    assert times(traffic, layers[0].dcdw) == (2, 0)
    assert times(traffic, layers[1].w) == (1, 1)
    assert times(traffic, layers[1].dcdw) == (1, 0)
    assert times(traffic, layers[1].velocity) == (1, 1)


def test_float64_sums_read_three_times(traffic):
    """Once for each scale; a GPU has the elements of the second and third time in its cache."""
    ours = layer(torch.float64, 5)
    write([ours])
    assert times(traffic, ours.w) == (4, 1)
    assert times(traffic, ours.velocity) == (1, 1)


# ---- Assembly


def assembly(target, folder, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    script = Path(__file__).parent / "compiled_kernels.py"
    command = [sys.executable, str(script), target]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_compile_for_nvidia_gpus(target, tmp_path, monkeypatch):
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this build of Triton has no compiler for NVIDIA GPUs")
    found = assembly(target, tmp_path, monkeypatch)
    assert f".target {target}" in found["float32"]["apply"]
    for name, ptx in ((f"{x}/{y}", z) for x, each in found.items() for y, z in each.items()):
        # Each operation is rounded to nearest, and nothing is fused, approximated or flushed.
        inexact = re.findall(r"\b(?:fma|mad)\.(?:rn\.)?f\w+|\S*\.(?:ftz|approx|full)\b\S*", ptx)
        assert inexact == [], name
        assert "f64" in ptx
    for each in found.values():
        assert "sqrt.rn.f64" in each["add_sums"]
        assert "div.rn.f64" in each["find_coefficients"]
    for name, vector in (("float32", "v4.b32"), ("float16", "v2.b32"), ("bfloat16", "v2.b32")):
        assert f"ld.global.{vector}" in found[name]["sum_squares"]
        assert f"ld.global.{vector}" in found[name]["apply"]
        assert f"st.global.{vector}" in found[name]["apply"]
        assert "st.global.v" not in found[name]["nonfinite"]
    assert "ld.global.v2.b64" in found["float64"]["apply"]
    assert "global.v" not in found["strided"]["apply"]
    # Rounded once, not by way of float32.
    assert "cvt.rn.f16.f64" in found["float16"]["apply"]
    assert "cvt.rn.f32.f64" not in found["float16"]["apply"]


def test_kernels_compile_for_amd_gpus(tmp_path, monkeypatch):
    if "amd" not in triton.backends.backends:
        pytest.skip("this build of Triton has no compiler for AMD GPUs")
    found = assembly("gfx942", tmp_path, monkeypatch)
    for name, vector in (("float32", "dwordx2 "), ("float16", "dword "), ("bfloat16", "dword ")):
        assert f"global_load_{vector}" in found[name]["sum_squares"]
        assert f"global_store_{vector}" in found[name]["apply"]
    for name in found:
        for kernel in ("sum_squares", "apply"):  # the others divide, which uses v_fma_f64
            assert not re.search(r"\bv_(fma|fmac)_f64", found[name][kernel]), name
    assert "v_cvt_f32_f64" not in found["float16"]["apply"]
