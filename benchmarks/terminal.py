"""terminal: run a command as on a terminal: ``python benchmarks/terminal.py python -m doit``.

The terminal does not know its size, which counts as 80 columns.
"""

import os
import pty
import sys

os.environ["TERM"] = "xterm-256color"
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
