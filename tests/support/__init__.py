"""What the tests have in common: checkpoints, projects, servers, and ways to run mlx-make."""
