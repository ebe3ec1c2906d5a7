"""What is read and written, exactly."""
