"""Scripts for people. A package, as detectron2 installs one of this name too, and the one found first must be ours."""
