"""conftest: what the tests' environment must not say."""

import os

from tasks.config import keys

# Else whoever sets them would run other tests than everybody.
for table, known in (("cache", keys.CACHE), ("build", keys.BUILD)):
    for key in known:
        os.environ.pop(keys.variable(table, key), None)

for name in ("COLUMNS", "LINES"):  # of the terminal that pytest is started from
    os.environ.pop(name, None)

# Else each doit that the tests start compiles all its modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
