"""Adapters, so that `check_optimizer_laws` can check the optimizers of torch and optax."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lars_tree import errors
from lars_tree._tree import structure
from lars_tree.testing._arrays import Library, refused
from lars_tree.testing.exact import Convention
from lars_tree.testing.trial import Optimizer, matched


@dataclass(frozen=True)
class Adapter:
    """A function that makes optimizers, with the array library and the convention of these.

    Attributes:
        library: The library of the weights and gradients.
        convention: How a rate enters the momentum; see `check_optimizer_laws`.
    """

    make: Callable[..., Optimizer]
    library: Library
    convention: Convention
    __wrapped__: Any

    @property
    def __name__(self) -> str:
        """The name of the class or function, for reports."""
        return getattr(self.__wrapped__, "__qualname__", None) or repr(self.__wrapped__)

    def __call__(self, lr: float, **options: Any) -> Optimizer:
        """An optimizer with this rate."""
        return self.make(lr, **options)


def for_torch(cls: Any, **options: Any) -> Adapter:
    """Adapt a class of torch optimizers to `check_optimizer_laws`.

    >>> import torch
    >>> from lars_tree.testing import for_torch
    >>> opt = for_torch(torch.optim.SGD, nesterov=True)(lr=0.5, momentum=0.5)
    >>> w, g = {"a": torch.tensor([3.0])}, {"a": torch.tensor([1.0])}
    >>> w, state = opt.update(w, g, opt.init(w))        # 3 - 0.5 * (1 + 0.5 * 1)
    >>> w
    {'a': tensor([2.2500])}

    The state is an optimizer of this class and its parameters, which are copies of the weights. It
    is saved and loaded by `state_dict` and `load_state_dict`, with `torch.save`. A new rate is
    written to all parameter groups, as some schedulers do.

    Args:
        cls: The class, or a function with the same arguments: parameters, then `lr`, `momentum`,
            `weight_decay` and `nesterov` by name, as far as the laws that are checked set them.
        **options: Further options of the class.

    Raises:
        OptionError: A ValueError: `cls` is an optimizer, not a class.
    """
    _check_callable("cls", cls, "a class such as torch.optim.SGD")

    def make(lr: float, **changed: Any) -> Optimizer:
        return _TorchOptimizer(cls, {**options, **changed, "lr": lr})

    return Adapter(make, "torch", "torch", cls)


def for_optax(transform: Callable[..., Any], **options: Any) -> Adapter:
    """Adapt a function that makes transformations of optax to `check_optimizer_laws`.

    >>> import jax.numpy as jnp, optax
    >>> from lars_tree.testing import for_optax
    >>> opt = for_optax(optax.sgd, nesterov=True)(lr=0.5, momentum=0.5)
    >>> w, g = {"a": jnp.array([3.0])}, {"a": jnp.array([1.0])}
    >>> w, state = opt.update(w, g, opt.init(w))
    >>> w
    {'a': Array([2.25], dtype=float32)}

    JAX returns dicts with sorted keys: use `check_optimizer_laws(..., key_order=False)`. If an
    update is None, its weights stay unchanged, as in equinox.

    Args:
        transform: The function, such as `optax.lars`: it takes the rate, then `momentum`,
            `weight_decay` and `nesterov` by name, as far as the laws that are checked set them. A
            rate is a number, and each new rate calls the function again.
        **options: Further options of the function.

    Raises:
        OptionError: A ValueError: `transform` is a transformation, not a function.
    """
    _check_callable("transform", transform, "a function of the rate such as optax.lars")

    def make(lr: float, **changed: Any) -> Optimizer:
        return _OptaxOptimizer(transform(lr, **{**options, **changed}))

    return Adapter(make, "jax", "paper", transform)


def _check_callable(argument: str, x: Any, expected: str) -> None:
    if not callable(x):
        raise refused(argument, f"expected {expected}, got {errors.describe(x)}")


class _TorchOptimizer:
    def __init__(self, cls: Any, options: dict[str, Any]) -> None:
        self._cls, self._options = cls, options

    def init(self, w: Any) -> Any:
        """The optimizer, and its parameters in the order of the leaves of w."""
        import torch

        parameters = [torch.nn.Parameter(x.detach().clone()) for x in structure.leaves(w)]
        # torch refuses an empty list of parameters.
        return self._cls(parameters, **self._options) if parameters else None, parameters

    def update(self, w: Any, dcdw: Any, state: Any) -> tuple[Any, Any]:
        opt, parameters = state
        for p, x, g in zip(parameters, structure.leaves(w), matched(w, dcdw), strict=True):
            p.data.copy_(x)
            p.grad = g
        if opt is not None:
            for group in opt.param_groups:
                group["lr"] = self._options["lr"]
            opt.step()
        return structure.rebuild(w, [p.detach().clone() for p in parameters]), state

    def save(self, state: Any) -> bytes:
        import torch

        file, (opt, _) = io.BytesIO(), state
        torch.save(None if opt is None else opt.state_dict(), file)
        return file.getvalue()

    def load(self, w: Any, saved: bytes) -> Any:
        import torch

        opt, parameters = self.init(w)
        if opt is not None:
            opt.load_state_dict(torch.load(io.BytesIO(saved), weights_only=False))
        return opt, parameters


class _OptaxOptimizer:
    def __init__(self, transform: Any) -> None:
        self._transform = transform

    def init(self, w: Any) -> Any:
        import jax

        with jax.enable_x64(True):  # or float64 weights would become float32
            return self._transform.init(w)

    def update(self, w: Any, dcdw: Any, state: Any) -> tuple[Any, Any]:
        import jax

        def applied(u: Any, x: Any) -> Any:
            return x if u is None else (x + u).astype(x.dtype)

        with jax.enable_x64(True):
            updates, state = self._transform.update(dcdw, state, w)
            return jax.tree.map(applied, updates, w, is_leaf=lambda u: u is None), state
