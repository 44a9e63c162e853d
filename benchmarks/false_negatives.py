#!/usr/bin/env python
"""Measure time and memory of FNC's head, forward and backward, next to a plain implementation.

Our code works on chunks of images; the plain one uses autograd on all views at once. The script
fails if their losses or gradients differ. The memory does not include the inputs of the head.
"""

from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.loss.false_negatives import Cancellation, cancelled_nt_xent, find_false_negatives

T = 0.1
# a low threshold, because random entries are less similar than features of images
CONFIG = Cancellation("attract", topk=10, threshold=0.3)


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--views", type=measure.at_least(4), default=10)
    parser.add_argument(
        "--images", type=measure.at_least(2), default=32, help="images of one process"
    )
    parser.add_argument(
        "--rows", type=measure.at_least(1), default=65536, help="entries in the memory"
    )
    parser.add_argument("--dim", type=measure.at_least(1), default=128)
    parser.add_argument(
        "--chunk",
        type=measure.at_least(2),
        default=16,
        help="images in a chunk; half of it is measured, too",
    )
    measure.add_device(parser)
    args = parser.parse_args()
    least = 2 * args.views * args.images + CONFIG.topk
    if args.rows < least:
        parser.error(
            f"--rows {args.rows}: twice the batch and {CONFIG.topk} entries of other images must "
            f"fit; give {least} or more, or lower --views or --images"
        )
    device = torch.device(args.device)

    head = Head(args.views, args.images, args)
    check(head, args.chunk)
    candidates = {
        "plain": head.plain,
        f"ours, chunk {args.chunk}": lambda: head.ours(args.chunk),
        f"ours, chunk {args.chunk // 2}": lambda: head.ours(args.chunk // 2),
    }
    times = measure.side_by_side(candidates, args.rounds, device)
    seconds = measure.medians(times)
    plain, ours, half = (measure.peak_memory(run, device) for run in candidates.values())
    table = [
        {
            "head": name,
            "views": args.views,
            "images": args.images,
            "ms": f"{1e3 * seconds[name]:.4g}",
            "MiB": memory / 2**20,
        }
        for name, memory in zip(candidates, (plain, ours, half), strict=True)
    ]
    more = {}
    for name, views, images in (
        ("half_the_views", args.views // 2, args.images),
        ("twice_the_images", args.views, 2 * args.images),
    ):
        other = Head(views, images, args)
        more[name] = measure.peak_memory(lambda other=other: other.ours(args.chunk), device)
        table.append(
            {
                "head": f"ours, chunk {args.chunk}",
                "views": views,
                "images": images,
                "ms": "",
                "MiB": more[name] / 2**20,
            }
        )
    ratios = {
        "plain_over_ours": measure.ratio(*list(times.values())[:2]),
        "plain_memory_over_ours": plain / ours,
        "half_the_chunk_memory": half / ours,
        **{f"{name}_memory": memory / ours for name, memory in more.items()},
    }
    measure.report(
        "false_negatives",
        table,
        ratios,
        {"device": str(device), "rows": args.rows, "dim": args.dim},
        args.json,
    )


class Head:
    """FNC's head on one batch of normalized features `z`.

    The batch's own entries are the first in the memory. Each call leaves a gradient in `z`.
    """

    def __init__(self, views: int, images: int, args):
        device = torch.device(args.device)
        self.bank = F.normalize(torch.randn(args.rows, args.dim, device=device), dim=1)
        self.own = torch.arange(views * images, device=device).view(views, images)
        self.z = F.normalize(
            torch.randn(views, images, args.dim, device=device), dim=2
        ).requires_grad_()

    def ours(self, chunk: int) -> Tensor:
        """Return our loss, computed in chunks of `chunk` images."""
        found = find_false_negatives(self.bank, self.own, CONFIG, chunk)
        return self._backward(
            lambda: cancelled_nt_xent(self.z, self.bank, self.own, found, CONFIG.mode, T, chunk)[0]
        )

    def plain(self) -> Tensor:
        """Return the loss of the plain implementation."""
        return self._backward(self._plain)

    def _plain(self) -> Tensor:
        V, n, _ = self.z.shape
        mine = self.own.T  # [n, V]
        with torch.no_grad():
            # [n, R], the largest over the views
            score = (self.bank[self.own] @ self.bank.T).amax(0).scatter(1, mine, -torch.inf)
            value, rows = score.topk(CONFIG.topk, 1)
            counts = (value > CONFIG.threshold).float()
        logits = self.z @ self.bank.T / T  # [V, n, R]
        others = (1 - torch.eye(V, device=self.z.device))[:, None, :]  # [V, 1, V]
        of_views = (logits.gather(2, mine.expand(V, n, V)) * others).sum(2)
        of_false = (logits.gather(2, rows.expand(V, n, CONFIG.topk)) * counts).sum(2)
        below = logits.scatter(2, self.own[:, :, None], -torch.inf).logsumexp(2)
        return 2 * (below - (of_views + of_false) / (V - 1 + counts.sum(1))).mean()

    def _backward(self, loss: Callable[[], Tensor]) -> Tensor:
        self.z.grad = None
        value = loss()
        value.backward()
        return value.detach()


def check(head: Head, chunk: int) -> None:
    """Check that both implementations have the same loss and gradient."""
    ours, gradient = head.ours(chunk), head.z.grad
    torch.testing.assert_close(ours, head.plain(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, head.z.grad, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    measure.main(main)
