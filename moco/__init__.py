"""Hard-negative contrastive pre-training: engine over {builder, data} over {loss, augment, encoder, distributed}."""
