"""What the job sets for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hesscli.job.options import ProblemOptions


def settle(options: ProblemOptions) -> None:
    """Sets the seed, the number of threads and the precision."""
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    # cuDNN's convolutions would use it by default, at three digits.
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.backends.cudnn.allow_tf32 = options.tf32


@contextmanager
def settings_kept() -> Iterator[None]:
    """Puts back what the job sets: precisions, the number of threads, and the state of the random numbers."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, torch.get_num_threads()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
            torch.set_num_threads(before[2])
