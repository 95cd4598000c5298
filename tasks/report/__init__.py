"""report: what a built target is, on one page: provenance, sizes, errors, its last build."""

INDEX = "index.html"


def page_name(target: str) -> str:
    """Return the name of a target's page. No target's name begins with '-'."""
    return f"-{target}.html" if target.casefold() == "index" else f"{target}.html"


def trace_name(target: str) -> str:
    """Return the name of a target's trace."""
    return f"{target}.trace.json"
