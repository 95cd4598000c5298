"""tasks: what is done: one module a stage, loader or layout. See docs/ for the whole picture."""
