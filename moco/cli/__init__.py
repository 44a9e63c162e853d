"""The command line of scripts and tools."""
