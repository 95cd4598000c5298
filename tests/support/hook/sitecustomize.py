"""sitecustomize: Python imports it from the path when it starts; `doit_hook` says what for."""

import os
import sys

# Not in the processes that doit starts.
if "MLX_MAKE_TEST_HOOK" in os.environ and "doit" in sys.orig_argv:
    import json

    import doit_hook

    doit_hook.install(json.loads(os.environ["MLX_MAKE_TEST_HOOK"]))
