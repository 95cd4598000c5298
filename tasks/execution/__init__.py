"""execution: carries plans out.

``builder`` runs a node within ``resources``, which ``cgroup`` limits, and writes a line to the
``log``; what the node's stage may do is its ``node_context``. ``changed_files`` are such as came
damaged, or were written to meanwhile. ``pack`` has the built model's folder take its place,
``early`` begins it in the background while layers are made; how it is written is ``filling``'s,
and what of it goes ``cleaning``'s. ``streaming`` makes room for layers that lie elsewhere, as far
as ``disk`` has any. ``accept`` compares sources with models.lock, ``recorded`` says what is known
of a target before it is planned to the end, ``exchange`` moves results to and from a remote store.
``publish`` brings a model to a hub; ``verify`` makes layers of one anew.

May import ``cache``, planning and all rooms below it.
"""
