"""What stands in for a vLLM server, which has no CPU wheel to install: TRL's own client class, replaced.

All else is TRL's: it streams the weights, asks for completions and corrects for the difference between the
server's probabilities and the policy's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import Qwen2ForCausalLM

from . import trl_kit as kit

SETTINGS: dict[str, Any] = {
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_server_base_url": "http://localhost:1",
}


class Server:
    """A copy of the policy, which samples with probabilities that are a little off.

    Attributes:
        received: the weights of every synchronisation.
        sampled: completions written so far.
    """

    OFF = 0.4  # standard deviation of what the logits are off by

    def __init__(self, base_url: str, group_port: int, connection_timeout: float) -> None:
        del base_url, group_port, connection_timeout
        # The trainer's random numbers are its own; and under ZeRO-3 `from_config` would shard this model.
        with torch.random.fork_rng():
            self.model = Qwen2ForCausalLM(kit.CONFIGS["qwen2"](tie_word_embeddings=False)).eval()
        self.generator = torch.Generator().manual_seed(11)
        self.off = self.OFF * torch.randn(self.model.config.vocab_size, generator=self.generator)
        self.received: list[dict[str, torch.Tensor]] = []
        self.sampled = 0

    def init_communicator(self, device: torch.device) -> None:
        del device

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def reset_prefix_cache(self) -> None:
        pass

    def update_named_params(self, metadata: Any, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        found = {name: value.detach().clone() for name, value in named}
        assert [(n, list(v.shape)) for n, v in found.items()] == [(n, s) for n, _, s in metadata]
        self.model.load_state_dict(found)
        self.received.append(found)

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n: int, temperature: float, max_tokens: int, **_: Any
    ) -> dict[str, Any]:
        completions, log_probs = [], []
        for prompt in prompts:
            for _ in range(n):
                ids, said = list(prompt), []
                while len(said) < max_tokens and ids[-1] != kit._SMALL["eos_token_id"]:
                    logits = self.model(torch.tensor([ids])).logits[0, -1] + self.off
                    scores = torch.log_softmax(logits / temperature, -1)
                    token = int(torch.multinomial(scores.exp(), 1, generator=self.generator))
                    ids.append(token)
                    said.append([float(scores[token])])
                completions.append(ids[len(prompt) :])
                log_probs.append(said)
        self.sampled += len(completions)
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": log_probs}


@contextmanager
def served() -> Iterator[None]:
    """TRL finds vLLM, and its client is a :class:`Server`."""
    module = "trl.generation.vllm_generation"
    with patch(f"{module}.is_vllm_available", lambda: True), patch(f"{module}.VLLMClient", Server):
        yield
