"""filling: build/TARGET and the weight files that fill it; what people put there is never lost.

``draft`` is a target's weight files in the cache, into which layers write; ``fill`` writes a folder
of them and of blobs, without a layer that is made. ``place`` says where the folder lies and what
lies in it, ``ownership`` what of that is ours.

Imports planning and below, and ``resources`` of execution; it runs no node.
"""
