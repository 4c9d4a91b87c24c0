"""The caches of transformers, read and written in place by QDecoderLayers: each compared with the unfused model's."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers
from decoders import alike, calls, distance, layers, logits, pair, tokens
from hypothesis import given, settings
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

MAJOR = int(transformers.__version__.split(".")[0])
IDS = tokens(2, 30)
# Families with a window of 16 in all layers, in some, and in none; and the one with ALiBi.
FAMILIES = ["mistral", "qwen2", "llama", "bloom"]


def steps(*lengths: int, cache: Callable[[Any], Any] | None = None) -> Callable[[Any], Tensor]:
    """Runs IDS in pieces of these lengths through one cache; returns the logits of all of them."""

    def run(model: Any) -> Tensor:
        past = DynamicCache(config=model.config) if cache is None else cache(model)
        found, at = [], 0
        for length in lengths:
            found.append(step(model, IDS[:, at : at + length], past))
            at += length
        return torch.cat(found, 1)

    return run


def step(model: Any, ids: Tensor, past: Any) -> Tensor:
    return logits(model, ids, past_key_values=past, use_cache=True)


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=32)


PIECES = [(30,), (1, 1, 28), (5, 1, 1, 1, 7, 15), (20, 1, 1, 1, 1, 1, 5), (14, 3, 1, 1, 1, 10)]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_continued_in_pieces(family: str, pieces: tuple[int, ...]) -> None:
    models = pair(family)
    found = alike(models, steps(*pieces))
    with torch.inference_mode():
        assert distance(found, logits(models[1], IDS[:, : sum(pieces)])) < 1e-5
    alike(models, steps(*pieces, cache=lambda model: DynamicCache()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_a_static_cache(family: str, implementation: str) -> None:
    models = pair(family, implementation=implementation)
    found = alike(models, steps(5, 1, 1, 1, 7, 15, cache=static))
    with torch.inference_mode():
        assert distance(found, logits(models[1], IDS)) < 1e-5
        cache = static(models[1])
        steps(5, 3, cache=lambda model: cache)(models[1])
        assert int(cache.get_seq_length()) == 8
        assert cache.layers[0].keys.shape[2] == 32 and not cache.layers[0].keys[:, :, 8:].any()


def test_generate_with_a_static_cache() -> None:
    unfused, fused = pair("llama")
    with torch.inference_mode():
        found, expected = (
            model.generate(IDS, max_new_tokens=12, do_sample=False, cache_implementation="static", disable_compile=True)
            for model in (fused, unfused)
        )
    assert torch.equal(found, expected) and calls(fused) == ["", ""]


def test_a_dynamic_cache_is_appended_to_in_place() -> None:
    """After it has grown once, no step copies what is there."""
    _, fused = pair("llama")
    with torch.inference_mode():
        cache = DynamicCache(config=fused.config)
        step(fused, IDS[:, :9], cache)
        assert cache.layers[0].keys.untyped_storage().nbytes() == cache.layers[0].keys.nbytes  # exact at first
        step(fused, IDS[:, :1], cache)
        at = cache.layers[0].keys.data_ptr()
        for i in range(20):
            assert cache.get_seq_length() == 10 + i == cache.layers[0].keys.shape[2]
            step(fused, IDS[:, :1], cache)
            assert cache.layers[0].keys.data_ptr() == at
        before = [layer.keys.clone() for layer in cache.layers]
        assert all(torch.equal(layer.keys, one) for layer, one in zip(cache.layers, before, strict=True))


def copied(cache: Any) -> Any:
    """Another cache with other layers that hold the very same tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


COPIES = [copied, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]


@pytest.mark.parametrize("copy_of", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_continued_more_than_once(family: str, copy_of: Callable[[Any], Any]) -> None:
    def run(model: Any) -> Tensor:
        first = DynamicCache(config=model.config)
        found = [step(model, IDS[:, :9], first), step(model, IDS[:, 9:10], first)]
        second = copy_of(first)
        third = copy_of(second)
        for cache, begin in ((first, 10), (second, 20), (first, 13), (third, 15), (second, 5), (third, 1)):
            found += [step(model, IDS[:, begin : begin + 2], cache), step(model, IDS[:, begin : begin + 1], cache)]
        return torch.cat(found, 1)

    alike(pair(family), run)


def crop(cache: Any, count: int) -> None:
    cache.crop(-count)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_crop(family: str) -> None:
    """What is cropped away is still there for a copy that has it."""

    def run(model: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        found = [step(model, IDS[:, :8], cache), step(model, IDS[:, 8:9], cache)]
        other = copied(cache)
        crop(cache, 3)
        found += [step(model, IDS[:, 20:22], cache), step(model, IDS[:, 22:23], cache)]
        found += [step(model, IDS[:, 9:10], other), step(model, IDS[:, 10:11], other)]
        crop(cache, 1)
        crop(other, 2)
        found += [step(model, IDS[:, 3:4], cache), step(model, IDS[:, 4:5], other)]
        return torch.cat(found, 1)

    alike(pair(family), run)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_that_change(family: str) -> None:
    def run(model: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        found = [step(model, IDS[:, :9], cache), step(model, IDS[:, 9:11], cache)]
        cache.reorder_cache(torch.tensor([1, 0]))
        found += [step(model, IDS[:, 11:12], cache), step(model, IDS[:, 12:13], cache)]
        cache.reorder_cache(torch.tensor([1, 1]))
        found.append(step(model, IDS[:, 13:20], cache))
        cache.batch_repeat_interleave(2)
        twice = IDS.repeat(2, 1)
        found.append(step(model, twice[:, 20:21], cache).view(2, -1, found[0].shape[-1]))
        found.append(step(model, twice[:, 21:22], cache).view(2, -1, found[0].shape[-1]))
        cache.batch_select_indices(torch.tensor([3, 0]))
        found += [step(model, IDS[:, 22:23], cache), step(model, IDS[:, 23:24], cache)]
        return torch.cat(found, 1)

    alike(pair(family), run)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_goes_from_one_model_to_the_other(family: str) -> None:
    """What the unfused model has left is continued by the fused one, and the other way round."""
    unfused, fused = pair(family)
    with torch.inference_mode():
        expected = logits(unfused, IDS)
        for one, other in ((unfused, fused), (fused, unfused)):
            cache = DynamicCache(config=one.config)
            found = []
            for begin, model in enumerate((one, one, other, other, one, other)):
                ids = IDS[:, 5 * begin : 5 * begin + 5]
                found.append(step(model, ids, cache))
            assert distance(torch.cat(found, 1), expected) < 1e-5 and calls(fused) == ["", ""]


def test_inference_mode_ends() -> None:
    """Tensors of inference mode are not written outside of it."""
    unfused, fused = pair("llama")
    cache = DynamicCache(config=fused.config)
    with torch.inference_mode():
        expected = logits(unfused, IDS)
        step(fused, IDS[:, :9], cache)
        step(fused, IDS[:, 9:10], cache)
    with torch.no_grad():
        found = [step(fused, IDS[:, i : i + 1], cache) for i in range(10, 13)]
    assert distance(torch.cat(found, 1), expected[:, 10:13]) < 1e-5 and calls(fused) == ["", ""]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 6)),
            st.tuples(st.just("append"), st.just(1)),
            st.tuples(st.sampled_from(["copy", "deepcopy", "other", "reorder"]), st.just(0)),
            st.tuples(st.just("crop"), st.integers(1, 3)),
        ),
        max_size=12,
    )
)
def test_any_sequence_of_operations(operations: list[tuple[str, int]]) -> None:
    def run(model: Any) -> Tensor:
        caches = [DynamicCache(config=model.config)]
        found = [step(model, IDS[:, :4], caches[0])]
        for i, (name, count) in enumerate(operations):
            cache = caches[-1]
            if name == "append":
                found.append(step(model, IDS[:, i : i + count], cache))
            elif name == "crop" and cache.get_seq_length() > count:
                crop(cache, count)
            elif name == "reorder":
                cache.reorder_cache(torch.tensor([1, 0]))
            elif name in ("copy", "deepcopy"):
                caches.append((copied if name == "copy" else copy.deepcopy)(cache))
            elif name == "other":
                caches.reverse()
        return torch.cat(found, 1)

    alike(llama(), run)


@functools.cache
def llama() -> tuple[Any, Any]:
    return pair("llama")


# ---- caches that are not known


class Own(DynamicCache):
    """A user's own."""


def old_way(family: str, run: Callable[[Any], Tensor], reason: str) -> None:
    """The fused model gives the very bits of the unfused one, and says why."""
    unfused, fused = pair(family)
    with torch.inference_mode():
        found, expected = run(fused), run(unfused)
    assert torch.equal(found, expected)
    assert all(reason in str(call) for call in calls(fused)), calls(fused)


def test_other_caches_go_the_old_way() -> None:
    old_way("llama", steps(5, 1, 4, cache=lambda model: Own()), "the cache is no class that is known: Own")
    if MAJOR >= 5:  # with transformers 4 the window of a StaticCache is a layer like the others
        reason = "no class that is known: StaticSlidingWindowLayer"
        old_way("mistral", steps(5, 1, 4, cache=static), reason)

    def patched(model: Any) -> Any:
        cache = DynamicCache(config=model.config)
        update = cache.update
        cache.update = lambda *args, **kwargs: update(*args, **kwargs)
        return cache

    old_way("llama", steps(5, 1, cache=patched), "no class that is known")


def test_a_cache_that_does_not_fit_goes_the_old_way() -> None:
    """As transformers does it: one of another dtype is promoted, one of another batch is an error."""

    def of_double(model: Any) -> Any:
        cache = DynamicCache(config=model.config)
        for i in range(2):
            cache.update(torch.zeros(2, 2, 3, 16).double(), torch.zeros(2, 2, 3, 16), i)
        return cache

    _, fused = pair("llama")
    with torch.inference_mode():
        for cache in (of_double(fused), DynamicCache(config=fused.config)):
            if cache.get_seq_length() == 0:
                step(fused, IDS[:1, :4], cache)
            with pytest.raises((RuntimeError, ValueError)):
                step(fused, IDS[:, :1], cache)
            assert calls(fused)[0] == "what the cache holds does not fit"


def test_a_full_static_cache_is_refused_as_transformers_does() -> None:
    unfused, fused = pair("llama")
    for model in (unfused, fused):
        with torch.inference_mode(), pytest.raises((RuntimeError, IndexError)):
            steps(20, 10, 5, cache=lambda model: StaticCache(config=model.config, max_cache_len=25))(model)
    assert "the cache is full" in str(calls(fused)[0])


def test_a_gradient_to_the_cache() -> None:
    """As prefix tuning asks for it."""
    unfused, fused = (model.requires_grad_(False) for model in pair("llama"))
    grads = []
    for model in (unfused, fused):
        prefix = nn.Parameter(torch.ones(2, 2, 3, 16))
        cache = DynamicCache()
        for i in range(2):
            cache.update(prefix * 0.1, prefix * 0.2, i)
        step(model, IDS[:, :4], cache).sum().backward()
        grads.append(prefix.grad)
    assert torch.equal(*grads) and calls(fused) == ["the cache asks for a gradient", ANY_GRADIENT]
    assert len(layers(fused)) == 2


ANY_GRADIENT = "a gradient is asked for, and the operator has none; use torch.inference_mode()"
