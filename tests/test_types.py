"""What type checkers are told, fa3/__init__.pyi, is what the functions are: names, kinds and defaults of parameters."""

import ast
import inspect
from pathlib import Path

import pytest

import fa3

FOLDER = Path(fa3.__file__).parent
STUB = ast.parse((FOLDER / "__init__.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
Kind = inspect.Parameter


def declared(function):
    """(name, kind, default) of each parameter; all of them have a type, and so has the result."""
    arguments = function.args
    assert not (arguments.posonlyargs or arguments.vararg or arguments.kwarg) and function.returns
    plain = arguments.args
    defaults = [Kind.empty] * (len(plain) - len(arguments.defaults)) + list(map(ast.literal_eval, arguments.defaults))
    of_keywords = [Kind.empty if default is None else ast.literal_eval(default) for default in arguments.kw_defaults]
    assert all(each.annotation for each in (*plain, *arguments.kwonlyargs) if each.arg != "self")
    return [*((each.arg, Kind.POSITIONAL_OR_KEYWORD, default) for each, default in zip(plain, defaults, strict=True)),
            *((each.arg, Kind.KEYWORD_ONLY, default)
              for each, default in zip(arguments.kwonlyargs, of_keywords, strict=True))]


def actual(function):
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_everything_public_is_declared():
    assert {*FUNCTIONS, *CLASSES} == set(fa3.__all__)
    [names] = [node.value for node in STUB.body if isinstance(node, ast.Assign)]
    assert ast.literal_eval(names) == fa3.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters(name):
    assert declared(FUNCTIONS[name]) == actual(getattr(fa3, name))


@pytest.mark.parametrize("name", CLASSES)
def test_constructors(name):
    [constructor] = [node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)]
    assert constructor.name == "__init__"
    assert declared(constructor) == actual(getattr(fa3, name).__init__)


def test_the_package_says_that_it_has_types():
    assert (FOLDER / "py.typed").exists()
