"""execution: carries plans out.

``builder`` runs a node, ``draft``, ``fill`` and ``pack`` write the built model's folder, ``early``
does so behind the layers, ``accept`` holds sources against models.lock, ``exchange`` moves results
to and from a remote store. May import planning, config and all below.
"""
