"""GRPO with CAPO's trust region in TRL, on one device or many: the script that the launchers here start.

    accelerate launch --config_file examples/trl/fsdp2.yaml examples/trl/train.py \
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/DeepMath-103K

Every option of `CAPOConfig` is one of the command line.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl.rewards import accuracy_reward

from capo.integrations.trl import CAPOConfig, CAPOTrainer


@dataclass
class Script:
    model_name_or_path: str = field(metadata={"help": "A model, by name or directory."})
    dataset_name: str = field(
        metadata={"help": "A data set with `prompt` and `solution`, or a JSON-lines file of them."}
    )


def accuracy(completions: list, solution: list[str], **others) -> list[float | None]:
    """TRL's own reward, for conversations and for plain text."""
    told = [
        c if isinstance(c, list) else [{"role": "assistant", "content": c}] for c in completions
    ]
    return accuracy_reward(told, solution, **others)


def main() -> None:
    script, args = HfArgumentParser((Script, CAPOConfig)).parse_args_into_dataclasses()
    if script.dataset_name.endswith((".json", ".jsonl")):
        data = load_dataset("json", data_files=script.dataset_name, split="train")
    else:
        data = load_dataset(script.dataset_name, split="train")
    trainer = CAPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32"),
        reward_funcs=accuracy,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.end_training()  # the processes take leave of each other


if __name__ == "__main__":
    main()
