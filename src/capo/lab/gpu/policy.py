"""A random-weight Qwen2 on the device, and trainers that see the same completions at every step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch

from capo.lab.gpu.sizes import Policy
from capo.lab.gpu.timing import Clock, device

RESERVED = 3  # token ids of no word: unknown, padding, end


def make_policy(shape: Policy) -> Any:
    """The model, its weights drawn on the device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with device():
        model = Qwen2ForCausalLM._from_config(
            Qwen2Config(**shape.config(), pad_token_id=1, eos_token_id=2, bos_token_id=None),
            dtype=torch.bfloat16,
        )
    return model


def make_tokenizer(vocabulary: int) -> Any:
    """A word for every row of the head."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="w0", pad_token="w1", eos_token="w2"
    )


class Bench:
    """One model and one optimizer, shared by trainers that take turns.

    Args:
        shape: the policy and its batch.
        learning_rate: of every step; small, so that the policy stays what it is.
    """

    def __init__(self, shape: Policy, learning_rate: float = 1e-7) -> None:
        self.shape = shape
        self.learning_rate = learning_rate
        self.model = make_policy(shape)
        self.tokenizer = make_tokenizer(shape.vocabulary)
        self.clock = Clock()
        # As TRL's default optimizer, and with moments in the weights' own dtype.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
        )
        g = torch.Generator().manual_seed(1)
        b, t, p = shape.completions, shape.completion_tokens, shape.prompt_tokens
        prompts = b // shape.generations

        def ids(*size: int) -> list[list[int]]:
            return torch.randint(RESERVED, shape.vocabulary, size, generator=g).tolist()

        self._prompts, self._completions = ids(prompts, p), ids(b, t)
        self._rewards = torch.randn(b, generator=g).tolist()
        self._directory = tempfile.mkdtemp(prefix="capo-gpu-")

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def _rollout(self, prompts: list[str], _trainer: Any) -> dict[str, Any]:
        """The prepared completions, whatever is asked."""
        shape = self.shape
        return {
            "prompt_ids": [self._prompts[i // shape.generations] for i in range(len(prompts))],
            "completion_ids": self._completions,
            "logprobs": None,
        }

    def trainer(self, **settings: Any) -> Any:
        """A `GRPOTrainer` without settings, else a `CAPOTrainer` with them."""
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        from capo.integrations.trl import CAPOConfig, CAPOTrainer

        shape = self.shape
        common: dict[str, Any] = {
            "output_dir": self._directory,
            "per_device_train_batch_size": shape.completions,
            "num_generations": shape.generations,
            "max_completion_length": shape.completion_tokens,
            "num_iterations": 1,
            "max_steps": shape.timed + 1,
            "learning_rate": self.learning_rate,
            "bf16": False,  # the weights are: no autocast
            "use_cpu": not self.clock.cuda,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        count = (shape.timed + 2) * shape.completions
        rows = [{"prompt": f"w{RESERVED + i % 100}"} for i in range(count)]
        trainer = (CAPOTrainer if settings else GRPOTrainer)(
            model=self.model,
            reward_funcs=lambda completions, **_: self._rewards[: len(completions)],
            args=CAPOConfig(**common | settings) if settings else GRPOConfig(**common),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            optimizers=(
                self.optimizer,
                torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0),
            ),
            rollout_func=self._rollout,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


class Turn:
    """Times a trainer's update steps: from the prepared batch to the end of the optimizer's step.

    Completions, rewards and advantages are there when the clock starts: generation is left out.
    """

    def __init__(self, trainer: Any, clock: Clock) -> None:
        from transformers import TrainerCallback

        self.trainer, self.clock = trainer, clock
        self._steps: list[tuple[Any, Any]] = []
        self._parts: dict[str, list[tuple[Any, Any]]] = {}
        self._start: Any = None
        self.trials: list[int] = []  # of the steps of the last turn, the first among them
        prepare = trainer._prepare_inputs

        def prepared(batch: Any) -> Any:
            inputs = prepare(batch)
            if self._start is None:
                clock.wait()
                self._start = clock.mark()
            return inputs

        trainer._prepare_inputs = prepared
        turn = self

        class Stop(TrainerCallback):  # type: ignore[misc]
            """Ends the clock after every other callback."""

            def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
                turn._steps.append((turn._start, clock.mark()))
                turn._start = None

        trainer.add_callback(Stop())
        judge, control = getattr(trainer, "_judge", None), getattr(trainer, "_control", None)
        if judge is not None:
            self._watch(judge, "judge", "judge")
            self._watch(judge, "batch_shifts", "of it the batch-level shift")
            self._watch(judge.step_model, "accumulate", "of it the simulated gradient")
        if control is not None:
            self._watch(control, "before_step", "foreseeing the step")
            self._watch(control, "after_step", "measuring the step")

    def _watch(self, owner: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)
        spans = self._parts.setdefault(name, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock.mark()
            result = inner(*args, **kwargs)
            spans.append((start, self.clock.mark()))
            return result

        setattr(owner, method, timed)

    def take(self) -> dict[str, list[float]]:
        """Train a turn; milliseconds of its steps after the first, and of their parts."""
        self._steps.clear()
        for earlier in self._parts.values():
            earlier.clear()
        ledger = self.trainer._metrics["train"]
        ledger.pop("capo/trust/trials", None)
        self.trainer.train()
        self.trials = [int(n) for n in ledger.get("capo/trust/trials", [])]
        self.clock.wait()
        spans = {"step": self._steps, **self._parts}
        return {
            name: [self.clock.milliseconds(*pair) for pair in pairs[-(len(self._steps) - 1) :]]
            for name, pairs in spans.items()
            if pairs
        }
