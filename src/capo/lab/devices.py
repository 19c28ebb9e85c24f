"""Where a run computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from capo.core.errors import InputError

if TYPE_CHECKING:
    from capo.lab.config import Config


def check_device(config: Config) -> None:
    """Refuse a device that is not there, or that is not one.

    Raises:
        InputError: ``run.device`` or ``training.tf32``.
    """
    import torch

    there = torch.cuda.is_available()
    if config.run.device == "cuda" and not there:
        raise InputError("run.device", "'cuda' needs a GPU, and torch finds none; use 'cpu'.")
    if config.training.tf32 and not there:
        raise InputError("training.tf32", "needs a GPU, and torch finds none.")
    if config.run.device != "cpu" and torch.cuda.device_count() > 1:
        # transformers would spread the batch over all of them in this one process
        raise InputError(
            "run.device",
            f"must be one GPU, and torch finds {torch.cuda.device_count()}; "
            "choose with CUDA_VISIBLE_DEVICES.",
        )


@contextmanager
def precision(config: Config) -> Iterator[None]:
    """Multiply float32 matrices as ``training.tf32`` says.

    Not by the trainer's own ``tf32``: that sets `torch.backends.fp32_precision`, after which torch refuses
    to say how precise its products are.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if config.training.tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
