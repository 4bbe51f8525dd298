"""What the job sets for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from hesscli.job.options import ProblemOptions


def settle(options: ProblemOptions) -> None:
    """Sets the number of threads and the precision."""
    if options.threads:
        torch.set_num_threads(options.threads)
    # cuDNN's convolutions would use it by default, at three digits.
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.backends.cudnn.allow_tf32 = options.tf32


@contextmanager
def settings_kept() -> Iterator[None]:
    """Puts back what `settle` sets."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, torch.get_num_threads()
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
        torch.set_num_threads(before[2])


def random_kept() -> AbstractContextManager[None]:
    """Puts back the state of the random numbers."""
    return torch.random.fork_rng(range(torch.cuda.device_count()))
