"""CAPO in verl: an FSDP2 engine that looks at every step before it is taken.

verl finds the engine through the entry point ``verl.plugins`` and takes it where the environment says
``VERL_ENGINE_VENDOR=capo``; what it is to do is in the actor's own configuration::

    actor_rollout_ref.actor.fsdp_config._target_=capo.integrations.verl.CAPOEngineConfig
    +actor_rollout_ref.actor.fsdp_config.capo.trust_region=auto

Between a loss and its backward pass the tokens are judged by the gradient of that loss with respect to
their log-probabilities, so that every loss, ratio and clip of verl counts, and the gradient of every
rejected token is gated. Between the clipped gradient and the optimizer's step the trust region foresees
the policy shift and shortens the step. Everything that is decided about a micro-batch is decided on the
rows of all processes. With ``monitor=true`` instead of them everything is logged and no bit of the training
changes; with none of the three the engine is verl's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from verl.utils.device import get_device_name
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from capo.core.errors import InputError
from capo.integrations._trl_head import capture_hidden, drops_out
from capo.integrations._trl_judge import TokenRecord
from capo.integrations._verl_actor import Actor
from capo.integrations._verl_options import Options, check_layout, read_options

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

logger = logging.getLogger(__name__)

__all__ = ["VENDOR", "CAPOEngine", "CAPOEngineConfig", "TokenRecord", "check_registered"]

VENDOR = "capo"
"""What ``VERL_ENGINE_VENDOR`` must be."""


@dataclass
class CAPOEngineConfig(FSDPEngineConfig):  # type: ignore[misc]
    """verl's `FSDPEngineConfig` and what CAPO adds to it.

    Args:
        capo: the options, see :class:`capo.integrations._verl_options.Options`; empty: nothing is done.

    Raises:
        InputError: an option is not allowed, or verl would not take :class:`CAPOEngine`.
    """

    capo: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the options, and that they will be followed."""
        super().__post_init__()
        check_registered()
        self.options()

    def options(self) -> Options:
        """The options, checked."""
        given = self.capo or {}
        if OmegaConf.is_config(given):
            given = OmegaConf.to_container(given, resolve=True)
        return read_options({name: _plain(value) for name, value in given.items()})


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_registered() -> None:
    """Make sure that verl takes CAPO's engine: it says nothing where it falls back to its own.

    Raises:
        InputError: ``VERL_ENGINE_VENDOR`` is not ``capo`` in this process.
    """
    found = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    if not issubclass(found, CAPOEngine):
        vendor = os.environ.get("VERL_ENGINE_VENDOR")
        raise InputError(
            "VERL_ENGINE_VENDOR",
            f"must be {VENDOR!r} in the environment of every worker, got {vendor!r}: verl would train "
            f"with {found.__name__}.",
        )


@EngineRegistry.register(
    model_type="language_model",
    backend=["fsdp", "fsdp2"],  # FSDP1 as well, or verl would fall back to its own without a word
    device=["cuda", "npu", "cpu"],
    vendor=VENDOR,
)
class CAPOEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's FSDP engine, which judges tokens and steps.

    Args:
        model_config: verl's.
        engine_config: a :class:`CAPOEngineConfig`; with verl's own, or a reference policy's, nothing is
            done.
        optimizer_config: verl's.
        checkpoint_config: verl's.

    Attributes:
        token_callbacks: called with a :class:`TokenRecord` for every micro-batch that was judged.

    Raises:
        InputError: the configuration cannot be seen through.
    """

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        """Refuse what cannot be judged before anything is built."""
        options = Options()
        if isinstance(engine_config, CAPOEngineConfig) and not engine_config.forward_only:
            options = engine_config.options()
        if options.on:
            check_layout(model_config, engine_config)
        self.capo_options = options
        self.token_callbacks: list[Callable[[TokenRecord], None]] = []
        self._actor: Actor | None = None
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def initialize(self) -> None:
        """Build the policy and its optimizer as verl does, and what judges them."""
        super().initialize()
        if not self.capo_options.on:
            if not self.engine_config.forward_only and self.rank == 0:
                logger.warning("fsdp_config.capo says nothing: this is verl's own engine.")
            return
        self._actor = Actor(
            self.capo_options,
            module=self.module,
            optimizer=self.optimizer,
            optimizer_config=self.optimizer_config,
            dp_group=self.get_data_parallel_group(),
            autocast=self._autocast,
            exact_hidden=self._autocast_dtype == torch.float32 and not drops_out(self.module),
            seed=self.engine_config.seed,
            token_callbacks=self.token_callbacks,
        )
        # verl clips and steps in one method; these are called right around the step itself.
        self.optimizer.register_step_pre_hook(self._actor.before_step)
        self.optimizer.register_step_post_hook(self._actor.after_step)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    def train_batch(self, data: TensorDict, loss_function: Callable[..., Any]) -> Any:
        """One optimizer step, judged."""
        if self._actor is None:
            return super().train_batch(data, loss_function)
        with self._actor.step(data, loss_function) as ledger:
            outputs = super().train_batch(data, loss_function)
        outputs["metrics"].update({name: [value] for name, value in ledger.items()})
        return outputs

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any], forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """One micro-batch; in training its loss is judged before verl sees it."""
        result: tuple[Tensor, dict[str, Any]]
        if self._actor is None or forward_only:
            result = super().forward_step(micro_batch, loss_function, forward_only)
            return result
        with capture_hidden(self.module) as passes:
            judged = partial(self._actor.judged_loss, loss_function, passes)
            result = super().forward_step(micro_batch, judged, forward_only)
        return result

    def optimizer_step(self) -> float:
        """Clip and step; then the moments that judge the next step advance."""
        norm: float = super().optimizer_step()
        if self._actor is not None:
            self._actor.finish_step(norm, self.lr_scheduler)
        return norm

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Save as verl does, and CAPO's own state beside it."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self._actor is not None and local_path is not None:
            self._actor.save(Path(local_path))

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Load as verl does, and CAPO's own state.

        Raises:
            InputError: the checkpoint lacks the simulated moments that this engine needs.
        """
        super().load_checkpoint(local_path, *args, **kwargs)
        if self._actor is not None and local_path is not None:
            self._actor.load(Path(local_path))
