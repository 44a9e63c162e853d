"""Command-line tools.

This folder is a package because detectron2 installs a package named `tools`, too. Python must find
ours first.
"""
