"""What all 8-bit optimizers share: groups and their options, the step, the state_dict."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyqkern.backends import StepNumbers
from pyqkern.ops.checks import INT, check_float
from pyqkern.schemes import check_type
from pyqkern.training.state import loaded, new_state, wrapped

_PLAIN_NUMBERS = dict.fromkeys(StepNumbers._fields, 0.0) | {"decay": 1.0}


class _Trained(NamedTuple):
    """A parameter that a step is for."""

    p: Tensor
    grad: Tensor
    group: dict[str, Any]
    name: str  # for errors


class Optimizer8bit(torch.optim.Optimizer):
    """The base of the 8-bit optimizers. A subclass names its rule and how many moments it has, and gives the numbers of
    a step (`pyqkern.backends.StepNumbers`).
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves the division by its scale to the step
    _optimizer: ClassVar[str]
    _moments: ClassVar[int]

    def __init__(
        self, params: Any, own: dict[str, Any], maximize: bool, bits: int, min_8bit_size: int,
        max_grad_norm: float | None,
    ) -> None:  # fmt: skip
        common = {"maximize": maximize, "bits": bits, "min_8bit_size": min_8bit_size, "max_grad_norm": max_grad_norm}
        super().__init__(params, own | common)

    @abstractmethod
    def _check(self, group: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError where an option of the subclass is wrong."""

    @abstractmethod
    def _numbers(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """Those of StepNumbers that are not as in _PLAIN_NUMBERS, but for the gradients' scale."""

    def _to_bitsandbytes(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of a state_dict, with what bitsandbytes' optimizer looks for."""
        return group

    def _from_bitsandbytes(self, group: dict[str, Any]) -> dict[str, Any]:
        """The same the other way round."""
        return group

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises TypeError where parameters are not fp32, bf16 or fp16; of options as the constructor."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                check_float("params", p.dtype)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self._check(group)
        check_type("maximize", group["maximize"], bool, "a bool")
        check_type("bits", group["bits"], INT, "an int")
        if group["bits"] not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, got {group['bits']}")
        check_type("min_8bit_size", group["min_8bit_size"], INT, "an int")
        if group["min_8bit_size"] < 0:
            raise ValueError(f"min_8bit_size must not be negative, got {group['min_8bit_size']}")
        if group["max_grad_norm"] is not None:
            check_number("max_grad_norm", group["max_grad_norm"], above=0.0)

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returns, which computes the gradients anew.

        Raises ValueError where a gradient is not finite, TypeError where one is sparse. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # torch.amp.GradScaler's: the step is left out
        if found_inf is not None and float(found_inf):
            return loss
        trained = list(self._trained())
        scale = self._scale(trained)
        calls: defaultdict[tuple[Any, ...], list[_Trained]] = defaultdict(list)
        for one in trained:
            if not self.state[one.p]:
                has_codes = one.group["bits"] == 8 and one.p.numel() >= one.group["min_8bit_size"]
                self.state[one.p].update(new_state(one.p, self._moments, has_codes))
            state = self.state[one.p]
            calls[id(one.group), state["step"], state["state1"].dtype, one.p.device].append(one)
        for (_, steps, *_), together in calls.items():
            self._step_together(together, steps + 1, scale)
        torch.autograd.graph.increment_version([one.p for one in trained])
        return loss

    def _trained(self) -> Iterator[_Trained]:
        """Every parameter with a gradient, checked."""
        for i, group in enumerate(self.param_groups):
            self._check_group(group)
            names = group.get("param_names") or [f"parameter {j}" for j in range(len(group["params"]))]
            for p, name in zip(group["params"], names, strict=True):
                if p.grad is None or not p.numel():
                    continue
                where = f"{name} of group {i}, {tuple(p.shape)}"
                if p.grad.layout is not torch.strided:
                    raise TypeError(f"gradients must be dense, got a sparse one for {where}; use sparse=False")
                state = self.state.get(p)
                if state and state["state1"].shape != p.shape:
                    raise ValueError(f"state1 must be of shape {tuple(p.shape)}, got {tuple(state['state1'].shape)}")
                if state and state["state1"].device != p.device:
                    raise ValueError(f"{where} must be on {state['state1'].device}, where its state is, got {p.device}")
                yield _Trained(p, p.grad, group, where)

    def _scale(self, trained: list[_Trained]) -> float:
        """What gradients are multiplied by: 1 over GradScaler's scale, and what clips their norm.

        Raises ValueError where one is not finite.
        """
        loss_scale = getattr(self, "grad_scale", None)
        scale = 1.0 if loss_scale is None else 1 / float(loss_scale)
        limits = {group["max_grad_norm"] for group in self.param_groups}
        if len(limits) > 1:
            raise ValueError(f"max_grad_norm must be the same for all groups, got {sorted(map(str, limits))}")
        total = _square_sum([one.grad for one in trained], scale)
        decayed = [one.p for one in trained if self._numbers(one.group, 1).get("l2")]
        if not math.isfinite(total) or not math.isfinite(_square_sum(decayed, 1.0)):
            self._refuse(trained, scale)
        limit = limits.pop() if limits else None
        return scale if limit is None else scale * min(1.0, limit / (math.sqrt(total) + 1e-6))

    def _refuse(self, trained: list[_Trained], scale: float) -> None:
        for one in trained:
            tensors = [("gradients", one.grad, scale)]
            if self._numbers(one.group, 1).get("l2"):
                tensors.append(("parameters that decay", one.p, 1.0))
            for what, tensor, factor in tensors:
                if not math.isfinite(_square_sum([tensor], factor)):
                    raise ValueError(
                        f"{what} must be finite and below 2**59, which those of {one.name} are not; nothing was "
                        "changed: leave this step out, zero_grad() and go on"
                    )

    def _step_together(self, together: list[_Trained], step: int, scale: float) -> None:
        group, states = together[0].group, [self.state[one.p] for one in together]
        numbers = _PLAIN_NUMBERS | self._numbers(group, step) | {"scale": -scale if group["maximize"] else scale}
        has_codes = "absmax1" in states[0]
        torch.ops.pyqkern.optimizer_step(
            self._optimizer,
            list(StepNumbers(**numbers)),
            [one.p for one in together],
            [one.grad for one in together],
            [state["state1"] for state in states],
            [state["state2"] for state in states if self._moments == 2],
            [state["absmax1"] for state in states if has_codes],
            [state["absmax2"] for state in states if has_codes and self._moments == 2],
        )
        for state in states:
            state["step"] = step

    # ---- saved and loaded

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, in bitsandbytes' form: see docs/training.md."""
        saved = super().state_dict()
        saved["state"] = {key: wrapped(state) for key, state in saved["state"].items()}
        saved["param_groups"] = [self._to_bitsandbytes(group) for group in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's; state_dict: of this optimizer, or of bitsandbytes' optimizer of the same rule.

        Raises ValueError or TypeError, and changes nothing, where it does not fit the parameters.
        """
        groups = [self._from_bitsandbytes(dict(group)) for group in state_dict["param_groups"]]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("state_dict must have the optimizer's groups, with as many parameters in each")
        for group in groups:
            self._check_group(self.defaults | group)
        saved_ids = chain.from_iterable(group["params"] for group in groups)
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        of_parameter = dict(zip(saved_ids, ours, strict=True))
        states = {}
        for key, state in state_dict["state"].items():
            if key not in of_parameter:
                raise ValueError(f"state_dict must have states of parameters in its groups, got one of {key!r}")
            if state:
                states[key] = loaded(state, of_parameter[key], self._moments, f"the state of parameter {key}")
        # torch would cast the tensors to the parameters' dtype.
        super().load_state_dict({"state": {key: {} for key in states}, "param_groups": groups})
        for key, state in states.items():
            self.state[of_parameter[key]].update(state)


def _square_sum(tensors: list[Tensor], scale: float) -> float:
    """Of tensors on any devices; their dtypes may differ."""
    by_device: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_device[tensor.device].append(tensor)
    return sum(float(torch.ops.pyqkern.square_sum(each, scale)) for each in by_device.values())


# ---- checks of options


def scalar(lr: float | Tensor) -> float:
    """A learning rate, which may be a tensor of one element."""
    return float(lr)


def check_number(name: str, value: object, above: float | None = None, below: float = math.inf) -> None:
    """A finite number, not negative, or above `above`, and below `below`."""
    check_type(name, value, Real, "a number")
    number = float(value)  # type: ignore[arg-type]
    if not (number >= 0 if above is None else number > above) or not number < below:
        rule = "not be negative" if above is None else f"be above {above:g}"
        raise ValueError(f"{name} must {rule}{'' if below == math.inf else f' and below {below:g}'}, got {value}")


def check_rate(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(f"lr must be a number or a tensor of one, got one of shape {tuple(lr.shape)}")
        lr = float(lr)
    check_number("lr", lr)
    check_number("weight_decay", group["weight_decay"])


def check_betas(betas: object) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    for beta in betas:
        check_number("betas", beta, below=1.0)
