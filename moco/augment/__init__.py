"""Views of images: recipes as data, crops of uint8 images, and batched colour operations."""
