"""CAPO in an existing TRL script: two names change. Runs offline in a minute.

python examples/trl_minimal.py
"""

from __future__ import annotations

from datasets import Dataset

from capo.integrations.trl import CAPOConfig, CAPOTrainer  # was: from trl import GRPOConfig, ...
from capo.policies import load_policy
from capo.tasks import Problem, load_task


def main(max_steps: int = 80, output_dir: str = "runs/trl-minimal") -> CAPOTrainer:
    policy, task = load_policy("embedded:sums"), load_task("sums")
    problems = task.train_problems(3 * max_steps, seed=0)

    def accuracy(prompts: list[str], completions: list[str], answer: list[str], **_) -> list[float]:
        columns = zip(prompts, completions, answer, strict=True)
        return [task.grade(text, Problem(prompt, right, "")) for prompt, text, right in columns]

    trainer = CAPOTrainer(
        model=policy.model,
        reward_funcs=accuracy,
        args=CAPOConfig(
            # Each step is kept within a policy shift; the learning rate is only an upper bound.
            output_dir=output_dir,
            per_device_train_batch_size=24,
            num_generations=8,
            max_completion_length=task.max_completion_tokens,
            max_steps=max_steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": p.prompt, "answer": p.answer} for p in problems]
        ),
        processing_class=policy.tokenizer,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
