"""The table of accelerators."""

from __future__ import annotations

import pytest

from isthmus.errors import ConfigError
from isthmus.planning import compute
from isthmus.planning.hardware import ALIASES, GPUS, find_gpu, probe_cpu


def test_names_and_their_other_names() -> None:
    assert find_gpu("H200").memory == 141e9
    assert find_gpu("nvidia a100 40gb").name == "a100-40"
    assert find_gpu("g5").name == "a10g"
    assert set(ALIASES.values()) <= set(GPUS)


def test_figures_are_of_one_order() -> None:
    for gpu in GPUS.values():
        assert 20e9 < gpu.memory < 300e9
        assert gpu.fp32 < gpu.bf16 < 3e15
        assert 1e9 < gpu.network <= gpu.link < gpu.bandwidth
        assert "datasheet" in gpu.source


def test_an_unknown_one_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'h300'.*Did you mean 'h[12]00'\?.*Known: b200"):
        find_gpu("h300")


def test_the_probe_measures_something() -> None:
    products = compute.linear(64, 64, 256).products
    assert {product.kind for product in products} == {"forward", "input", "weight"}
    found = probe_cpu(products, rounds=1)
    assert found.rate("fp32") > 1e6 and found.rate("bf16") == 0
    assert found.elementwise > 0 and 1e-7 < found.start < 1e-2
    assert found.memory > 1e9
    assert found.bandwidth > 0
