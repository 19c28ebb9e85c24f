"""Completions of a step's batch on which the step is tried: chosen evenly over the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from capo.core.errors import InputError
from capo.integrations._trl_head import predicting_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.integrations._trl_sharded import Engine
    from capo.integrations._trl_world import World


_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
)  # as TRL names what its processors return


@dataclass(frozen=True)
class Sample:
    """Some completions of one micro-batch, as the policy sees them.

    Attributes:
        prompt_ids, prompt_mask: ``[n, P]``, left-padded.
        token_ids, mask: completions and the tokens that count, ``[n, T]``.
        attention: attention mask of prompts and completions, ``[n, P + T]``.
        advantage: ``[n, T]``.
        weight: sequences of the micro-batch that each stands for, ``[n]``.
        hidden: input of the LM head at the predicting positions in the training pass, ``[n, T, d]``.
        rows: which of the micro-batch they are, ``[n]``.
    """

    prompt_ids: Int[Tensor, "n P"]
    prompt_mask: Int[Tensor, "n P"]
    token_ids: Int[Tensor, "n T"]
    mask: Bool[Tensor, "n T"]
    attention: Int[Tensor, "n L"]
    advantage: Float[Tensor, "n T"]
    weight: Float[Tensor, " n"]
    hidden: Float[Tensor, "n T d"]
    rows: Int[Tensor, " n"]

    def run(self, engine: Engine) -> Float[Tensor, "tokens d"]:
        """The backbone's output at the positions that predict the counted tokens."""
        # The same positions as in training, so that the numbers are the same to the bit.
        ids = torch.cat([self.prompt_ids, self.token_ids], dim=1)
        hidden = engine.forward(ids, self.attention)
        return self.at_tokens(predicting_positions(hidden, self.token_ids.size(1)))

    def at_tokens(self, values: Tensor) -> Tensor:
        """``values [n, T, …]`` at the counted tokens."""
        return values[self.mask]

    def again(self, hidden: Float[Tensor, "B T d"]) -> Float[Tensor, "tokens d"]:
        """These completions' part of a later training pass of the same micro-batch."""
        return self.at_tokens(hidden[self.rows, : self.token_ids.size(1)].detach())

    def token_weights(self) -> Float[Tensor, " tokens"]:
        """``weight`` of every counted token's sequence."""
        return self.at_tokens(self.weight[:, None].expand_as(self.mask))


def draw_sample(
    inputs: dict[str, Any],
    mask: Bool[Tensor, "B T"],
    hidden: Float[Tensor, "B T d"],
    sequences: int | None,
    generator: torch.Generator,
    world: World,
) -> Sample:
    """Choose completions of a micro-batch: as equal a number of every prompt's as possible.

    Prompts share the tokens at which much is decided, so that completions of all prompts tell more than
    as many at random. Completions none of whose tokens count (truncated ones, say) tell nothing and are
    not chosen.

    Args:
        inputs: the trainer's.
        mask: True on the tokens that count.
        hidden: of the training pass.
        sequences: how many; None for all.
        generator: on the CPU, for this purpose alone; in the same state in all processes.
        world: the processes, of whose rows together the completions are chosen. One without any
            contributes its first with weight 0, since all take part in every pass.

    Raises:
        InputError: the policy is given images, which a sample does not hold.
    """
    if any(inputs.get(name) is not None for name in _IMAGES):
        raise InputError(
            "train_dataset",
            "must hold no images, with which the policy cannot be run again to measure a step; "
            "leave them out, or set trust_region=None.",
        )
    counted = mask.any(dim=1)
    if world.alone and (sequences is None or sequences >= mask.size(0)) and bool(counted.all()):
        rows, weight = torch.arange(mask.size(0)), torch.ones(mask.size(0))
        return take_rows(inputs, mask, hidden, rows, weight)
    prompts, own = world.prompts(inputs)
    (everyones,), _ = world.rows(counted[:, None].long())
    some = everyones[:, 0].bool().cpu().nonzero()[:, 0]
    rows, weight = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    if some.numel():
        drawn, weight = spread(prompts[some], sequences, generator)
        rows = some[drawn]
    mine = (rows >= own.start) & (rows < own.stop)
    rows, weight = rows[mine] - own.start, weight[mine]
    if rows.numel() == 0:
        rows, weight = torch.zeros(1, dtype=torch.long), torch.zeros(1)
    return take_rows(inputs, mask, hidden, rows, weight)


def part_of(sequences: int | None, index: int, micro_batches: int) -> int | None:
    """How many of a step's ``sequences`` micro-batch ``index`` gives: one at least; None for all."""
    if sequences is None:
        return None
    return max(1, sequences * (index + 1) // micro_batches - sequences * index // micro_batches)


def take_rows(
    inputs: dict[str, Any],
    mask: Bool[Tensor, "B T"],
    hidden: Float[Tensor, "B T d"],
    rows: Int[Tensor, " n"],
    weight: Float[Tensor, " n"],
) -> Sample:
    """These completions of a micro-batch, without the padding behind the longest of them."""
    prompts = inputs["prompt_ids"]
    # Causal: what comes after the last completion's end is not needed.
    length = int(inputs["completion_mask"][rows].sum(-1).max())
    advantages = inputs["advantages"]
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1).expand_as(mask)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return Sample(
        prompt_ids=prompts[rows],
        prompt_mask=inputs["prompt_mask"][rows],
        token_ids=inputs["completion_ids"][rows, :length],
        mask=mask[rows, :length],
        attention=attention[rows, : prompts.size(1) + length],
        advantage=advantages[rows, :length].float(),
        weight=weight.to(prompts.device),
        hidden=hidden[rows, :length].detach(),
        rows=rows,
    )


def spread(
    prompts: Int[Tensor, "B P"], sequences: int | None, generator: torch.Generator
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Rows, and how many rows of its prompt each stands for."""
    batch = prompts.size(0)
    _, group = torch.unique(prompts, dim=0, return_inverse=True)
    order = torch.randperm(batch, generator=generator)
    shuffled = group[order]
    # Rank within its prompt: rank 0 of every prompt comes first, in random order.
    rank = torch.zeros(batch, dtype=torch.long)
    seen: dict[int, int] = {}
    for position, name in enumerate(shuffled.tolist()):
        rank[position] = seen.get(name, 0)
        seen[name] = seen.get(name, 0) + 1
    chosen = order[torch.argsort(rank, stable=True)][: min(sequences or batch, batch)]
    sizes = torch.bincount(group)
    drawn = torch.bincount(group[chosen], minlength=sizes.numel())
    # Prompts of which nothing was drawn are stood for by all others alike.
    share = (sizes / drawn.clamp(min=1))[group[chosen]]
    return chosen.sort().values, share[chosen.argsort()].float()
