"""What authors ship: where it comes from, which files it has, and which tensors lie in them.

A *source* (``source``) gives bytes: a ``folder``, a repository on a ``hub``, or the ``record`` of a
checkpoint that is not here; ``sources`` lists the types that models.toml may name. ``hub_client``
asks a hub what it holds and ``hub_ranges`` for bytes, as patiently as ``hub_requests`` has it;
``hub_errors`` says what went wrong, ``file_digests`` are those that a hub has, and ``ranges`` makes
a file of the bytes. A *loader* (``loaders``, and one module each) makes a ``Checkpoint`` of the
files of a source: stored tensors, and the model's tensors made of these. ``headers`` lists the
formats of weight files, one module each. Nothing here reads a tensor's data. ``example`` makes the
small checkpoint of the first build.

May import ``cache`` and ``tasks.core``.
"""
