"""quality: a model that is run, and what its answers are worth.

``text`` reads the text that models are run on and cuts it into tokens, ``segments`` runs a
library's own model a block at a time, ``divergence`` compares what two models say. Nothing here
knows a stage or a target. May import core, tensors, checkpoints and layouts.
"""
