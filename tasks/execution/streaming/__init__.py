"""streaming: a checkpoint whose bytes come from elsewhere passes through the cache.

``streaming`` fetches what layers are about to read, and drops what all have read: ``copies`` are
stored tensors that are here meanwhile, ``read_groups`` says which must be here together.
``whole_files`` hashes the files that they are of, in ``rounds`` of a thread of their own, and
``hashed_files`` those of a hub that lie on this machine.

Imports planning and below, and ``resources`` of execution; it runs no node.
"""
