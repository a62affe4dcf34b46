"""Reading and writing checkpoints from their headers, without torch."""
