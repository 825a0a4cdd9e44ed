"""Invalid tensors are refused at the first, a middle and the last leaf, in each mode of update."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
from conftest import need
from faults import check, ones, option, other_w_and_out, put, tie, torch_call

from lars_tree import BackendError, DtypeError, LeafError, OptionError, OutError


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
        warnings.simplefilter("ignore")  # torch warns once that the array is read-only
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
