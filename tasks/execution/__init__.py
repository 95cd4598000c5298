"""execution: carries plans out.

``builder`` runs a node within ``resources``, which ``cgroup`` limits, and writes a line to the
``log``. ``draft``, ``fill`` and ``pack`` write the built model's folder, ``early`` does so in the
background while layers are made, and ``place`` takes care of what people put there. ``streaming``
makes room, as far as ``disk`` has any, for layers that lie elsewhere: ``copies`` fetches and drops
their tensors, ``read_groups`` says which must be here together, and ``whole_files`` hashes the
files that they are of, in ``rounds`` of a thread of their own; ``hashed_files`` hashes those of a
hub that lie here. ``accept`` compares sources with models.lock, ``exchange`` moves results to and
from a remote store. ``publish`` brings a model to a hub; ``verify`` makes layers of one anew.

May import ``cache``, planning and all rooms below it.
"""
