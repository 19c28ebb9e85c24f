"""TRL's own tests of `GRPOTrainer`, with `CAPOTrainer` in its place.

    python tools/trl_tests.py PATH/TO/trl/tests/test_grpo_trainer.py [--output DIR] [--table FILE]

PATH is in a checkout of TRL at the installed version, or near it; TRL does not ship its tests. The file is
copied with its neighbours to DIR, where the names of models and data sets on the hub become paths of local
ones with random weights, and checks for packages that the installed TRL does not know are done without it.
It runs three times:

- `stock`: as it is. What fails here needs something that is not here, and says nothing about CAPO.
- `off`: `CAPOTrainer`, with TRL's own `GRPOConfig`.
- `on`: `CAPOTrainer` that judges every token, rejects none, and puts every step through the trust region (at
  the tests' learning rate of 0.1 the paper's thresholds would reject everything).

Prints what passed, and what was left out and why; FILE gets the same as a table in Markdown. The tests of
tools want `jmespath` besides (`pip install jmespath`). The exit status is 1 if a test that passes with
`stock` fails with `off`. Tests of `on` that fail are listed: some hold TRL to a step of its full length.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HUB = "trl-internal-testing/"
SPECIAL = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
# Some tests write completions down as ids of Qwen's vocabulary, and say in a comment what they stand for.
# Below are those of more than one byte; single bytes come first, in Qwen's order. The ids are replaced by
# those of the local vocabulary, which has nothing else.
BYTES = 256
PIECES = {
    **{293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "de", 497: '",', 522: "</"},
    **{606: "name", 788: '":', 894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know"},
    **{1513: " don", 2765: " won", 4913: '{"', 5212: ' {"', 5392: " tool", 6023: "hi"},
    **{6659: "call", 7692: "async", 9520: "step", 11248: "}}\n", 13477: "crement", 14172: "tool"},
    **{16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool", 35744: "increment"},
    **{64648: "multiply", 93054: "_multiply", 95642: '"}}\n'},
    **{151657: "<tool_call>", 151658: "</tool_call>"},
}
SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Name on the hub → family of transformers, what it has besides SMALL, and its chat template in TRL.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}, "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2", {"num_labels": 1}, "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("Qwen3", {"head_dim": 4}, "qwen3"),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3", {"head_dim": 4, "num_labels": 1}, "qwen3"),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", {"head_dim": 4, **EXPERTS}, "qwen3"),
    "tiny-LlamaForCausalLM-3.2": ("Llama", {}, "llama3_2"),
    "tiny-LlamaForSequenceClassification-3.2": ("Llama", {"num_labels": 1}, "llama3_2"),
    "tiny-MistralForCausalLM-0.2": ("Mistral", {}, "qwen2_5"),
    "tiny-Gemma2ForCausalLM": ("Gemma2", {"head_dim": 4}, "gemma"),
    "tiny-Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 0.125}, "cohere2"),
    "tiny-GptOssForCausalLM": (
        "GptOss",
        {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gptoss",
    ),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4Moe",
        {
            "head_dim": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        "glm4moe",
    ),
}
TRAINERS = {
    "stock": "from trl import GRPOConfig, GRPOTrainer",
    "off": "from trl import GRPOConfig\nfrom capo.integrations.trl import CAPOTrainer as GRPOTrainer",
    "on": "from capo_on import GRPOConfig\nfrom capo.integrations.trl import CAPOTrainer as GRPOTrainer",
}
# One test knows the order of the first twelve.
ZEN = """
Beautiful is better than
Explicit is
Simple is better
Complex
Flat is better than
Sparse is better
Readability
Special cases aren't special
Although practicality beats
Errors should never
Unless explicitly
In the face of ambiguity, refuse
There should be one
Although that way may not
Now is better
Although never is often
If the implementation is hard
If the implementation is easy
Namespaces are
"""
ON = '''"""GRPOConfig as TRL has it, and CAPO's selection and trust region."""

from dataclasses import dataclass, field

import trl
from capo.integrations.trl import CAPOConfig


@dataclass
class GRPOConfig(CAPOConfig):
    selection: object = field(
        default_factory=lambda: {"policy_shift": None, "objective_shift": [None, None]}
    )
    trust_region: object = "auto"
    num_iterations: int = trl.GRPOConfig.num_iterations
    learning_rate: float = trl.GRPOConfig.learning_rate
'''


def tokenizer(template: str) -> Any:
    """A byte-level tokenizer with one of TRL's chat templates, and the pieces that tests want."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [split.pre_tokenize_str(piece)[0][0] for piece in PIECES.values()]
    words = [*sorted(split.alphabet()), *pieces, *SPECIAL.values()]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "chat_templates" / f"{template}.jinja"
    made.chat_template = path.read_text()
    return made


def write_models(folder: Path) -> None:
    """Every model of `MODELS`, with random weights."""
    import torch
    import transformers

    for name, (family, extra, template) in MODELS.items():
        torch.manual_seed(0)
        words = tokenizer(template)
        config = getattr(transformers, f"{family}Config")(
            **SMALL,
            **extra,
            vocab_size=len(words),
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=words.bos_token_id,
        )
        kind = "SequenceClassification" if "SequenceClassification" in name else "CausalLM"
        auto = getattr(transformers, f"AutoModelFor{kind}")
        auto.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def write_data(folder: Path) -> None:
    """`zen`: lines as prompts, standard and conversational, of the same schema and size."""
    lines = [line for line in ZEN.splitlines() if line]
    rows = {
        "standard_prompt_only": [{"prompt": line} for line in lines],
        "conversational_prompt_only": [
            {"prompt": [{"role": "user", "content": line}]} for line in lines
        ],
    }
    folder.mkdir(parents=True)
    header = ["---", "configs:"]
    for name, prompts in rows.items():
        for split, part in (("train", prompts[:17]), ("test", prompts[17:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}-{split}.jsonl").write_text(text)
        header += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "test"):
            header += [f"  - split: {split}", f"    path: {name}-{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))


def adapted(text: str) -> str:
    """A module of TRL's tests, without those checks for packages that the installed TRL does not have."""
    checks = import_module("trl.import_utils")
    block = re.search(r"from trl\.import_utils import (?:\(([^)]*)\)|(.*))\n", text)
    if block is None:
        return text
    names = [name.strip() for name in (block[1] or block[2]).split(",") if name.strip()]
    known = [name for name in names if hasattr(checks, name)]
    lines = [f"from trl.import_utils import {name}" for name in known]
    for name in sorted({*names} - {*known}):
        package = name.removeprefix("is_").removesuffix("_available")
        lines += [
            f"def {name}():",
            "    from importlib.util import find_spec",
            f"    return find_spec({package!r}) is not None",
        ]
    return text.replace(block[0], "\n".join([*lines, ""]))


def with_local_ids(text: str) -> str:
    """TRL's tests with the ids of a published vocabulary replaced by those of the local one.

    A tool's answer has more tokens in bytes: where a completion may have 128, it may have 1024.
    """
    text = text.replace("max_completion_length=128,", "max_completion_length=1024,")
    local = {i: BYTES + place for place, i in enumerate([*PIECES, *SPECIAL])}

    def replaced(found: re.Match[str]) -> str:
        ids = [int(number) for number in re.findall(r"\d+", found[0])]
        if not {*ids} & {*SPECIAL} or not all(i < BYTES or i in local for i in ids):
            return found[0]
        return str([local.get(i, i) for i in ids])

    return re.sub(r"\[\d+(?:, \d+)+\]", replaced, text)


def prepare(source: Path, output: Path) -> dict[str, Path]:
    """The three copies of the tests, by name; models and data beside them."""
    shutil.rmtree(output, ignore_errors=True)
    hub = output / "hub"
    write_models(hub)
    write_data(hub / "zen")
    (output / "capo_on.py").write_text(ON)
    text = with_local_ids(adapted(source.read_text()))
    if TRAINERS["stock"] not in text:
        raise SystemExit(f"{source} has no line {TRAINERS['stock']!r}; is it TRL's?")
    for name in [*MODELS, "zen"]:
        text = text.replace(f'"{HUB}{name}"', f'"{hub.resolve() / name}"')
    tests = {}
    for mode, imports in TRAINERS.items():
        folder = output / mode / "tests"
        folder.mkdir(parents=True)
        for neighbour in ("__init__.py", "conftest.py", "testing_utils.py"):
            (folder / neighbour).write_text(adapted((source.parent / neighbour).read_text()))
        tests[mode] = folder / source.name
        tests[mode].write_text(text.replace(TRAINERS["stock"], imports))
    return tests


def run(tests: Path, output: Path, pytest_arguments: list[str]) -> dict[str, tuple[str, str]]:
    """Outcome and reason of every test."""
    report = output / f"{tests.parent.parent.name}.xml"
    paths = [str(output), *sys.path, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(output / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, f"--junit-xml={report}", *pytest_arguments, str(tests)],
        cwd=tests.parent.parent,
        env=environment,
        check=False,
    )
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        name = re.sub(rf"{re.escape(str(output.resolve()))}/hub/", "", name)
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = (child.get("message") or "").strip().splitlines()[0][:160]
        found[name] = (outcome, reason)
    return found


def report(outcomes: dict[str, dict[str, tuple[str, str]]]) -> int:
    """Print what came of it; how many tests pass with stock and fail with `off`."""
    stock = outcomes["stock"]
    runnable = [name for name, (outcome, _) in stock.items() if outcome == "passed"]
    print(f"\nTRL {version('trl')}: {len(stock)} tests, {len(runnable)} run here with GRPOTrainer")
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, (outcome, reason) in stock.items():
        if outcome != "passed":
            reasons[f"{outcome}: {reason}"].append(name)
    print("left out:")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):4d}  {reason}")
        print("        " + ", ".join(name.partition("::")[2] for name in names[:8]))
    broken = {}
    for mode in ("off", "on"):
        lost = [name for name in runnable if outcomes[mode].get(name, ("", ""))[0] != "passed"]
        broken[mode] = len(lost)
        print(f"CAPOTrainer, {mode}: {len(runnable) - len(lost)} of {len(runnable)} pass")
        for name in lost:
            print(f"  {name}: {outcomes[mode].get(name, ('not run', ''))[1]}")
    return broken["off"]


def table(outcomes: dict[str, dict[str, tuple[str, str]]]) -> str:
    """Every test and what came of it, in Markdown."""
    modes = list(outcomes)
    counts = []
    for outcome in ("passed", "failed", "skipped"):
        numbers = [sum(o == outcome for o, _ in outcomes[mode].values()) for mode in modes]
        counts.append(f"| {outcome} | " + " | ".join(map(str, numbers)) + " |")
    head = "|" + " | ".join(["", *modes]) + " |\n|---|" + "---|" * len(modes)
    rows = []
    for name, (_, reason) in outcomes[modes[0]].items():
        found = [outcomes[mode].get(name, ("not run", "")) for mode in modes]
        why = next((r for o, r in found if o != "passed" and r), reason)
        test = name.partition("::")[2].replace("|", "\\|")
        said = why.replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{test}` | " + " | ".join(o for o, _ in found) + f" | {said} |")
    columns = (
        "|" + " | ".join(["test", *modes, "why not"]) + " |\n|---|" + "---|" * (len(modes) + 1)
    )
    return "\n".join([head, *counts, "", columns, *rows, ""])


def main() -> int:
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", type=Path, help="TRL's tests/test_grpo_trainer.py")
    parser.add_argument("--output", type=Path, default=Path("runs/trl-tests"))
    parser.add_argument("--table", type=Path, help="where to write the table, in Markdown")
    parser.add_argument("-k", default="", help="as for pytest")
    arguments = parser.parse_args()
    if not arguments.tests.is_file():
        parser.error(f"tests: must be a file, {arguments.tests} is none.")
    copies = prepare(arguments.tests, arguments.output)
    chosen = ["-k", arguments.k] if arguments.k else []
    outcomes = {}
    for mode, path in copies.items():
        outcomes[mode] = run(path, arguments.output, chosen)
        if not any(outcome == "passed" for outcome, _ in outcomes[mode].values()):
            parser.error(f"tests: none passes ({mode}); the file must be of TRL {version('trl')}.")
    if arguments.table is not None:
        arguments.table.write_text(table(outcomes))
    return 1 if report(outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
