"""The policy's last layer as the trainer sees it: the LM head and what enters it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from capo.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# How model families name the factor on their logits, first match wins. The families that divide
# (Granite, MiniCPM3) call theirs `logits_scaling`, which HyperCLOVA X uses for a multiplier.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True)
class LMHead:
    """A language-model head ``z = φ(W h + b) / T`` and how to read its logits.

    Attributes:
        parameter: W, as the model owns it (the optimizer's state is keyed by this object).
        bias: b, ``[V]``, or None.
        logit_scale: factor on ``W h + b`` before the soft-cap.
        logit_softcap: c of ``φ(y) = c·tanh(y / c)``, or None.
        temperature: T, the sampling temperature that the trainer divides by.
        gathered: W's value where `parameter` holds only a part of it.
    """

    parameter: nn.Parameter
    bias: Float[Tensor, " V"] | None
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    gathered: Float[Tensor, "V d"] | None = None

    @property
    def weight(self) -> Float[Tensor, "V d"]:
        """W without its graph."""
        return self.parameter.detach() if self.gathered is None else self.gathered

    @property
    def vocabulary(self) -> int:
        """V, also where W is sharded away."""
        return int(getattr(self.parameter, "ds_shape", self.parameter.shape)[0])

    @property
    def logit_options(self) -> dict[str, Any]:
        """The keyword arguments by which the core describes this head's logits."""
        return {
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "head_bias": None if self.bias is None else self.bias.detach(),
        }


def causal_lm(model: nn.Module) -> Any:
    """The transformers causal LM inside `model`, which may be wrapped by PEFT."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def drops_out(model: nn.Module) -> bool:
    """Whether a training pass of the model is drawn at random: dropout of any kind in any module."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        # Attention that is handed its rate, as transformers' is.
        rates = (v for name, v in vars(module).items() if "dropout" in name or "pdrop" in name)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


def read_head(model: nn.Module, temperature: float) -> LMHead:
    """Read the LM head of an unwrapped policy.

    Args:
        model: causal LM, or a PEFT model around one.
        temperature: the trainer's sampling temperature.

    Raises:
        InputError: the head has no two-dimensional weight, as when it is not a linear layer.
    """
    policy = causal_lm(model)
    head = policy.get_output_embeddings()
    weight = getattr(head, "weight", None)
    shape: Any = getattr(weight, "ds_shape", getattr(weight, "shape", None))  # ZeRO-3: the whole's
    if not isinstance(weight, nn.Parameter) or len(shape) != 2 or shape.numel() == 0:
        raise InputError(
            "model",
            f"the LM head of {type(policy).__name__} has no [vocabulary, hidden] weight to read; "
            "CAPO needs a linear head.",
        )
    scale, softcap = _logit_transform(policy.config.get_text_config())
    return LMHead(weight, getattr(head, "bias", None), scale, softcap, temperature)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """The logit scale and the soft-cap in a text model's configuration.

    The order of precedence is that of TRL's `add_fused_lm_head`: what it trains is what is judged.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in _MULTIPLIERS:
        if (scale := getattr(config, name, None)) is not None:
            return float(scale), softcap
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        return float(scaling if config.model_type == "hyperclovax" else 1 / scaling), softcap
    return 1.0, softcap


@contextmanager
def capture_hidden(
    model: nn.Module, *, detached: bool = True
) -> Iterator[list[Float[Tensor, "B L d"]]]:
    """Collect the backbone's last hidden states of every forward in the block.

    `detached` takes derivatives off them, of forward mode too.

    The hook is on the backbone and not on the head because TRL fuses the head into the
    log-probability: `lm_head.forward` is never called in training. It is set for the block only, so
    that generation and reference passes pay nothing, and looked up anew each time, since wrappers
    may replace the backbone.
    """
    passes: list[Float[Tensor, "B L d"]] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        passes.append(hidden.detach() if detached else hidden)

    handle = causal_lm(model).base_model.register_forward_hook(keep)
    try:
        yield passes
    finally:
        handle.remove()


def predicting_positions(
    hidden: Float[Tensor, "B L d"], completion_length: int
) -> Float[Tensor, "B T d"]:
    """The hidden states that predict the last `completion_length` tokens.

    Position l predicts token l + 1, so these end one before the last position. (Slicing at the
    completion's own positions pairs every probability with its neighbour's hidden state.)
    """
    end = hidden.size(1) - 1
    return hidden[:, end - completion_length : end]
