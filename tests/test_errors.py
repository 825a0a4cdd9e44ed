"""Bad input: each kind of mistake, at the first, a middle and the last leaf, in every way to call.

After each the bytes of w, dcdw and out are what they were.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from conftest import need
from numpy.lib.stride_tricks import as_strided

from lars_tree import (
    BackendError,
    Container,
    DtypeError,
    LarsTreeError,
    LeafError,
    NonFiniteError,
    OptionError,
    OutError,
    ShapeError,
    StructureError,
    lars_update,
)

KEYS = ["a", "b", "c", "d", "e"]


@dataclass
class Call:
    """The arguments of one call, to be spoilt at one leaf."""

    w: dict[str, Any]
    g: dict[str, Any]
    out: dict[str, Any] | None
    lr: Any = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def spoil(self, side: str, key: str, value: Any) -> None:
        """Put a value into w, g or out; in place out is w, so w takes what out should have."""
        getattr(self, side)[key] = value

    def run(self) -> Any:
        return lars_update(self.w, self.g, self.lr, out=self.out, **self.options)


def numpy_call(mode):
    w = {key: np.arange(1, 7, dtype=np.float32).reshape(2, 3) for key in KEYS}
    g = {key: np.ones((2, 3), np.float32) for key in KEYS}
    out = {"new": None, "in place": w, "into out": {k: np.zeros_like(x) for k, x in w.items()}}
    return Call(w, g, out[mode])


def torch_call(mode):
    torch = need("torch")
    w = {key: torch.arange(1.0, 7).reshape(2, 3) for key in KEYS}
    g = {key: torch.ones(2, 3) for key in KEYS}
    out = {"new": None, "in place": w, "into out": {k: torch.zeros(2, 3) for k in KEYS}}
    return Call(w, g, out[mode])


def contents(call):
    """The bytes of all memory that the call can reach."""
    found = []
    for tree in (call.w, call.g, call.out or {}):
        for key in KEYS:
            x = tree.get(key)
            if isinstance(x, np.ndarray) and x.dtype != object:
                found.append(x.tobytes())
            elif type(x).__name__ == "Tensor" and not x.is_sparse and x.device.type == "cpu":
                found.append(bytes(x.detach().untyped_storage()))
            else:
                found.append(id(x))
    return found


def put(side, value, **options):
    """A way to spoil: this value at one leaf of one argument."""

    def spoil(call, key):
        call.spoil(side, key, value() if callable(value) else value)
        call.options |= options

    return spoil


def ones(dtype, shape=(2, 3)):
    return lambda: np.ones(shape, dtype)


def drop(side):
    return lambda call, key: getattr(call, side).pop(key)


def rename(side):
    def spoil(call, key):
        getattr(call, side)[key + "x"] = getattr(call, side).pop(key)

    return spoil


def option(name, value):
    """A way to spoil: this value of an option at one leaf, good ones elsewhere."""

    def spoil(call, key):
        prefix = dict.fromkeys(KEYS, 1.0) | {key: value}
        if name == "lr":
            call.lr = prefix
        else:
            call.options[name] = prefix

    return spoil


def other_w_and_out(make):
    """A way to spoil: w (and out, if it is another tree) of a bad kind at one leaf."""

    def spoil(call, key):
        call.w[key] = make()
        if call.out is not None and call.out is not call.w:
            call.out[key] = make()

    return spoil


INPUTS = {
    "dcdw lacks a key": (drop("g"), StructureError, "dcdw"),
    "dcdw has a misspelt key": (rename("g"), StructureError, "dcdw"),
    "dcdw has a node for a leaf": (put("g", {"u": 1.0}), StructureError, "dcdw"),
    "dcdw is a list": (put("g", [1.0, 2.0]), StructureError, "dcdw"),
    "dcdw is an object": (put("g", object), LeafError, "dcdw"),
    "dcdw is a string": (put("g", "1.0"), LeafError, "dcdw"),
    "dcdw is a bool": (put("g", True), LeafError, "dcdw"),
    "dcdw has another shape": (put("g", ones(np.float32, (3, 2))), ShapeError, "dcdw"),
    "dcdw has more axes": (put("g", ones(np.float32, (1, 2, 3))), ShapeError, "dcdw"),
    "dcdw is integer": (put("g", ones(int)), DtypeError, "dcdw"),
    "dcdw is an array of bool": (put("g", ones(bool)), DtypeError, "dcdw"),
    "dcdw is an array of objects": (put("g", ones(object)), DtypeError, "dcdw"),
    "dcdw is an array of strings": (put("g", ones("U3")), DtypeError, "dcdw"),
    "dcdw is an array of dates": (put("g", ones("M8[s]")), DtypeError, "dcdw"),
    "dcdw is complex, w real": (put("g", ones(complex)), DtypeError, "dcdw"),
    "dcdw is a complex number": (put("g", 1j), DtypeError, "dcdw"),
    "dcdw is masked": (put("g", lambda: np.ma.ones((2, 3))), LeafError, "dcdw"),
    "dcdw is of another library": (
        put("g", lambda: need("torch").ones(2, 3)),
        BackendError,
        "dcdw",
    ),
    "w is integer": (other_w_and_out(ones(int)), DtypeError, "w"),
    "w is an array of bool": (other_w_and_out(ones(bool)), DtypeError, "w"),
    "w is an array of objects": (other_w_and_out(ones(object)), DtypeError, "w"),
    "w is an array of strings": (other_w_and_out(ones("U3")), DtypeError, "w"),
    "w is an array of dates": (other_w_and_out(ones("M8[s]")), DtypeError, "w"),
    "w is complex, dcdw real": (other_w_and_out(ones(complex)), DtypeError, "dcdw"),
    "w is an object": (other_w_and_out(object), LeafError, "w"),
    "w is a number": (other_w_and_out(lambda: 1.0), LeafError, "w"),
    "w is a list": (other_w_and_out(lambda: [1.0, 2.0]), LeafError, "w"),
    "lr has a bad shape": (option("lr", np.ones(2)), ShapeError, "lr"),
    "eps has a shape": (option("eps", np.ones(3)), OptionError, "eps"),
    "layer_axis is out of range": (option("layer_axis", 2), OptionError, "layer_axis"),
    "layer_axis is no integer": (option("layer_axis", 0.5), OptionError, "layer_axis"),
    "nonfinite is misspelt": (option("nonfinite", "rais"), OptionError, "nonfinite"),
    "adapt is no bool": (option("adapt", 1), OptionError, "adapt"),
    "trust_clip is no bool": (option("trust_clip", "yes"), OptionError, "trust_clip"),
    "stop_gradients is no bool": (option("stop_gradients", None), OptionError, "stop_gradients"),
    "the new weights are not finite": (
        put("g", lambda: np.full((2, 3), np.nan), nonfinite="raise"),
        NonFiniteError,
        "dcdw",
    ),
}
BAD_NUMBERS = [np.nan, np.inf, -0.5, True, np.True_, 1j, "0.1", None, 10**400, np.array([-1.0] * 3)]
for _name in ("lr", "decay_lambda", "eps", "trust_coefficient", "grad_scale"):
    for _bad in BAD_NUMBERS:
        INPUTS[f"{_name} is {_bad!r:.20}"] = (option(_name, _bad), OptionError, _name)
INPUTS["grad_scale is 0"] = (option("grad_scale", 0.0), OptionError, "grad_scale")


def read_only():
    x = np.zeros((2, 3), np.float32)
    x.flags.writeable = False
    return x


def tie(call, key):
    other = KEYS[(KEYS.index(key) + 1) % len(KEYS)]
    call.out[key] = call.out[other]


OUTS = {
    "out lacks a key": (drop("out"), StructureError, "out"),
    "out has a node for a leaf": (put("out", {"u": 1.0}), StructureError, "out"),
    "out is None": (put("out", None), LeafError, "out"),
    "out is a number": (put("out", 1.0), LeafError, "out"),
    "out has another shape": (put("out", ones(np.float32, (1, 2, 3))), OutError, "out"),
    "out has another dtype": (put("out", ones(np.float64)), OutError, "out"),
    "out is of another library": (
        put("out", lambda: need("torch").zeros(2, 3)),
        BackendError,
        "out",
    ),
    "out is read-only": (put("out", read_only), OutError, "out"),
    "out overlaps itself": (
        put("out", lambda: as_strided(np.zeros(4, np.float32), (2, 3), (4, 4))),
        OutError,
        "out",
    ),
    "two leaves of out are one": (tie, OutError, "out"),
}


def check(call, key, spoil, kind, argument):
    spoil(call, key)
    before = contents(call)
    with pytest.raises(kind) as caught:
        call.run()
    assert contents(call) == before
    assert type(caught.value) is kind
    assert caught.value.argument == argument
    assert argument in str(caught.value)
    names = [*caught.value.paths, *str(caught.value).split()]
    assert (key,) in names or any(key in str(name) for name in names)
    assert "expected" in str(caught.value) or kind in (StructureError, OutError)


@pytest.mark.parametrize("key", ["a", "c", "e"])
@pytest.mark.parametrize("mode", ["new", "in place", "into out"])
@pytest.mark.parametrize("case", INPUTS)
def test_bad_input_is_refused_before_anything_is_written(case, mode, key):
    check(numpy_call(mode), key, *INPUTS[case])


@pytest.mark.parametrize("key", ["a", "c", "e"])
@pytest.mark.parametrize("case", OUTS)
def test_a_bad_out_is_refused_before_anything_is_written(case, key):
    check(numpy_call("into out"), key, *OUTS[case])


def freed():
    x = need("torch").ones(2, 3)
    x.untyped_storage().resize_(0)
    return x


def tensor(method, *args, **options):
    return lambda: getattr(need("torch").ones(2, 3, **options), method)(*args)


TORCH_INPUTS = {
    "dcdw is sparse": (put("g", tensor("to_sparse")), LeafError, "dcdw"),
    "dcdw was freed": (put("g", freed), LeafError, "dcdw"),
    "dcdw is on meta": (put("g", tensor("to", "meta")), LeafError, "dcdw"),
    "dcdw is quantised to integers": (put("g", tensor("int")), DtypeError, "dcdw"),
    "dcdw is float8": (put("g", tensor("to", "float8")), DtypeError, "dcdw"),
    "dcdw is of numpy": (put("g", ones(np.float32)), BackendError, "dcdw"),
    "w is sparse": (other_w_and_out(tensor("to_sparse")), LeafError, "w"),
    "w was freed": (other_w_and_out(freed), LeafError, "w"),
    "w is on meta": (other_w_and_out(tensor("to", "meta")), LeafError, "w"),
    "w has no data yet": (
        other_w_and_out(lambda: need("torch").nn.UninitializedParameter()),
        LeafError,
        "w",
    ),
    "lr is negative": (
        option("lr", lambda: need("torch").tensor(-1.0)),
        OptionError,
        "lr",
    ),
}


@pytest.mark.parametrize("key", ["a", "c", "e"])
@pytest.mark.parametrize("mode", ["new", "in place", "into out"])
@pytest.mark.parametrize("case", TORCH_INPUTS)
def test_bad_tensors_are_refused_before_anything_is_written(case, mode, key):
    torch = need("torch")
    call = torch_call(mode)
    if case == "dcdw is float8":
        call.g[key] = torch.ones(2, 3).to(torch.float8_e4m3fn)
        check(call, key, lambda call, key: None, DtypeError, "dcdw")
    elif case == "lr is negative":
        check(call, key, option("lr", torch.tensor(-1.0)), OptionError, "lr")
    else:
        check(call, key, *TORCH_INPUTS[case])


def read_only_map(path):
    torch = need("torch")
    np.zeros(1000, np.float32).tofile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, once
        return torch.from_numpy(np.memmap(path, np.float32, "r", shape=(2, 3)))


@pytest.mark.parametrize("key", ["a", "c", "e"])
@pytest.mark.parametrize(
    "case", ["freed", "meta", "expanded", "tied", "requires a gradient", "mapped", "conjugated"]
)
def test_a_bad_out_of_torch_is_refused(case, key, tmp_path):
    torch = need("torch")
    call, kind = torch_call("into out"), OutError
    if case == "freed":
        call.out[key] = freed()
    elif case == "meta":
        call.out[key] = torch.zeros(2, 3, device="meta")
    elif case == "expanded":
        call.out[key] = torch.zeros(3).expand(2, 3)
    elif case == "tied":
        tie(call, key)
    elif case == "requires a gradient":
        call.out[key].requires_grad_()
        call.options["stop_gradients"] = False
    elif case == "conjugated":
        for tree in (call.w, call.g, call.out):
            tree[key] = tree[key].to(torch.complex64)
        call.out[key] = call.out[key].conj()
    elif sys.platform == "linux":
        call.out[key] = read_only_map(tmp_path / "weights")
    else:
        pytest.skip("only Linux tells how memory is mapped")
    check(call, key, lambda call, key: None, kind, "out")


@pytest.mark.parametrize("name", ["jax", "dask"])
def test_immutable_arrays_point_to_the_returned_value(name):
    from conftest import to_library

    need("dask.array" if name == "dask" else name)
    w = {"a": to_library(name, np.ones(3))}
    with pytest.raises(OutError, match="use the returned value"):
        lars_update(w, w, 0.1, out=w)


def test_numpy_scalars_are_immutable():
    with pytest.raises(OutError, match="immutable"):
        lars_update(np.float32(1), np.float32(1), 0.1, out=np.float32(0))


def test_jax_arrays_on_different_devices_are_refused():
    jax = need("jax")
    here, there = (jax.device_put(np.ones(3), device) for device in jax.devices()[:2])
    with pytest.raises(BackendError, match=r"(?s)head.*cpu:0.*cpu:1"):
        lars_update({"head": here}, {"head": there}, 0.1)


def test_a_deleted_jax_array_is_refused():
    jnp = need("jax.numpy")
    w = jnp.ones(3)
    w.delete()
    with pytest.raises(LeafError, match="deleted or donated"):
        lars_update(w, jnp.ones(3), 0.1)


def test_values_that_are_not_known_cannot_raise():
    jax, da = need("jax"), need("dask.array")
    update = jax.jit(lambda w: lars_update(w, w, 0.1, nonfinite="raise"))
    with pytest.raises(OptionError, match="traced or lazy"):
        update(jax.numpy.ones(3))
    with pytest.raises(OptionError, match="traced or lazy"):
        lars_update(da.ones(3), da.ones(3), 0.1, nonfinite="raise")


def test_a_dask_array_of_unknown_shape_is_refused():
    x = need("dask.array").ones(4)
    with pytest.raises(LeafError, match="unknown shape"):
        lars_update(x[x > 0], x[x > 0], 0.1)


def test_a_structure_error_lists_all_paths_and_near_misses():
    w = Container(
        encoder={"l0": {"kernel": np.ones(2), "bias": np.ones(2)}}, head={"w": np.ones(3)}
    )
    g = {"encoder": {"l0": {"kernel": np.ones(2), "bais": np.ones(2)}}, "head": {"w": {"u": 1}}}
    with pytest.raises(StructureError) as caught:
        lars_update(w, g, 0.1)
    assert str(caught.value).splitlines() == [
        "dcdw does not match w",
        "  encoder/l0: missing 'bias'; unexpected 'bais' (did you mean 'bias'?)",
        "  head/w: expected an array of shape (3,), got a dict with keys 'u'",
    ]


def test_a_long_list_of_paths_ends_in_a_count():
    w = {f"layer{i:02}": np.ones(2) for i in range(30)}
    g = {key: np.ones(3) for key in w}
    with pytest.raises(ShapeError) as caught:
        lars_update(w, g, 0.1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[1].startswith("  layer00: expected a shape that broadcasts to (2,), got (3,)")
    assert lines[-1] == "  and 20 more"
    assert len(caught.value.paths) == 30


def test_a_gradient_where_the_weights_have_none_is_not_dropped_silently():
    w = {"a": np.ones(2), "b": None}
    with pytest.raises(StructureError, match="b: expected None"):
        lars_update(w, {"a": np.ones(2), "b": np.ones(2)}, 0.1)
    assert lars_update(w, 1.0, 0.1)["b"] is None


def test_a_nest_that_holds_itself_is_named():
    w = Container(a=np.ones(2), b={})
    w.b["again"] = w
    with pytest.raises(StructureError, match=r"(?s)w holds itself.*b/again"):
        lars_update(w, 1.0, 0.1)
    loop = []
    loop.append(loop)
    with pytest.raises(StructureError, match="lr holds itself"):
        lars_update([np.ones(1)], 1.0, loop)


@pytest.mark.parametrize("depth", [50, 100_000])
def test_a_deep_nest_works_or_is_a_recursion_error(depth):
    w = np.ones(1)
    for _ in range(depth):
        w = [w]
    if depth < 100:
        new = lars_update(w, 1.0, 0.1)
        for _ in range(depth):
            (new,) = new
        assert new.tolist() == [0.9]
    else:
        with pytest.raises(RecursionError, match="recursion limit"):
            lars_update(w, 1.0, 0.1)


def test_all_errors_have_one_base():
    with pytest.raises(LarsTreeError):
        lars_update(np.ones(2), np.ones(3), 0.1)


def test_the_published_signature_is_positional_then_keyword_only():
    with pytest.raises(TypeError):
        lars_update(w=np.ones(2), dcdw=np.ones(2), lr=0.1)
    with pytest.raises(TypeError):
        lars_update(np.ones(2), np.ones(2), 0.1, 0.5)
