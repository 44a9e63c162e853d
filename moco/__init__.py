"""Hard-negative contrastive pre-training: engine over {builder, data} over {loss, augment, encoder, distributed}."""

import torch

# PyTorch's vector functions on a CPU are Intel MKL's. When several threads enter those for the first time at once, one of
# them may compute that first call to 1e-4 instead of 1e-7; a first call by one thread alone settles it for the process.
torch.ones(1).exp()
