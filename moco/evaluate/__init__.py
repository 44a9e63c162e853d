"""Evaluate pre-trained encoders: linear probe, fine-tuning, k-NN, VOC07."""
