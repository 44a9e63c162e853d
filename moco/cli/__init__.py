"""The command line of scripts and tools: the only part of moco that uses argparse."""
