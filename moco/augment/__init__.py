"""The views: recipes as data, crops on uint8 images, batched colour operations."""
