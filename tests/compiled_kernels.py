"""Compile the fused kernels for a GPU, which need not be there, and print their assembly as JSON.

Usage: python compiled_kernels.py TARGET, run by test_fused_kernels.py without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lars_tree._backends.torch import kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    **dict.fromkeys(("chunks", "layers"), "*i64"),
    **dict.fromkeys(("rules", "sums", "norms", "coefficients", "table"), "*fp64"),
    "first": "i32",
    "unless": "*fp32",
    "bad": "*i32",
}


def compiled(kernel, target, num_warps, constants):
    given = {name: x for name, x in constants.items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in given else POINTERS[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature=types, constexprs=given)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    asm = triton.compile(source, target=target, options=options).asm
    return asm["ptx" if target.backend == "cuda" else "amdgcn"]


def variant(target, dtype, velocity, *, scales=1, joint=False, strided=False, aligned=True):
    constants = {"W": dtype, "G": dtype, "V": velocity, "STORES": True, "bad": None}
    constants |= {"JOINT": joint, "STRIDED": strided, "ALIGNED": aligned, "SCALES": scales}
    every = {
        **dict.fromkeys(("sum_squares", "apply"), kernels.WARPS),
        **dict.fromkeys(("add_sums", "find_coefficients"), 1),
    }
    found = {
        name: compiled(getattr(kernels, name), target, warps, constants)
        for name, warps in every.items()
    }
    guard = {**constants, "STORES": False, "unless": None}
    del guard["bad"]
    return {**found, "nonfinite": compiled(kernels.apply, target, kernels.WARPS, guard)}


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    moving = {"strided": True, "joint": True, "aligned": False}
    print(
        json.dumps(
            {
                "float32": variant(target, tl.float32, tl.float32),
                "float16": variant(target, tl.float16, None),
                "bfloat16": variant(target, tl.bfloat16, tl.float32),
                "strided": variant(target, tl.float32, tl.float32, **moving),
                "float64": variant(target, tl.float64, tl.float64, scales=3, joint=True),
            }
        )
    )
