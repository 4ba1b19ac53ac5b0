"""The peer of `onpolicy`: TRL's GKDTrainer with lmbda 1 on given prompts; prints one JSON line.

Runs in an environment of its own:
    python3 -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 && trl-venv/bin/pip install
    trl==1.16.0
    trl-venv/bin/python trl_gkd_onpolicy.py --teacher DIR --student DIR --prompts prompts.npy
    --steps 3 --batch-size 8

`prompts.npy` is (prompts, length) int64. Everything is GKDConfig's default but what a CPU asks for:
gradient checkpointing is on, and generation therefore without a key-value cache, unless
`--no-gradient-checkpointing` is given. Tokens are those that the loss counts. The first step is
left out. `--greedy N` prints the student's greedy continuation of N prompts instead.
"""

import argparse
import json
import resource
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl_gkd import word_tokenizer


def collate(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Prompts of one length; the trainer puts completions behind them."""
    ids = torch.from_numpy(np.stack(rows))
    mask = torch.ones_like(ids)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.clone(),
        "prompts": ids,
        "prompt_attention_mask": mask,
    }


class Clock(TrainerCallback):
    """Time at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note the time."""
        self.marks.append(time.perf_counter())


class CountingTrainer(GKDTrainer):
    """Counts what is generated, and the time it takes."""

    tokens: list[int]
    seconds: list[float]

    def training_step(self, *args, **kwargs):
        """A step, its generation watched."""
        real = GKDTrainer.generate_on_policy_outputs

        def watched(*inner):
            began = time.perf_counter()
            ids, mask, labels = real(*inner)
            self.seconds.append(time.perf_counter() - began)
            self.tokens.append(int((labels != -100).sum()))
            return ids, mask, labels

        self.generate_on_policy_outputs = watched
        return super().training_step(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    parser.add_argument("--greedy", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    prompts = np.load(args.prompts)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    if args.greedy:
        ids = torch.from_numpy(prompts[: args.greedy])
        with torch.no_grad():
            out = student.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        print(json.dumps({"greedy": out[:, ids.shape[1] :].tolist()}))
        return
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    tokenizer = word_tokenizer(student.config.vocab_size)
    clock = Clock()
    rows = list(prompts[: args.steps * args.batch_size])
    with tempfile.TemporaryDirectory() as out_dir:
        settings = {"gradient_checkpointing": False} if args.no_gradient_checkpointing else {}
        config = GKDConfig(
            output_dir=out_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            lmbda=1.0,
            learning_rate=args.learning_rate,
            max_new_tokens=args.new_tokens,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = CountingTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            data_collator=collate,
            train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in rows]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.tokens, trainer.seconds = [], []
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
            rows, batch_size=args.batch_size, shuffle=False, collate_fn=collate
        )
        trainer.train()
    seconds = clock.marks[-1] - clock.marks[0]
    print(
        json.dumps(
            {
                "tokens_per_second": sum(trainer.tokens[1:]) / seconds,
                "generating": sum(trainer.seconds[1:]) / seconds,
                "tokens": sum(trainer.tokens[1:]),
                "use_cache": bool(trainer.generation_config.use_cache),
                "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            }
        )
    )


if __name__ == "__main__":
    main()
