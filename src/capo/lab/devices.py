"""Where a run computes, and an evaluation samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capo.core.errors import InputError

if TYPE_CHECKING:
    import torch

    from capo.lab.config import Config
    from capo.policies import Policy

DTYPES = ("float32", "bfloat16", "float16")


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


@dataclass(frozen=True)
class Place:
    """Where a policy is sampled, and in which numbers; ``dtype`` None: as its weights were saved."""

    device: torch.device
    dtype: torch.dtype | None


def find_place(device: str, dtype: str) -> Place:
    """Where to sample, by the words of a command line.

    Args:
        device: ``auto`` (an accelerator where there is one), or a device as torch calls it.
        dtype: one of `DTYPES`, or ``auto``: as the weights were saved, but float32 on the CPU.

    Raises:
        InputError: ``--device`` or ``--dtype``.
    """
    import torch

    if dtype != "auto" and dtype not in DTYPES:
        raise InputError("--dtype", f"must be auto, {', '.join(DTYPES)}, got {dtype!r}.")
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        asked = there or torch.device("cpu")
    else:
        asked = _torch_device(device)
        _check_there(asked, there)
    if dtype == "auto":
        return Place(asked, torch.float32 if asked.type == "cpu" else None)
    return Place(asked, getattr(torch, dtype))


def sampled_on(policy: Policy) -> dict[str, str]:
    """Where a policy is and in which numbers, in words."""
    model = policy.model
    return {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def _torch_device(name: str) -> torch.device:
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError("--device", f"must be auto, cpu, cuda or cuda:1, got {name!r}.") from None


def _check_there(asked: torch.device, there: torch.device | None) -> None:
    import torch

    if asked.type == "cpu":
        return
    if there is None:
        raise InputError("--device", f"{str(asked)!r} is not there: torch finds the CPU only.")
    number = torch.accelerator.device_count()
    if asked.type != there.type or (asked.index or 0) >= number:
        raise InputError(
            "--device", f"{str(asked)!r} is not there: torch finds {number} of {there.type!r}."
        )
