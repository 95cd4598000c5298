"""cluster: layers made by the workers of a Dask cluster (the extra ``dask``).

``coordinator`` is the crew of a build that has one: it hands ``unit``s out, holds what comes back
against the plan and brings the bytes here. ``workbench`` is the other end: it plans a target anew
in a worker, makes units with a builder of its own, and serves their bytes. ``machine`` says which
workers make the same bits; ``scheduler`` is what is asked of Dask's own processes.

Only ``coordinator`` and ``scheduler`` import distributed, once a layer must be made.
"""
