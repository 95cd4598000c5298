"""cache: results kept by content. Knows no stage, no model and no build tool.

A cache folder (``store``) holds blobs under their digest, the records of what was made, and what
it shares with a remote; ``lock`` keeps those who use it out of each other's way. Rooms, bottom to
top: errors and digest; files; folder and lock; records; blobs; fetched, maintenance and remote;
store. Each imports from those before it, and nothing here imports from ``tasks``.
"""
