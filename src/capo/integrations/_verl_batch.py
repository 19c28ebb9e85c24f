"""A micro-batch of verl, which packs its sequences, laid out as completions ``[B, T]``.

verl's policy pass gives one number a position of the packed sequences, position l predicting token
l + 1. Which of them belong to a completion is asked of verl itself, by sending the positions through the
function that its losses send their log-probabilities through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from capo.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from tensordict import TensorDict
    from torch import Tensor

# Losses with an aggregation of their own, whatever the configuration says; None: not one per token.
_OWN_AGGREGATION = {"sapo": "seq-mean-token-mean", "geo_mean": None}


@dataclass(frozen=True)
class Completions:
    """The completions of a micro-batch.

    Attributes:
        token_ids: ``[B, T]``, right-padded.
        mask: True on the tokens that count, ``[B, T]``.
        positions: where in the packed sequences each token is predicted, ``[B, T]``; 0 in the padding.
        present: True on the tokens of the completions, those that do not count included, ``[B, T]``.
        advantages: ``[B, T]``.
        prompt_ids, prompt_mask: ``[B, P]``, left-padded.
    """

    token_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    present: Bool[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]

    @property
    def inputs(self) -> dict[str, Any]:
        """The same under the names that the trust region reads."""
        return {
            "prompt_ids": self.prompt_ids,
            "prompt_mask": self.prompt_mask.long(),
            "completion_ids": self.token_ids,
            "completion_mask": self.present.long(),
            "advantages": self.advantages,
        }


def completions(data: TensorDict) -> Completions:
    """Lay a micro-batch out as completions."""
    packed = data["input_ids"]
    ids, starts = packed.values(), packed.offsets()[:-1]
    index = torch.arange(ids.numel(), device=ids.device)
    # Shifted by one, so that what verl pads with (0) is told from the first position.
    shifted = no_padding_2_padding(index + 1, data)
    present = shifted > 0
    positions = (shifted - 1).clamp(min=0)
    token_ids = torch.where(present, ids[(positions + 1).clamp(max=ids.numel() - 1)], 0)
    # The prompt ends where the completion's first token is predicted.
    lengths = packed.offsets().diff() - present.sum(-1)
    width = int(lengths.max())
    place = torch.arange(width, device=ids.device) - (width - lengths)[:, None]
    prompt_mask = place >= 0
    prompt_ids = torch.where(prompt_mask, ids[starts[:, None] + place.clamp(min=0)], 0)
    return Completions(
        token_ids=token_ids,
        mask=_padded(data["response_mask"], positions).bool() & present,
        positions=positions,
        present=present,
        advantages=_padded(data["advantages"], positions).float(),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
    )


def _padded(values: Tensor, like: Tensor) -> Tensor:
    if not values.is_nested:
        return values
    padded: Tensor = torch.nested.to_padded_tensor(values, 0, output_size=like.shape)
    return padded


def packed_hidden(hidden: Float[Tensor, "B L d"], data: TensorDict) -> Float[Tensor, "tokens d"]:
    """The hidden states at the positions of the packed sequences.

    Args:
        hidden: of the pass: one packed row (with padding at its end), or a padded row a sequence.
        data: the micro-batch.
    """
    offsets = data["input_ids"].offsets()
    if tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True):
        return hidden[0, : int(offsets[-1])]
    return hidden[torch.arange(hidden.size(1), device=hidden.device) < offsets.diff()[:, None]]


def micro_batch_count(data: TensorDict, dp_group: Any) -> int:
    """Into how many micro-batches verl will split a mini-batch."""
    from verl.workers.engine.utils import prepare_micro_batches

    parts, _ = prepare_micro_batches(data=data, dp_group=dp_group, same_micro_num_in_dp=True)
    return len(parts)


def actor_config(loss_function: Any) -> Any:
    """The actor's configuration, which verl binds to its loss.

    Raises:
        InputError: the loss is not one of verl's policy losses.
    """
    config = getattr(loss_function, "keywords", {}).get("config")
    if config is None or not hasattr(config, "policy_loss"):
        raise InputError(
            "loss_fn",
            "must be verl's ppo_loss with the actor's configuration bound to it (functools.partial), "
            "since CAPO reads the loss's normalisation there.",
        )
    if aggregation(config) is None:
        raise InputError(
            "actor_rollout_ref.actor.policy_loss.loss_mode",
            f"must be a loss with one term a token for CAPO, got {config.policy_loss.loss_mode}.",
        )
    return config


def aggregation(config: Any) -> str | None:
    """How the policy loss aggregates its tokens' terms."""
    mode: str | None = _OWN_AGGREGATION.get(
        config.policy_loss.get("loss_mode", "vanilla"), config.loss_agg_mode
    )
    return mode


def token_loss_scale(config: Any, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The factor with which each token's term enters verl's loss, that of its own aggregation.

    Args:
        config: the actor's, after the loss was computed (which leaves the mini-batch's sizes in it).
        mask: True on the tokens that count.
    """
    terms = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
    with torch.enable_grad():
        loss = agg_loss(
            loss_mat=terms,
            loss_mask=mask,
            loss_agg_mode=aggregation(config),
            **config.global_batch_info,
        )
    (scale,) = torch.autograd.grad(loss, terms)
    return torch.where(mask, scale, 1.0)
