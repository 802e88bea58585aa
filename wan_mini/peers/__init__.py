"""Other motion-transfer methods on the same pipeline, each in a file of its own."""
