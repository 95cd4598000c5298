"""What authors ship: where it comes from, which files it has, and which tensors lie in them.

A *source* (``source``) gives bytes: a ``folder``, a repository on a ``hub``, or the ``record`` of a
checkpoint that is not here; ``sources`` lists the types that models.toml may name. All talk with a
hub is ``hub_client``'s, and ``ranges`` makes a file of what it gives. A *loader* (``loaders``, and
one module each) makes a ``Checkpoint`` of the files of a source: stored tensors, and the model's
tensors made of these. ``headers`` lists the formats of weight files, one module each. Nothing here
reads a tensor's data. ``example`` makes the small checkpoint of the first build.

May import ``cache`` and ``tasks.core``.
"""
