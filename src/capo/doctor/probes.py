"""What is tried, each in a worker process: returns what was found, and raises what is wrong.

Nothing is imported here before it is asked for: each probe says for itself what cannot be imported.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo.doctor.finding import Absent

if TYPE_CHECKING:
    import torch

    from capo.core.curvature import TokenCurvature

# Of a small problem, float32 against float64. TF32 products on a GPU are off by 1e-3.
TOLERANCE = 2e-3


def device() -> str:
    """Where training would run."""
    import torch

    threads = f"{torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = "this torch is a CPU build" if torch.version.cuda is None else "torch sees none"
        return f"CPU, {threads}; no CUDA device ({built})"
    names = []
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        probe = torch.ones(64, 64, device=f"cuda:{index}")
        if float((probe @ probe).sum()) != 64.0**3:
            raise RuntimeError(f"cuda:{index} multiplies wrongly")
        names.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return f"{', '.join(names)}; CUDA {torch.version.cuda}; CPU, {threads}"


def package(distribution: str, module: str, use: str = "") -> str:
    """Import it."""
    from importlib.metadata import version

    importlib.import_module(module)
    return version(distribution) + use


def backend(impl: str) -> str:
    """The statistics of a tiny problem, eager or chunked, without the compiler."""
    from capo.core.statistics import options

    with options(compile=False):
        return _against_float64(impl)


def compiled() -> str:
    """The loops that `torch.compile` fuses: compiled here, and really run."""
    import torch

    from capo.core.statistics import fused, options

    on_gpu = torch.cuda.is_available()
    compiler = os.environ.get("CXX") or "g++"
    if not on_gpu and shutil.which(compiler) is None:
        raise Absent(f"no C++ compiler ({compiler} is not found)")
    began = time.monotonic()
    with options(compile=True):
        error = _against_float64("chunked")
    if fused._broken:
        raise RuntimeError(f"torch.compile failed: {fused._broken[0].splitlines()[0]}")
    if fused.definition not in fused._ready:
        raise RuntimeError("the loop was not compiled")
    said = _first_line(compiler, "--version") if not on_gpu else "on the GPU"
    return f"{error}; {said}; compiled in {time.monotonic() - began:.0f} s"


def triton() -> str:
    """The Triton kernels: on the GPU, else in Triton's interpreter, which proves only the code."""
    import torch

    if torch.cuda.is_available():
        return _against_float64("triton")
    os.environ["TRITON_INTERPRET"] = "1"
    from capo.core.statistics.triton_launch import tiling

    with tiling(tokens=16, rows=16, width=16, warps=1, stages=1):
        error = _against_float64("triton")
    return f"{error}, in the interpreter: without a CUDA device 'auto' takes chunked"


def trl_step() -> str:
    """One real step of the embedded policy under `CAPOTrainer`, with a `CurvatureMonitor` on it."""
    from datasets import Dataset

    from capo import CurvatureMonitor
    from capo.integrations.trl import CAPOConfig, CAPOTrainer
    from capo.lab.run import quiet_libraries
    from capo.policies import load_policy

    quiet_libraries()
    policy = load_policy("embedded:sums")
    with tempfile.TemporaryDirectory() as folder:
        arguments = CAPOConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=24,
            max_steps=1,
            selection="capo",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = CAPOTrainer(
            model=policy.model,
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "17+25+30?"}, {"prompt": "1+2+3?"}]),
            processing_class=policy.tokenizer,
        )
        CurvatureMonitor(trainer)
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
    row = trainer.state.log_history[0]
    shift = row["capo/monitor/measured_policy_shift"]
    where = trainer.model.device.type
    return f"CAPOTrainer and CurvatureMonitor: one step on {where} in {seconds:.1f} s, KL {shift:.1e} nats"


def deepspeed() -> str:
    """What CAPO reads of ZeRO's optimizers."""
    import deepspeed as library
    from deepspeed.utils import safe_get_full_optimizer_state

    from capo.integrations import _trl_zero

    assert callable(safe_get_full_optimizer_state)
    return f"ZeRO-1 to 3 of {library.__version__} ({_trl_zero.__name__.rpartition('.')[2]} loads)"


def verl_plugin(vendor: str) -> str:
    """Whether verl takes CAPO's engine, found by its entry point alone.

    Args:
        vendor: what ``VERL_ENGINE_VENDOR`` is outside of this process.
    """
    import verl
    from verl.workers.engine.base import EngineRegistry

    found = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    if found.__name__ != "CAPOEngine":
        # verl tells at DEBUG only why a plug-in was not loaded: load it once more, so that it says why.
        importlib.import_module("capo.integrations.verl")
        policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS")
        raise RuntimeError(
            f"verl takes {found.__name__}: it loaded no plug-in (VERL_USE_EXTERNAL_PLUGINS={policy})"
        )
    unset = "" if vendor == "capo" else ", which is not set in this shell"
    return f"{verl.__version__} takes CAPOEngine where VERL_ENGINE_VENDOR=capo{unset}"


def processes() -> str:
    """What torch.distributed can speak."""
    import torch.distributed as dist

    if not dist.is_available():
        raise Absent("this torch has no torch.distributed")
    there = [
        name
        for name, has in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if has
    ]
    return f"torch.distributed with {' and '.join(there) or 'no backend'}"


def policy() -> str:
    """Load the shipped policy and ask it something."""
    import torch

    from capo.lab.run import quiet_libraries
    from capo.policies import load_policy

    quiet_libraries()
    loaded = load_policy("embedded:sums")
    prompt = "17+25+30?"
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded.model(ids).logits
        answer = loaded.model.generate(ids, do_sample=False, max_new_tokens=24)
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("its logits are not finite")
    text = loaded.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    count = sum(p.numel() for p in loaded.model.parameters())
    return f"{count / 1e6:.2f} M parameters, answers {prompt!r} with {text!r}"


def figure() -> str:
    """Draw one, as the reports do."""
    import altair as alt
    import pandas as pd
    import vl_convert

    from capo.lab.report.page import VEGA_LITE

    table = pd.DataFrame({"x": [1, 2], "y": [1.0, 2.0]})
    chart = alt.Chart(table).mark_line().encode(x="x", y="y").to_dict()
    svg = vl_convert.vegalite_to_svg(chart, vl_version=VEGA_LITE)
    png = vl_convert.svg_to_png(svg)
    if not (svg.startswith("<svg") and png.startswith(b"\x89PNG")):
        raise RuntimeError("what was drawn is no picture")
    return f"SVG and PNG, Vega-Lite {VEGA_LITE}"


def grading() -> str:
    """Grade a right and a wrong answer."""
    from capo.tasks.math_grading import grade_math

    right, wrong = grade_math("\\boxed{\\frac{1}{2}}", "0.5"), grade_math("\\boxed{2}", "0.5")
    if (right, wrong) != (1.0, 0.0):
        raise RuntimeError(f"1/2 for 0.5 earns {right}, 2 earns {wrong}")
    return "math-verify tells 1/2 from 2"


def _against_float64(impl: str) -> str:
    """Both shifts under exact Adam, float32, against the plain form in float64."""
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    error = 0.0
    for top_k in (None, 8):
        wanted = _tiny(torch.float64, "cpu", "eager", top_k)
        got = _tiny(torch.float32, where, impl, top_k)
        for name in ("policy_shift", "objective_shift", "log_prob", "entropy"):
            right, found = getattr(wanted, name), getattr(got, name).cpu().double()
            scale = float(right.abs().max())
            error = max(error, float((found - right).abs().max()) / scale)
    if not error <= TOLERANCE:
        raise RuntimeError(f"relative error {error:.1e} against float64, more than {TOLERANCE:g}")
    return f"relative error {error:.0e} against float64 on {where}"


def _tiny(dtype: torch.dtype, where: str, impl: str, top_k: int | None) -> TokenCurvature:
    import torch

    from capo.core.curvature import token_curvature
    from capo.core.steps import AdamStep

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, rows, width = 6, 40, 24
    hidden, head, advantages = draw(tokens, width), draw(rows, width) / 5, draw(tokens)
    step = AdamStep(
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        exp_avg=(draw(rows, width) / 50).to(where, dtype),
        exp_avg_sq=(draw(rows, width).square() / 50).to(where, dtype),
        step=3,
    )
    ids = torch.randint(rows, (tokens,), generator=generator)
    return token_curvature(
        hidden.to(where, dtype),
        head.to(where, dtype),
        ids.to(where),
        advantages.to(where, dtype),
        step=step,
        top_k=top_k,
        impl=impl,
    )


def _first_line(program: str, *arguments: str) -> str:
    said = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return Path(program).name + " " + said.stdout.splitlines()[0].split()[-1]
