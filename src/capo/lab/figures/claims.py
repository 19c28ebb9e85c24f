"""The claims that are judged, each with its criterion in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from capo.lab.figures.criteria import (
    Judged,
    Numbers,
    aggressive_collapses,
    ahead_of_rivals,
    as_fast_as_the_best,
    better_than_proxies,
    cheap,
    few_rejected,
    kl_penalty,
    learns_everywhere,
    level_with_the_best,
    masks_prevent_it,
    masks_rescue,
    masks_rescue_tasks,
    ppo_clip,
    self_found,
    step_models,
    thirty_times,
    threshold_range,
    tracks_better,
    tracks_kl,
    warns,
)


@dataclass(frozen=True)
class Claim:
    """What is claimed, and when we say that it holds.

    Attributes:
        figure: whose record says so.
        claim: of the paper, in one sentence.
        criterion: in words; ``judge`` is the same in code.
        judge: the numbers of the record → verdict and figures.
    """

    figure: str
    claim: str
    criterion: str
    judge: Callable[[Numbers], Judged]


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "fig1", "Aggressive GRPO, Dr.GRPO and REINFORCE collapse and stay collapsed.",
        "at least 80 % of the seeds of each collapse", aggressive_collapses,
    ),
    Claim(
        "fig1", "CAPO, Dr.CAPO and ReinCAPO do not collapse in the same regime.",
        "no seed of each collapses, and each ends above the base policy", masks_prevent_it,
    ),
    Claim(
        "fig1", "CAPO reaches conservative GRPO's accuracy with 30 × fewer completions.",
        "at least 30 × fewer completions to the target; in part: fewer", thirty_times("capo"),
    ),
    Claim(
        "fig1", "(ours) The trust region does so.",
        "at least 30 × fewer completions to the target; in part: fewer", thirty_times("trust-region"),
    ),
    Claim(
        "fig3", "m_F and m_H warn of a collapse before it happens.",
        "at least 80 % of the collapses are warned of a step ahead, at most 20 % of the stable runs alarm; "
        "in part: one of the two does",
        warns,
    ),
    Claim(
        "fig5", "Few tokens are rejected: a peak of about 8 %, then under 2 %.",
        "peak at most 16 %, under 2 % in the last quarter, at both learning rates", few_rejected,
    ),
    Claim(
        "fig6", "With an SGD step model CAPO still works, Dr.CAPO and ReinCAPO do not.",
        "no seed of CAPO collapses, 80 % of those of the others do", step_models,
    ),
    Claim(
        "fig7", "PPO clip 0.2 does not prevent the collapse, 0.02 and 0.002 cost accuracy.",
        "at 0.2 at least 80 % of the seeds collapse at every number of passes; the others end 0.05 or more "
        "below the best run of the figure",
        ppo_clip,
    ),
    Claim(
        "fig8", "A KL penalty of 1 prevents the collapse at the price of accuracy.",
        "at most 20 % of the seeds collapse, and it ends less than 0.1 above the base policy", kl_penalty,
    ),
    Claim(
        "table1", "Judging the tokens costs about 3 % of a step (2.5 of them the moments, in the paper).",
        "at most 5 % of a step's CPU time; in part: at most 15 %", cheap,
    ),
    Claim(
        "table5", "Token-level m_F tracks the true KL (Spearman 0.62 and 0.46), batch level better.",
        "token level at least 0.4 under both updates, batch level higher", tracks_kl,
    ),
    Claim(
        "table5", "(ours to test) m_F tracks the true KL of a token better than its probability does.",
        "its token-level interval lies above those of surprise (−log π) and entropy, under both updates",
        tracks_better,
    ),
    Claim(
        "thresholds", "Thresholds need no fine tuning, base optimizer Adam.",
        "no collapse and a final accuracy 0.05 above the base policy at neighbouring thresholds over two "
        "decades, at each learning rate; in part: at one",
        threshold_range("adam"),
    ),
    Claim(
        "thresholds", "Thresholds need no fine tuning, base optimizer SGD.",
        "no collapse and a final accuracy 0.05 above the base policy at neighbouring thresholds over two "
        "decades; in part: at one", threshold_range("sgd"),
    ),
    Claim(
        "selections", "(open question) Thresholds can set themselves.",
        "the best self-setting rule does not collapse, ends 0.05 above the base policy, and at most 0.05 "
        "below the hard thresholds, at both learning rates",
        self_found,
    ),
    Claim(
        "proxies", "(ours to test) The last-layer model selects better than cheaper proxies.",
        "CAPO's interval lies above those of all controls at its own rejection rate", better_than_proxies,
    ),
    Claim(
        "rivals", "Under identical aggressive conditions no rival is ahead of CAPO's masks.",
        "no rival's interval lies above, at either learning rate", ahead_of_rivals("capo"),
    ),
    Claim(
        "rivals", "(ours) Under identical aggressive conditions no rival is ahead of the trust region.",
        "no rival's interval lies above, at either learning rate", ahead_of_rivals("trust-region"),
    ),
    Claim(
        "map", "Token masks rescue collapsing runs, base optimizer Adam.",
        "where most seeds collapse without masks, none does with them, and they end 0.05 above the base "
        "policy; in part: somewhere",
        masks_rescue("adam"),
    ),
    Claim(
        "map", "Token masks rescue collapsing runs, base optimizer SGD or momentum.",
        "where most seeds collapse without masks, none does with them, and they end 0.05 above the base "
        "policy; in part: somewhere",
        masks_rescue("sgd", "momentum"),
    ),
    Claim(
        "tasks", "(ours) The trust region's defaults learn on every task and architecture, untuned.",
        "on each no seed collapses and the final accuracy's interval lies 0.05 above the base policy; in "
        "part: on some",
        learns_everywhere,
    ),
    Claim(
        "tasks", "(ours) The same defaults end no lower than GRPO, searched anew for every task.",
        "on none the interval of GRPO's final accuracy lies above; in part: not on all", level_with_the_best,
    ),
    Claim(
        "tasks", "(ours) The same defaults take no more completions than GRPO, searched anew for every task.",
        "on each GRPO's median completions to the target are at least theirs (undecided where neither gets "
        "there); in part: on some",
        as_fast_as_the_best,
    ),
    Claim(
        "tasks", "CAPO's masks keep aggressive GRPO from collapsing on every task and architecture.",
        "where most seeds collapse without masks, none does with them; in part: somewhere",
        masks_rescue_tasks,
    ),
)  # fmt: skip
