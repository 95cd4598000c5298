"""terminal: run a command as on a terminal, whose size is not known: 80 columns.

python benchmarks/terminal.py python -m doit
"""

import os
import pty
import sys

os.environ["TERM"] = "xterm-256color"
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
