"""execution: carries plans out.

``builder`` runs a node within ``resources``, which ``cgroup`` limits, and writes a line to the
``log``. ``draft``, ``fill`` and ``pack`` write the built model's folder, ``early`` does so in the
background while layers are made, and ``place`` takes care of what people put there. ``streaming``
fetches layers that lie elsewhere and drops them, as far as ``disk`` has room, and ``whole_files``
hashes the files that they are of. ``accept`` compares sources with models.lock, ``exchange`` moves
results to and from a remote store. ``publish`` brings a model to a hub, by its ``file_digests``;
``verify`` makes layers of one anew.

May import ``cache``, planning and all rooms below it.
"""
