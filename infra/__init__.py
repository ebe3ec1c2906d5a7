"""WHERE the tasks run."""
