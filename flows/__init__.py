"""IN WHAT ORDER the tasks run."""
