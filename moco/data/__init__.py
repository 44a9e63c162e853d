"""What is read: image folders, the built-in `photos`, and the loader that decodes and crops."""
