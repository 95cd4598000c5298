"""stages: what is done to a layer, step by step.

``stage`` is the contract, ``registry`` the order, and each stage one file: what it plans, what it
will make, how it makes it, and its words for ``doit graph`` and ``doit why``. A stage sees no
build: what it may do is its ``Context``. May import core, tensors, checkpoints, layouts
and quality.
"""
