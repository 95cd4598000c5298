"""Numbers without a model: arrays, and tensors read in blocks, on a CPU or a GPU.

``arrays`` turns bytes into MLX arrays and back, ``rows`` reads a tensor block by block, ``kernels``
is what computes on a block, ``steps`` joins and reorders whole tensors; ``device``, ``cuda`` and
``mx`` deal with what computes. Nothing here knows which tensor it is, of which model, or why.

May import ``cache`` and ``tasks.core``.
"""
