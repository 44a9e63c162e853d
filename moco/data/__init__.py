"""Data sets, image decoding and the loader: everything from files on disk to batches of crops."""
