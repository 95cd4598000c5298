"""mlx_make: the installed command. What it runs is dodo.py, tasks/ and cache/."""
