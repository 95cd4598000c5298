"""report: pages that show what a built target is: its provenance, sizes, errors and last build.

``figures`` reads numbers out of manifests and ``timeline`` out of the build log, ``charts`` draws
them, ``pages`` writes HTML around them. Nothing here makes a tensor or a task: it may import what
plans and executes, not the command line.
"""

INDEX = "index.html"


def page_name(target: str) -> str:
    """Return the name of a target's page. No target's name begins with '-'."""
    return f"-{target}.html" if target.casefold() == "index" else f"{target}.html"


def trace_name(target: str) -> str:
    """Return the name of a target's trace."""
    return f"{target}.trace.json"
