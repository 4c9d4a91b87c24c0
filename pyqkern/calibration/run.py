"""Running a model over batches to look at it: in eval mode, without gradients, and left as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.models.find import find_attentions, find_linears
from pyqkern.nn.attention import unfolded
from pyqkern.progress import tracked
from pyqkern.schemes import check_type


def linears_of(model: nn.Module) -> dict[str, Any]:
    """Each linear once, quantized or not, by its first name."""
    check_type("model", model, nn.Module, "an nn.Module")
    return {layer.names[0]: layer.module for layer in find_linears(model)}


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Calls the model on one batch: a mapping as keywords, a tuple or list as arguments, anything else as the one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def counted(batches: Iterable[Any], title: str, progress: bool) -> Iterator[Iterator[Any]]:
    """The batches with a progress bar. Raises ValueError if there are none."""
    check_type("batches", batches, Iterable, "an iterable of batches")

    def some(batches: Iterator[Any]) -> Iterator[Any]:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0:
            raise ValueError("batches must hold at least one batch, got none; an iterator can be used only once")

    with tracked(batches, title, show=progress) as each:
        yield some(each)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluated(model: nn.Module, batch: Any) -> Any:
    """The model's answer to one batch."""
    with evaluating(model):
        return run_batch(model, batch)


def in_float64(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its device has none, as MPS and some of XPU."""
    try:
        return x.double()
    except (TypeError, RuntimeError):
        return x.cpu().double()


def input_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """What a linear is called with, by place or by keyword."""
    x: Tensor = arguments[0] if arguments else next(iter(keywords.values()))
    return x


def see_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    see: Callable[[str, Tensor], None],
    *,
    title: str,
    progress: bool,
) -> None:
    """Runs the batches and calls see(name, x) for each input of each linear, x [rows, in_features], finite, not empty.

    Linears as `linears_of` names them.

    Raises ValueError without batches, and for NaN or an infinity in an input, naming batch and layer.
    """
    count = 0

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = input_of(arguments, keywords).detach()
            if not x.numel():
                return
            x = x.reshape(-1, x.shape[-1])
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"batch {count} must give finite values, got NaN or an infinity at the input of "
                    f"{name or 'the model'}; leave the batch out, or repair the layer before"
                )
            see(name, x)

        return hook

    with unfolded(find_attentions(model)):
        linears = linears_of(model).items()
        handles = [linear.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, linear in linears]
        try:
            with evaluating(model), counted(batches, title, progress) as each:
                for count, batch in enumerate(each):  # noqa: B007  the hooks name it
                    run_batch(model, batch)
        finally:
            for handle in handles:
                handle.remove()
