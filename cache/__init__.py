"""cache: results kept by content. Knows no stage, no model and no build tool."""
