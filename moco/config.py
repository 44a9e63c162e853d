"""Settings of a run."""

# mean and standard deviation of ImageNet's images, R, G and B in [0, 1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
