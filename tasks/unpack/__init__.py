"""unpack: weights that their author ships quantized, back to floats.

Each format is one file: it tells from a checkpoint's settings and headers which tensors make a
weight (``found``), and makes that of them row by row (``rows``). So what a library's class has no
code for is told to it as the plain model that it stands for. May import what checkpoints and
tensors have.
"""
