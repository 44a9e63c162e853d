"""Backbones, and the published weights that they take up."""
