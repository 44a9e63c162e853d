"""Start the processes of a run, connect them, and end them together."""
