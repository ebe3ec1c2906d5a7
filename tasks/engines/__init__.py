"""What turns reads into calls."""
