"""The cost model: what CAPO adds to an optimizer step of a job, term by term, on one device.

Every term follows one thing that the integration really does (`capo.integrations._trl_…`, and
`core/README.md` §9 for the judgement). The numbers of passes over memory below are counted in the code
and checked against measurements by ``capo bench plan``.
"""

from __future__ import annotations

import math

from capo.core.errors import InputError
from capo.core.statistics.options import Options
from capo.core.trust_region.divergence import REFERENCE_ENTRIES
from capo.planning.architecture import Architecture
from capo.planning.job import Job
from capo.planning.passes import (
    forward_terms,
    optimizer_bytes,
    plain_terms,
)
from capo.planning.work import HELD, Costs, Term

WIDE = 4  # bytes of float32
SMALL_VOCABULARY = 4096  # below it the step of all tokens is judged on the full vocabulary

# Bytes read and written, per element.
LOGIT = 36  # a logit's way through normaliser, entropy and top-k
JUDGED = 28  # an element of [n, K, d]: two moments gathered, the step in place, the product
REFERENCE = 24  # an entry of [M, V]: product, soft-max, entropy
MEASURED = 84  # an entry of [M, V] of one trial: two products, soft-max, divergence by its series
STEP = 60  # a parameter's proposed step, and the parameter after it
MOMENT = 40  # an entry of the head in the simulated moments' advance

# Copies of [M, V] in float32 at once while a trial is compared with the reference.
REFERENCE_COPIES, TRIAL_COPIES = 3, 7.25
CHUNK_COPIES = 3  # of a chunk's logits


def costs_of(model: Architecture, job: Job) -> Costs:
    """The terms of a job.

    Raises:
        InputError: `top_k` is larger than the vocabulary.
    """
    if job.top_k > model.vocabulary:
        raise InputError(
            "--top-k", f"must be at most the vocabulary {model.vocabulary}, got {job.top_k}."
        )
    terms: list[Term] = []
    if job.selection:
        terms += selection_terms(model, job)
    if job.trust_region:
        terms += trust_region_terms(model, job)
    if job.monitor:
        terms += monitor_terms(model, job)
    weights = job.shard(model.parameters, of="weights") * job.weight_bytes
    optimizer = job.shard(model.parameters, of="optimizer") * optimizer_bytes(job)
    return Costs(terms, plain_terms(model, job), weights + optimizer, symbols(model, job))


def symbols(model: Architecture, job: Job) -> dict[str, int]:
    """The numbers behind the formulas."""
    return {
        "V": model.vocabulary,
        "d": model.width,
        "K": job.top_k,
        "P": model.parameters,
        "P_active": model.active,
        "P_module": model.largest_module,
        "n": job.tokens,
        "A": job.micro_batches,
        "M": reference_tokens(model, job),
        "S": job.trial_sequences,
        "F": round(passes(job)),
        "N": job.gpus,
    }


def reference_tokens(model: Architecture, job: Job) -> int:
    """Tokens M on which one device tries a step."""
    return max(1, min(job.trial_sequences * job.length, REFERENCE_ENTRIES // model.vocabulary))


def passes(job: Job) -> float:
    """Forward passes F that the trust region makes, on average, for an optimizer step.

    In float32 the first of `iterations` steps is tried once, and the next training pass shows what the
    others did; in bf16 every step has a pass before it and a trial.
    """
    return 1.0 / job.iterations if job.exact_hidden else 2.0


# Token selection


def selection_terms(model: Architecture, job: Job) -> list[Term]:
    """Terms of judging and masking tokens."""
    terms = _judging(model, job, "selection")
    terms += _together(model, job)
    head = model.head
    if job.moments == "optimizer" and not job.alone and job.sharding != "ddp":
        for phase in dict.fromkeys(term.phase for term in terms):
            first = phase == terms[0].phase
            terms.append(
                Term(
                    "selection",
                    "the optimizer's moments, gathered" + ("" if first else ", still"),
                    "2·4·V·d",
                    linked=2.0 * WIDE * head * job.micro_batches * first * (1 - 1 / job.gpus),
                    memory=2.0 * WIDE * head,
                    phase=phase,
                )
            )
    if job.moments == "simulated":
        terms += [
            Term("selection", "simulated moments", "2·4·V·d", memory=2.0 * WIDE * head, phase=HELD),
            Term("selection", "their gradient", "4·V·d", memory=1.0 * WIDE * head, phase=HELD),
            Term(
                "selection",
                "advance of the moments",
                f"{MOMENT}·V·d bytes",
                moved=1.0 * MOMENT * head,
            ),
        ]
    return terms


def _judging(model: Architecture, job: Job, part: str) -> list[Term]:
    """Each token by its own step: head pass, top-k, statistics of m_F and m_H."""
    v, d, n, k, count = model.vocabulary, model.width, job.tokens, job.top_k, job.micro_batches
    phase = f"{part}: token by token"
    terms = [
        Term(
            part,
            "head pass on sampled tokens",
            "A·2·n·V·d flops; the hidden states n·d",
            wide_flops=2.0 * count * n * v * d,
            memory=1.0 * n * d * job.pass_bytes,
            phase=phase,
        ),
        Term(
            part,
            "top-k and normaliser",
            f"A·{LOGIT}·n·V bytes; a chunk's logits",
            moved=1.0 * count * LOGIT * n * v,
            memory=_chunk_bytes(v, n, k),
            phase=phase,
        ),
        Term(
            part,
            "m_F and m_H of the judged rows",
            f"A·{JUDGED}·n·K·d bytes; rows and residuals n·K, twice while chunks are joined",
            moved=1.0 * count * JUDGED * n * k * d,
            memory=2.0 * n * k * 12,
            phase=phase,
        ),
    ]
    return terms + _head_gather(model, job, part, phase, count)


def _chunk_bytes(vocabulary: int, tokens: int, top_k: int) -> float:
    options = Options()
    chunk = min(tokens, options.tokens(vocabulary))
    block = min(vocabulary, options.vocab_chunk)
    stretch = max(1, options.logit_buffer // (chunk * block)) * block
    held = chunk * min(vocabulary, stretch)
    contenders = chunk * min(32 * top_k, vocabulary)
    return WIDE * (held + CHUNK_COPIES * chunk * block) + contenders * (WIDE + 3 * 8.0)


def _head_gather(
    model: Architecture, job: Job, part: str, phase: str, count: float, name: str = "head gathered"
) -> list[Term]:
    """The head where a device holds a part of it: V·d as the engine gathers it."""
    if job.alone or job.sharding in ("ddp", "zero2"):
        return []
    # FSDP2: the optimizer's own float32. ZeRO-3: as the model runs, and a copy while it is cloned.
    size = (WIDE if job.precision != "bf16" else 2) if job.sharding == "fsdp2" else job.pass_bytes
    copies = 1 if job.sharding == "fsdp2" else 2
    return [
        Term(
            part,
            name,
            f"{copies}·{size}·V·d",
            linked=count * size * model.head * (job.gpus - 1) / job.gpus,
            memory=1.0 * copies * size * model.head,
            phase=phase,
        )
    ]


def _together(model: Architecture, job: Job) -> list[Term]:
    """The one step of all accepted tokens: its shifts, and its gradient for the moments.

    As at a step that is logged; at the others there are no shifts to work out.
    """
    v, d, n, k, count = model.vocabulary, model.width, job.tokens, job.top_k, job.micro_batches
    phase = "selection: all accepted tokens"
    small = v <= SMALL_VOCABULARY
    # Rows that n tokens use if each took its K at random: what they share makes it fewer.
    used = v if small else v * -math.expm1(n * math.log1p(-k / v)) if k < v else v
    again = Term(
        "selection",
        "head pass for the step of all accepted tokens",
        "A·2·n·V·d flops",
        wide_flops=2.0 * count * n * v * d,
        moved=1.0 * count * LOGIT * n * v,
        memory=1.0 * n * d * WIDE,
        phase=phase,
    )
    if small:
        products = Term(
            "selection",
            "its gradient and its step, block by block",
            "A·4·n·V·d flops; blocks of logits",
            wide_flops=4.0 * count * n * v * d,
            memory=6.0 * WIDE * n * min(v, Options().vocab_chunk),
            phase=phase,
        )
    else:
        products = Term(
            "selection",
            "its gradient and its step on the judged rows",
            "A·(4·n·K·d flops, 12·n·K·d bytes); n·K row numbers",
            wide_flops=4.0 * count * n * k * d,
            moved=1.0 * count * 12 * n * k * d,
            memory=n * k * 60.0,
            phase=phase,
        )
    # One process knows the rows and probabilities of a large vocabulary from judging the tokens.
    terms = [products] if job.alone and not small else [again, products]
    if job.alone:
        rows = min(used, Options().vocab_chunk) if small else used
        terms.append(
            Term(
                "selection",
                "rows of the head that some token uses: gradient, step, moments",
                "5·4·U·d, U = V·(1 − (1 − K/V)^n)",
                moved=60.0 * count * used * d,
                memory=5.0 * WIDE * rows * d,
                phase=phase,
            )
        )
        if job.moments == "simulated" and not small:
            add = "selection: gradient into the moments"
            terms.append(
                Term(
                    "selection",
                    "gradient of the accepted tokens",
                    "A·(2·n·K·d flops, 20·n·K·d bytes); 4·U·d and n·K row numbers",
                    wide_flops=2.0 * count * n * k * d,
                    moved=20.0 * count * n * k * d,
                    memory=1.0 * WIDE * used * d + n * k * 28.0,
                    phase=add,
                )
            )
        return terms
    # Several processes: one gradient of the head, summed over all of them, and the step of all of it;
    # then each process judges its own tokens by that step, beside which gradient and sum still are.
    copies = 4 + (job.pass_bytes != WIDE)
    judged = f"{phase}, by their step"
    terms += [
        Term(
            "selection",
            "gradient of the head, summed over the devices, and its step",
            f"{copies}·4·V·d; sends 2·4·V·d for each micro-batch",
            moved=80.0 * count * model.head,
            linked=2.0 * WIDE * count * model.head * (job.gpus - 1) / job.gpus,
            memory=1.0 * copies * WIDE * model.head,
            phase=phase,
        ),
        Term(
            "selection",
            "gradient, sum and step while tokens are judged by it",
            "3·4·V·d; a chunk's logits; rows n·K",
            memory=3.0 * WIDE * model.head + _chunk_bytes(v, n, k) + 2.0 * n * k * 12,
            phase=judged,
        ),
        *_head_gather(model, job, "selection", phase, 0.0, "head gathered, still"),
        *_head_gather(model, job, "selection", judged, 0.0, "head gathered, still"),
    ]
    return terms


# Trust region


def trust_region_terms(model: Architecture, job: Job) -> list[Term]:
    """Terms of foreseeing, shortening and measuring a step."""
    m = reference_tokens(model, job)
    part, times = "trust region", passes(job)
    trials = times if job.exact_hidden else times / 2
    sequences = job.trial_sequences
    terms = [
        Term(
            part,
            "hidden states of the completions it is tried on",
            "bytes·S·T·d",
            memory=1.0 * job.pass_bytes * sequences * job.length * model.width,
            phase=HELD,
        ),
        *_reference(model, job, part),
        *forward_terms(model, job, part, sequences, times, "forward passes of the policy"),
        Term(
            part,
            "logits after the trial, and the divergence",
            f"4·M·V·d flops, {MEASURED}·M·V bytes; {TRIAL_COPIES}·4·M·V",
            wide_flops=trials * 4.0 * m * model.head,
            moved=trials * MEASURED * m * model.vocabulary,
            memory=1.0 * TRIAL_COPIES * WIDE * m * model.vocabulary,
            phase="trust region: divergence",
        ),
        *_head_step(model, job, part, trials),
        *_moved_parameters(model, job, part, trials),
    ]
    for phase in ("reference", "trial", "logits", "divergence"):
        count = 1.0 if phase == "reference" else 0.0
        terms += _head_gather(model, job, part, f"trust region: {phase}", count)
    return terms


def _reference(model: Architecture, job: Job, part: str) -> list[Term]:
    """Log-probabilities before the step; kept over `iterations` steps in float32."""
    m = reference_tokens(model, job)
    kept = part == "trust region" and job.exact_hidden and job.iterations > 1
    computed = 1.0 if job.exact_hidden else 2.0
    seen = (job.iterations - 1) / job.iterations if kept else 0.0
    entries = m * model.vocabulary
    return [
        Term(
            part,
            "reference log-probabilities",
            f"2·M·V·d flops, {REFERENCE}·M·V bytes; {REFERENCE_COPIES}·4·M·V",
            wide_flops=(computed + seen) * 2.0 * m * model.head,
            moved=computed * REFERENCE * entries + seen * MEASURED * entries,
            memory=1.0 * REFERENCE_COPIES * WIDE * entries,
            phase=f"{part}: reference",
        ),
        Term(
            part,
            "reference held" + (" until its completions are done with" if kept else ""),
            "4·M·(V + d)",
            memory=1.0 * WIDE * m * (model.vocabulary + model.width),
            phase=HELD if kept else f"{part}: trial",
        ),
    ]


def _moved_parameters(model: Architecture, job: Job, part: str, trials: float) -> list[Term]:
    """One module's parameters after a part of the step, at a time; computed on shards, gathered."""
    own = job.shard(model.parameters, of="optimizer") if not job.alone else model.parameters
    sharded = not job.alone and job.sharding != "ddp"
    module, parameter = model.largest_module, model.largest_parameter
    working = 16 if job.weight_bytes == 2 and not sharded else 8
    memory = float(module * job.weight_bytes + parameter * working)
    formula = f"{job.weight_bytes}·P_module + {working}·P_parameter"
    linked = 0.0
    if sharded:
        local = parameter / job.gpus * 3 * WIDE
        memory = module * job.pass_bytes + local + parameter * job.pass_bytes
        formula = f"{job.pass_bytes}·(P_module + P_parameter) + 12·P_parameter/N"
        factor = 2 if job.sharding == "zero2" else 1
        linked = factor * job.pass_bytes * model.backbone * (job.gpus - 1) / job.gpus
    return [
        Term(
            part,
            "the step, one module's parameters at a time",
            f"{STEP} bytes a parameter held; {formula}",
            moved=trials * STEP * own,
            linked=trials * linked,
            memory=memory,
            phase=f"{part}: trial",
        )
    ]


def _head_step(model: Architecture, job: Job, part: str, trials: float) -> list[Term]:
    """The head's step, whole, in float32; the head itself in float32 where it is held in bf16."""
    sharded = not job.alone and job.sharding != "ddp"
    # On shards the working copies are a device's part: what is left is the gathered step.
    copies = (1 if sharded else 2) + (job.weight_bytes != WIDE)
    entries = reference_tokens(model, job) * model.vocabulary
    return [
        Term(
            part,
            "step of the head, and the logits after it",
            f"{copies}·4·V·d + 4·4·M·V" + ("; gathered" if sharded else ""),
            linked=trials * WIDE * model.head * (job.gpus - 1) / job.gpus if sharded else 0.0,
            memory=1.0 * WIDE * (copies * model.head + 4 * entries),
            phase=f"{part}: logits",
        )
    ]


# Monitor


def monitor_terms(model: Architecture, job: Job) -> list[Term]:
    """Terms of a `CurvatureMonitor` that looks at every step (`every=1`), the head being trained."""
    m, part = reference_tokens(model, job), "monitor"
    entries = m * model.vocabulary
    extra = 1.0 if job.exact_hidden else 2.0
    return [
        *_judging(model, job, part),
        *_reference(model, job, part),
        Term(
            part,
            "prediction by the head's step, and gradient noise",
            "8·M·V·d flops; 5·4·M·V and the head's step 2·4·V·d",
            wide_flops=8.0 * m * model.head,
            moved=1.0 * MEASURED * entries + STEP * model.head,
            memory=5.0 * WIDE * entries + 2.0 * WIDE * model.head,
            phase="monitor: prediction",
        ),
        *forward_terms(
            model, job, part, job.trial_sequences, extra, "forward passes of the policy"
        ),
        Term(
            part,
            "logits after the step, and the divergence",
            f"2·M·V·d flops, {MEASURED}·M·V bytes; {TRIAL_COPIES - 1}·4·M·V",
            wide_flops=2.0 * m * model.head,
            moved=1.0 * MEASURED * entries,
            memory=(TRIAL_COPIES - 1.0) * WIDE * entries,
            phase="monitor: divergence",
        ),
    ]
