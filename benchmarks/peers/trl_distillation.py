"""The peer of `distill`: TRL's DistillationTrainer on given answers; prints one JSON line.

    trl-venv/bin/python trl_distillation.py --teacher DIR --student DIR --rows rows.npz --steps 8
    --batch-size 4

The environment and the rows are those of trl_gkd.py. The trainer lets the student write each
completion; here the step that writes returns the rows instead, which takes no time, so that what is
timed is the trainer's forward, loss, backward and optimiser step on the very tokens of the others.
A row's prompt are the tokens before its first target.
"""

import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer
from trl_gkd import Clock, arguments, load, report, settings, word_tokenizer


class GivenAnswers(DistillationTrainer):
    """Takes completions from `rows`; a prompt is the number of its row."""

    rows: list[dict[str, list[int]]]
    first_loss: float | None = None

    def _generate(self, prompts: list) -> tuple:
        prompt_ids, completions, masks = [], [], []
        for row in (self.rows[int(prompt)] for prompt in prompts):
            learnt = [label >= 0 for label in row["labels"]]
            start = max(1, learnt.index(True))
            prompt_ids.append(row["input_ids"][:start])
            completions.append(row["input_ids"][start:])
            masks.append([int(x) for x in learnt[start:]])
        return prompt_ids, completions, masks, None, []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The trainer's, of which the first is kept."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.first_loss is None:
            self.first_loss = loss.item()
        return loss


def main() -> None:
    parser = arguments()
    parser.description = __doc__
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = load(args.rows)[: args.steps * args.batch_size]
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    clock = Clock([], 1)
    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(output_dir=out, shuffle_dataset=False, **settings(args))
        trainer = GivenAnswers(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(rows))]),
            processing_class=word_tokenizer(student.config.vocab_size),
            callbacks=[clock],
        )
        trainer.rows = rows
        began = time.perf_counter()
        trainer.train()
    report(rows, args, clock, began, trainer.first_loss or 0.0)


if __name__ == "__main__":
    main()
