"""Start the processes of a run, connect them, and end them together. Start with launch.py."""
