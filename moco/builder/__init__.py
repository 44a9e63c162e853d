"""What is trained: one `nn.Module` per method, `forward(views, index, progress) -> (loss, metrics)`."""
