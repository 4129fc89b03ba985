"""Docstrings are whole: every parameter is described, and no fragment's mark is left."""

import inspect
import re

import pytest

import fa3

BUILT = ["flash_attn_backward", "flash_attn_combine", "flash_attn_func", "flash_attn_varlen_backward",
         "flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata", "quantize_fp8"]


@pytest.mark.parametrize("name", BUILT)
def test_every_parameter_is_described(name):
    function = getattr(fa3, name)
    text = inspect.getdoc(function)
    lines = re.findall(r"^([a-z0-9_, ]+) : ", text, re.MULTILINE)
    described = {word.strip() for line in lines for word in line.split(",")}
    assert set(inspect.signature(function).parameters) <= described
    assert not re.search(r"\{[a-z]+\}", text)


@pytest.mark.parametrize("name", BUILT)
def test_sections_are_in_order(name):
    text = inspect.getdoc(getattr(fa3, name))
    sections = re.findall(r"^(\w+)\n-+$", text, re.MULTILINE)
    assert sections[:3] == ["Parameters", "Returns", "Raises"]
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", fa3.__all__)
def test_everything_public_is_documented(name):
    assert inspect.getdoc(getattr(fa3, name))
