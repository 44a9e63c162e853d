"""Views of images: recipes as data, crops of uint8 images, and batched color operations."""
