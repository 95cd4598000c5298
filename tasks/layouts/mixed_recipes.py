"""mixed_recipes: what a library's mixed recipes say of a model's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tasks.layouts.model import Verdict

Words = dict[str, dict[str, int | Verdict] | str]


def words(
    recipes: Iterable[str],
    predicate: Callable[[str], Callable[[str, Any], Any]],
    leaves: Iterable[tuple[str, Any]],
) -> Words:
    """Return each recipe's word by module path, or why it does not fit the model.

    Args:
        recipes: their names.
        predicate: returns what a recipe asks of a module, by its path and itself.
        leaves: modules by path; those that cannot be quantized are not asked about.
    """
    modules = [(path, module) for path, module in leaves if hasattr(module, "to_quantized")]
    said: Words = {}
    for recipe in recipes:
        try:
            asks = predicate(recipe)
            said[recipe] = {path: asks(path, module) for path, module in modules}
        except Exception as error:  # the library's own convert would raise the very same
            said[recipe] = str(error)
    return said
