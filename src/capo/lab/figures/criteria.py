"""When a claim of the paper holds at this scale: the criteria in code; `claims` has the words.

They were written before the runs were made. Some were made stricter afterwards (docs/LOG.md, `LEARNT`;
neighbours in `threshold_range`; undecided tasks in `as_fast_as_the_best`; learning in `masks_rescue`), none
laxer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

Word = Literal["holds", "holds in part", "does not hold", "not measured"]
Numbers = dict[str, Any]
Judged = tuple[Word, str]


LEARNT = 0.05
"""Above the base policy: what a run has to gain to have learnt anything."""


FIRST_PASS = "-first-pass"
"""Variants of one seed that are there to show that they are GRPO; nobody's rival."""


MOST = 0.8  # of the seeds, or of the runs: what "most" means below


def _cells(numbers: Numbers, *variants: str, **at: Any) -> list[dict[str, Any]]:
    """Rows of the table with figures; ``at``: last parts of the axes' keys."""

    def there(row: dict[str, Any]) -> bool:
        found = {key.rpartition(".")[2]: value for key, value in row.items()}
        return row["variant"] in variants and all(found.get(k) == v for k, v in at.items())

    rows = [row for row in numbers["cells"] if there(row) and "final_accuracy" in row]
    if {row["variant"] for row in rows} != set(variants):
        raise Missing
    return rows


class Missing(Exception):  # noqa: N818 - nothing went wrong
    """A number that a claim needs has not been measured."""


def _fallen(row: dict[str, Any]) -> str:
    return (
        f"{row['label']}: {row['collapsed']} of {row['seeds']} collapsed, final {_final(row):.2f}"
    )


def _final(row: dict[str, Any]) -> float:
    return float(row["final_accuracy"]["value"])


def _word(held: Sequence[bool]) -> Word:
    """All, some, none.

    Raises:
        Missing: there is nothing to judge.
    """
    if not held:
        raise Missing
    return "holds" if all(held) else "holds in part" if any(held) else "does not hold"


def aggressive_collapses(numbers: Numbers) -> Judged:
    """Most seeds of each baseline."""
    rows = _cells(numbers, "grpo", "dr-grpo", "reinforce")
    return _word([row["collapsed"] >= MOST * row["seeds"] for row in rows]), "; ".join(
        map(_fallen, rows)
    )


def masks_prevent_it(numbers: Numbers) -> Judged:
    """No seed of a CAPO version collapses, and it ends above the base policy."""
    rows = _cells(numbers, "capo", "dr-capo", "reincapo")
    held = [not row["collapsed"] and _final(row) > row["base_accuracy"] for row in rows]
    return _word(held), "; ".join(map(_fallen, rows))


def thirty_times(name: str) -> Callable[[Numbers], Judged]:
    """Thirty times fewer completions than conservative GRPO; in part: fewer at all."""

    def judge(numbers: Numbers) -> Judged:
        ratio = numbers["efficiency"].get(name)
        if ratio is None:
            raise Missing
        low = ratio["low"] or 0.0
        word: Word = "holds" if low >= 30 else "holds in part" if low > 1 else "does not hold"
        return word, f"{ratio['text']} × fewer completions to the target"

    return judge


def warns(numbers: Numbers) -> Judged:
    """Most collapses are warned of a step ahead, most stable runs raise no alarm; m_F and m_H each."""
    found = [
        numbers["warnings"].get(f"capo/batch/{name}_shift") for name in ("policy", "objective")
    ]
    if None in found:
        raise Missing
    held = [
        w["warned"] >= MOST * w["collapsed"] and w["false_alarms"] <= (1 - MOST) * w["stable"]
        for w in found
    ]
    parts = [
        f"{name}: {w['warned']} of {w['collapsed']} collapses, "
        f"{'no lead' if w['lead'] is None else format(w['lead'], 'g') + ' steps before'}, "
        f"{w['false_alarms']} false alarms in {w['stable']} stable runs"
        for name, w in zip(("m_F", "m_H"), found, strict=True)
    ]
    return _word(held), "; ".join(parts)


def few_rejected(numbers: Numbers) -> Judged:
    """CAPO's rejection rate peaks below 16 % (twice the paper's peak), and ends below 2 %."""
    cells = [(name, n) for name, n in numbers["rejection"].items() if name.startswith("capo/")]
    if not cells:
        raise Missing
    held = [
        test for _, n in cells for test in (n["peak"]["value"] <= 0.16, n["late"]["value"] < 0.02)
    ]
    text = [
        f"{n['label']}: peak {n['peak']['value']:.1%}, last quarter {n['late']['value']:.1%}"
        for _, n in cells
    ]
    return _word(held), "; ".join(text)


def step_models(numbers: Numbers) -> Judged:
    """With SGD's step model CAPO does not collapse, and Dr.CAPO and ReinCAPO do."""
    works = _cells(numbers, "capo", step_model="sgd")
    fails = _cells(numbers, "dr-capo", "reincapo", step_model="sgd")
    held = [not row["collapsed"] for row in works]
    held += [row["collapsed"] >= MOST * row["seeds"] for row in fails]
    return _word(held), "; ".join(map(_fallen, [*works, *fails]))


def ppo_clip(numbers: Numbers) -> Judged:
    """Clip 0.2 does not prevent the collapse; 0.02 and 0.002 end below the best of the figure."""
    loose = _cells(numbers, "clip", epsilon=0.2, learning_rate=1e-3)
    tight = _cells(numbers, "clip", epsilon=0.02, learning_rate=1e-3)
    tight += _cells(numbers, "clip", epsilon=0.002, learning_rate=1e-3)
    best = max(_final(row) for row in numbers["cells"] if "final_accuracy" in row)
    held = [row["collapsed"] >= MOST * row["seeds"] for row in loose]
    held += [_final(row) < best - 0.05 for row in tight]
    return _word(held), f"best of all {best:.2f}; " + "; ".join(map(_fallen, [*loose, *tight]))


def kl_penalty(numbers: Numbers) -> Judged:
    """β = 1 prevents the collapse of most seeds, and gains less than 0.1 on the base policy."""
    (row,) = _cells(numbers, "kl", beta=1.0)
    held = [row["collapsed"] <= (1 - MOST) * row["seeds"], _final(row) < row["base_accuracy"] + 0.1]
    rows = _cells(numbers, "kl")
    return _word(held), f"base {row['base_accuracy']:.2f}; " + "; ".join(map(_fallen, rows))


def cheap(numbers: Numbers) -> Judged:
    """Judging and moments are at most 5 % of a step; in part: at most 15 %."""
    found = numbers["cost"].get("capo")
    if found is None:
        raise Missing
    judging = found["shares"]["curvature and selection"] + found["shares"]["shift of the batch"]
    moments = found["shares"]["moments"]
    share = judging + moments
    word: Word = "holds" if share <= 0.05 else "holds in part" if share <= 0.15 else "does not hold"
    return word, f"{share:.1%} of a step, {moments:.1%} of it moments"


def tracks_kl(numbers: Numbers) -> Judged:
    """Token level at least 0.4 under both updates, batch level higher than that."""
    found = list(numbers["spearman"].values())
    if {n["variant"] for n in found} != {"grpo", "capo"}:
        raise Missing
    held, text = [], []
    for n in found:
        row = n["predictors"]["head, sampled"]
        token, batch = row["token"]["value"], row["batch"]["value"]
        held += [token >= 0.4, batch > token]
        text.append(f"{n['label']}: token {token:.2f}, batch {batch:.2f}")
    return _word(held), "; ".join(text)


def tracks_better(numbers: Numbers) -> Judged:
    """m_F's token-level interval lies above those of surprise and entropy, under both updates."""
    found = list(numbers["spearman"].values())
    if {n["variant"] for n in found} != {"grpo", "capo"}:
        raise Missing
    held, text = [], []
    for n in found:
        row = n["predictors"]
        own = row["head, sampled"]["token"]
        others = {name: row[name]["token"] for name in ("surprise", "entropy")}
        held.append(own["low"] > max(other["high"] for other in others.values()))
        words = ", ".join(f"{name} {other['value']:.2f}" for name, other in others.items())
        text.append(f"{n['label']}: m_F {own['value']:.2f}, {words}")
    return _word(held), "; ".join(text)


def threshold_range(optimizer: str) -> Callable[[Numbers], Judged]:
    """Neighbouring thresholds over two decades: no seed collapses and the policy learns; in part: at one.

    Learns: it ends more than `LEARNT` above the base policy. Masks that reject whatever would teach
    something collapse at no threshold.
    """

    def judge(numbers: Numbers) -> Judged:
        rows = [r for r in numbers["sweep"] if r["series"].startswith(f"{optimizer},")]
        series = list(dict.fromkeys(row["series"] for row in rows))
        if not rows:
            raise Missing
        worst, text = 3, []
        learnt = numbers["cells"][0]["base_accuracy"] + LEARNT
        for name in series:
            tried = sorted((r for r in rows if r["series"] == name), key=lambda r: r["threshold"])
            safe = [not r["collapsed"] and r["value"] > learnt for r in tried]
            stretches = _stretches([r["threshold"] for r in tried], safe)
            best = max(r["value"] for r in tried)
            decades = max((high / low for low, high in stretches), default=0.0)
            worst = min(worst, 2 if decades >= 99 else 1 if stretches else 0)
            shown = ", ".join(f"{low:g} to {high:g}" for low, high in stretches) or "none"
            text.append(f"{name}: learns at δ_F {shown}, best final {best:.2f}")
        word: Word = ("does not hold", "holds in part", "holds")[min(worst, 2)]
        return word, "; ".join(text)

    return judge


def _stretches(tried: Sequence[float], safe: Sequence[bool]) -> list[tuple[float, float]]:
    """First and last of the thresholds that are safe without one that is not between them."""
    pairs = itertools.groupby(zip(tried, safe, strict=True), key=lambda pair: pair[1])
    found = [[threshold for threshold, _ in group] for held, group in pairs if held]
    return [(each[0], each[-1]) for each in found]


def self_found(numbers: Numbers) -> Judged:
    """A rule that sets its own thresholds learns, and ends no lower than the hard ones (− 0.05)."""
    text, held = [], []
    for rate in (2.5e-4, 1e-3):
        (hard,) = _cells(numbers, "hard", learning_rate=rate)
        found = _cells(numbers, "quantile", "nats-1e-4", "nats-1e-5", learning_rate=rate)
        best = max(found, key=_final)
        learns = not best["collapsed"] and _final(best) > best["base_accuracy"] + LEARNT
        held.append(learns and _final(best) >= _final(hard) - 0.05)
        text.append(
            f"learning rate {rate:g}: {best['label'].partition(',')[0]} {_final(best):.2f}, "
            f"hard {_final(hard):.2f}"
        )
    return _word(held), "; ".join(text)


def better_than_proxies(numbers: Numbers) -> Judged:
    """CAPO's interval of the final accuracy lies above that of every control at its rate."""
    text, held = [], []
    for rate in (2.5e-4, 1e-3):
        (own,) = _cells(numbers, "capo", learning_rate=rate)
        others = _cells(numbers, "surprise", "entropy", "gap", "random", learning_rate=rate)
        best = max(others, key=_final)
        held.append(own["final_accuracy"]["low"] > max(o["final_accuracy"]["high"] for o in others))
        text.append(
            f"learning rate {rate:g}: CAPO {_final(own):.2f}, {best['label']} {_final(best):.2f}"
        )
    return _word(held), "; ".join(text)


def ahead_of_rivals(name: str) -> Callable[[Numbers], Judged]:
    """No rival's final accuracy is higher by more than its interval, at either learning rate."""

    def judge(numbers: Numbers) -> Judged:
        text, held = [], []
        for rate in (2.5e-4, 1e-3):
            (own,) = _cells(numbers, name, learning_rate=rate)
            others = [
                row
                for row in numbers["cells"]
                if row["variant"] not in ("capo", "trust-region")
                and not row["variant"].endswith(FIRST_PASS)
                and row.get("training.learning_rate") == rate
                and "final_accuracy" in row
            ]
            if not others:
                raise Missing
            ahead = [
                o for o in others if o["final_accuracy"]["low"] > own["final_accuracy"]["high"]
            ]
            best = max(others, key=_final)
            held.append(not ahead)
            text.append(
                f"learning rate {rate:g}: {_final(own):.2f}, {len(ahead)} of {len(others)} rivals ahead, "
                f"the best of them all {best['label']} {_final(best):.2f}"
            )
        return _word(held), "; ".join(text)

    return judge


def masks_rescue(*optimizers: str) -> Callable[[Numbers], Judged]:
    """Wherever most seeds collapse without masks, none does with them and they learn; in part: somewhere.

    Learns: as in `threshold_range`.
    """

    def judge(numbers: Numbers) -> Judged:
        rows = [row for row in numbers["map"] if row["optimizer"] in optimizers]
        fallen = [row for row in rows if 2 * row["plain_collapsed"] > row["runs"]]
        if not rows:
            raise Missing
        if not fallen:
            return "does not hold", "nothing collapses without masks, so there is nothing to rescue"
        learnt = {
            (row["variant"], row["training.learning_rate"])
            for row in numbers["cells"]
            if _final(row) > row["base_accuracy"] + LEARNT
        }
        saved: list[str] = []
        idle: list[str] = []
        held: list[bool] = []
        for row in fallen:
            optimizer, condition, rate = (
                row[k] for k in ("optimizer", "condition", "learning_rate")
            )
            learns = (f"{optimizer}-{condition}-masks", rate) in learnt
            held.append(bool(row["rescued"]) and learns)
            if row["rescued"]:
                (saved if learns else idle).append(f"{optimizer} {condition} at {rate:g}")
        text = f"{len(saved)} of {len(fallen)} collapsing settings rescued"
        if saved:
            text += f": {', '.join(saved)}"
        if idle:
            text += f"; no collapse but nothing learnt: {', '.join(idle)}"
        return _word(held), text

    return judge


def _tasks(numbers: Numbers, *arms: str) -> list[dict[str, Any]]:
    """Rows of the tasks that have been run with these arms."""
    rows = [row for row in numbers["tasks"] if set(arms) <= set(row["arms"])]
    if not rows:
        raise Missing
    return rows


def learns_everywhere(numbers: Numbers) -> Judged:
    """The trust region: no collapse, and a final interval more than `LEARNT` above the base policy."""
    held, text = [], []
    for row in _tasks(numbers, "trust-region"):
        own = row["arms"]["trust-region"]
        held.append(not own["collapsed"] and own["final"]["low"] > row["base"] + LEARNT)
        text.append(f"{row['label']} {row['base']:.2f} → {own['final']['value']:.2f}")
    return _word(held), f"{sum(held)} of {len(held)}: " + "; ".join(text)


def level_with_the_best(numbers: Numbers) -> Judged:
    """Nowhere the final interval of GRPO at its best lies above the trust region's."""
    rows = _tasks(numbers, "trust-region", "grpo-best")
    own = [row["arms"]["trust-region"]["final"] for row in rows]
    best = [row["arms"]["grpo-best"]["final"] for row in rows]
    ahead = [
        row["label"] for row, a, b in zip(rows, own, best, strict=True) if b["low"] > a["high"]
    ]
    won = [row["label"] for row, a, b in zip(rows, own, best, strict=True) if a["low"] > b["high"]]
    text = f"behind on {len(ahead)} of {len(rows)}"
    text += f" ({', '.join(ahead)})" if ahead else ""
    text += f", ahead on {len(won)}" + (f" ({', '.join(won)})" if won else "")
    return _word([row["label"] not in ahead for row in rows]), text


def as_fast_as_the_best(numbers: Numbers) -> Judged:
    """Nowhere it takes more completions to the target than GRPO at its best; in part: somewhere.

    A task on which neither gets there is undecided, and then it is not everywhere.
    """
    rows = _tasks(numbers, "trust-region", "grpo-best")
    found = [row for row in rows if row["ratio"]]
    undecided = [row["label"] for row in rows if not row["ratio"]]
    named = f"undecided, as neither gets there: {', '.join(undecided)}"
    if not found:
        return "not measured", named
    held = [(row["ratio"]["low"] or 0.0) >= 1 for row in found]
    ratios = "; ".join(f"{row['label']} {row['ratio']['text']}" for row in found)
    text = f"GRPO's completions over ours: {ratios}" + (f"; {named}" if undecided else "")
    return _word(held + [False for _ in undecided]), text


def masks_rescue_tasks(numbers: Numbers) -> Judged:
    """Where most seeds of aggressive GRPO collapse, none does with masks; in part: somewhere."""
    rows = _tasks(numbers, "grpo", "capo")
    arms = [(row["label"], row["arms"]["grpo"], row["arms"]["capo"]) for row in rows]
    fallen = [
        (name, masked) for name, plain, masked in arms if 2 * plain["collapsed"] > plain["seeds"]
    ]
    if not fallen:
        return "does not hold", "nothing collapses without masks, so there is nothing to rescue"
    held = [not masked["collapsed"] for _, masked in fallen]
    saved = ", ".join(name for (name, _), safe in zip(fallen, held, strict=True) if safe) or "none"
    return _word(held), (
        f"GRPO collapses on {len(fallen)} of {len(rows)}; with masks {sum(held)} of these do not ({saved})"
    )
