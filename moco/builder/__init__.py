"""The methods: one `nn.Module` each, with `forward(views, index, progress) -> (loss, metrics)`."""
