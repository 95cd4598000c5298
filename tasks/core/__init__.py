"""What all rooms speak of: targets and how they are quantized, errors, texts, where things lie.

``spec`` declares the keys of a model, each once, and what they ask for; ``errors`` are what a user
can mend; ``text`` reads and writes numbers for people; ``workspace`` names the folders beside
models.toml, ``program`` this program's own. Nothing here reads a file, a checkpoint or an array.

May import nothing of ``cache`` or of ``tasks``.
"""
