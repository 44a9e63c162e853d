"""Build encoders (networks.py) and load pre-trained weights into them (pretrained.py)."""
