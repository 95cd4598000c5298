"""stubs: modules that can be imported and not used, in place of some that take seconds to import.

A library's model classes stand in files beside what makes pictures and texts ready, which makes
classes of what it imports, registers itself, gets itself a logger. All that can be done with a stub
as a module is imported. A function that calls one later lacks something: it raises ``StubUsed``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class StubUsed(Exception):
    """The library used a module that was left out; ask again with everything imported."""


def is_below(name: str, modules: Sequence[str]) -> bool:
    """Tell whether a module is one of these, or below one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_stub(module: Any) -> bool:
    """Tell whether a module is one of these."""
    return isinstance(module, _Stub)


@contextmanager
def stubs(modules: Sequence[str]) -> Iterator[None]:
    """Have stubs imported for these modules and all below them, by this thread."""
    finder = _Finder(modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if threading.get_ident() != self._thread or not is_below(name, self._modules):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Stub(types.ModuleType):
    """A module that has whatever name is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _named(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Unused(type):
    """The class of what a stub has: classes, which may stand for anything that is imported."""

    def __new__(cls, name: str, bases: Any, body: Any, **_: Any) -> _Unused:
        return super().__new__(cls, name, bases, body)

    def __init__(cls, name: str, bases: Any, body: Any, **_: Any) -> None:
        super().__init__(name, bases, body)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{cls.__name__}.{name}")

    def __getitem__(cls, key: Any) -> Any:
        return _named(f"{cls.__name__}[…]")

    def __iter__(cls) -> Any:
        raise StubUsed(cls.__name__)

    def __bool__(cls) -> bool:
        raise StubUsed(cls.__name__)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        if sys._getframe(1).f_code.co_name != "<module>":
            raise StubUsed(cls.__name__)
        return _named(f"{cls.__name__}()")


def _named(name: str) -> _Unused:
    return _Unused(name, (), {})
