"""Optimizers whose moments are codes of 8 bits: `pyqkern.optim.AdamW8bit(model.parameters())` for `torch.optim.AdamW`.

The state is bitsandbytes': of each parameter of 4096 elements or more, two bytes an element for Adam and one for SGD
and Lion, codes of its dynamic maps with an fp32 scale for each 256 of them; smaller ones have fp32 moments. Its
optimizers' state_dicts load here and those from here load there. docs/training.md has the rules and what was measured.
"""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from pyqkern.schemes import check_type
from pyqkern.training.optimizer import Optimizer8bit, check_betas, check_number, check_rate, scalar

__all__ = ["Adam8bit", "AdamW8bit", "Lion8bit", "Optimizer8bit", "SGD8bit", "param_groups"]

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Adam8bit(Optimizer8bit):
    """torch.optim.Adam with moments of 8 bits.

    params, lr, betas, eps, weight_decay, maximize, decoupled_weight_decay: as torch.optim.Adam. weight_decay is added
    to the gradient (L2) unless it is decoupled, as AdamW8bit's and that of bitsandbytes' Adam8bit are.
    bits: 8, or 32 for moments in fp32. min_8bit_size: parameters of fewer elements have fp32 moments.
    max_grad_norm: the norm of all gradients together is clipped to it, in the same pass; None: it is not. bits,
    min_8bit_size and the numbers can differ between parameter groups; see `param_groups`.

    Parameters and gradients: fp32, bf16 or fp16, dense, of any strides. A step raises ValueError, and changes nothing,
    where a gradient is NaN, infinite or 2**59 and more. eps must be above 0: a second moment of 8 bits may be 0 where
    the exact one is not.

    m = beta1 * m + (1 - beta1) * g and v = beta2 * v + (1 - beta2) * g**2 in fp32, in one pass over each parameter, p
    by Adam's rule from these, before they become codes again.
    """

    _optimizer, _moments = "adam", 2
    _decoupled = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool | None = None,
        maximize: bool = False,
        bits: int = 8,
        min_8bit_size: int = 4096,
        max_grad_norm: float | None = None,
    ) -> None:
        decoupled = self._decoupled if decoupled_weight_decay is None else decoupled_weight_decay
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled_weight_decay": decoupled}
        super().__init__(params, own, maximize, bits, min_8bit_size, max_grad_norm)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_rate(group)
        check_betas(group["betas"])
        check_number("eps", group["eps"], above=1e-38)
        check_type("decoupled_weight_decay", group["decoupled_weight_decay"], bool, "a bool")

    def _numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        lr, decay, (beta1, beta2) = scalar(group["lr"]), group["weight_decay"], group["betas"]
        decoupled = group["decoupled_weight_decay"]
        return {
            "l2": 0.0 if decoupled else decay,
            "decay": 1 - lr * decay if decoupled else 1.0,
            "keep1": beta1,
            "add1": 1 - beta1,
            "keep2": beta2,
            "add2": 1 - beta2,
            "root": (1 - beta2**step) ** -0.5,
            "eps": group["eps"],
            "size": -lr / (1 - beta1**step),
        }


class AdamW8bit(Adam8bit):
    """torch.optim.AdamW with moments of 8 bits: Adam8bit with a weight decay of its own, p * (1 - lr * weight_decay).

    >>> import torch, pyqkern
    >>> linear = torch.nn.Linear(64, 64)
    >>> optimizer = pyqkern.optim.AdamW8bit(linear.parameters(), lr=1e-2)
    >>> linear(torch.ones(1, 64)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[linear.weight]["state1"].dtype
    torch.uint8
    """

    _decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        bits: int = 8,
        min_8bit_size: int = 4096,
        max_grad_norm: float | None = None,
    ) -> None:
        options = {"maximize": maximize, "bits": bits, "min_8bit_size": min_8bit_size, "max_grad_norm": max_grad_norm}
        super().__init__(params, lr, betas, eps, weight_decay, **options)  # type: ignore[arg-type]


class SGD8bit(Optimizer8bit):
    """torch.optim.SGD with a momentum of 8 bits.

    params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD, but that momentum must be
    above 0 and below 1: without it SGD has no state. The rest is as in `Adam8bit`.
    """

    _optimizer, _moments = "momentum", 1

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        bits: int = 8,
        min_8bit_size: int = 4096,
        max_grad_norm: float | None = None,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, own | {"nesterov": nesterov}, maximize, bits, min_8bit_size, max_grad_norm)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_rate(group)
        check_number("momentum", group["momentum"], above=0.0, below=1.0)
        check_number("dampening", group["dampening"])
        check_type("nesterov", group["nesterov"], bool, "a bool")
        if group["nesterov"] and group["dampening"] != 0:
            raise ValueError(f"dampening must be 0 with nesterov, got {group['dampening']}")

    def _numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        momentum, nesterov = group["momentum"], group["nesterov"]
        return {
            "l2": group["weight_decay"],
            "keep1": momentum,
            "add1": 1.0 if step == 1 else 1 - group["dampening"],
            "keep2": momentum if nesterov else 1.0,
            "add2": float(nesterov),
            "size": -scalar(group["lr"]),
        }

    def _to_bitsandbytes(self, group: dict[str, Any]) -> dict[str, Any]:
        return group | {"betas": (group["momentum"], group["dampening"]), "eps": 0.0}

    def _from_bitsandbytes(self, group: dict[str, Any]) -> dict[str, Any]:
        group.pop("eps", None)
        betas = group.pop("betas", None)
        return {"momentum": betas[0], "dampening": betas[1]} | group if betas else group


class Lion8bit(Optimizer8bit):
    """Lion (Chen et al., "Symbolic discovery of optimization algorithms", 2023) with a moment of 8 bits.

    p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g.
    lr, betas, weight_decay: as in bitsandbytes, whose decay is decoupled too. The rest is as in `Adam8bit`.
    """

    _optimizer, _moments = "lion", 1

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        bits: int = 8,
        min_8bit_size: int = 4096,
        max_grad_norm: float | None = None,
    ) -> None:
        own = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, own, maximize, bits, min_8bit_size, max_grad_norm)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_rate(group)
        check_betas(group["betas"])

    def _numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        lr, (beta1, beta2) = scalar(group["lr"]), group["betas"]
        return {
            "decay": 1 - lr * group["weight_decay"],
            "keep1": beta1,
            "add1": 1 - beta1,
            "keep2": beta2,
            "add2": 1 - beta2,
            "size": -lr,
        }

    def _to_bitsandbytes(self, group: dict[str, Any]) -> dict[str, Any]:
        return group | {"eps": 0.0}


Where = str | type[nn.Module]


def param_groups(model: nn.Module, options: Mapping[Where, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The model's trained parameters in groups: each with the options of the first key that fits it, the rest without.

    A key is a pattern for the names of parameters (fnmatch, "*.bias"), or a type of module, for its own parameters.
    Raises ValueError where a key fits no parameter that is trained.

    >>> import torch, pyqkern
    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 2))
    >>> groups = pyqkern.optim.param_groups(model, {torch.nn.Embedding: {"bits": 32}, "*.bias": {"weight_decay": 0.0}})
    >>> [(len(group["params"]), group.get("bits")) for group in groups]
    [(1, None), (1, 32), (1, None)]
    """
    check_type("model", model, nn.Module, "an nn.Module")
    check_type("options", options, Mapping, "a dict of patterns or types to options")
    fits: dict[Where, Callable[[str, nn.Module], bool]] = {}
    for key in options:
        if isinstance(key, str):
            fits[key] = lambda name, _, key=key: fnmatchcase(name, key)  # type: ignore[misc]
        elif isinstance(key, type) and issubclass(key, nn.Module):
            fits[key] = lambda _, module, key=key: isinstance(module, key)  # type: ignore[misc]
        else:
            raise TypeError(f"options must have patterns or types of modules for keys, got {key!r}")
    rest: dict[str, Any] = {"params": []}
    groups: dict[Where, dict[str, Any]] = {key: {"params": [], **options[key]} for key in options}
    seen = set()
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                group = next((groups[key] for key, fit in fits.items() if fit(name, module)), rest)
                group["params"].append(parameter)
    if unused := [key for key, group in groups.items() if not group["params"]]:
        raise ValueError(f"options must have keys that fit a trained parameter, got {unused[0]!r}")
    return [group for group in (rest, *groups.values()) if group["params"]]
