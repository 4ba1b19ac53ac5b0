"""Training in tests: the stage that a configuration belongs to, and a trainer on packed rows."""

from xinslm.data.packing import PackedDataset
from xinslm.distill import run as distill
from xinslm.distill.config import DistillConfig
from xinslm.progress import ignore
from xinslm.train import run as pretrain
from xinslm.train.loop import Trainer
from xinslm.train.packed import PackedObjective
from xinslm.train.row_sampler import RowSampler, Source

MEASURED = ("seconds", "tokens_per_second", "utilization", "other_load")
"""Fields of metrics.jsonl that differ between equal runs."""


def run(config, on_progress=ignore):
    stage = distill if isinstance(config, DistillConfig) else pretrain
    return stage.run(config, on_progress)


class PackedTrainer(Trainer):
    """A `Trainer` on the rows of one source, or of a plan."""

    def __init__(
        self,
        model,
        config,
        loss,
        rows: PackedDataset,
        total_steps,
        targets,
        device,
        auxiliary=None,
        plan=None,
        validation=None,
    ):
        self.rows, self.auxiliary, self.model = rows, auxiliary, model
        plan = plan or RowSampler(
            [Source(rows, targets, loss)], config.batch_size, total_steps, config.seed
        )
        objective = PackedObjective(model, config, plan, device, validation, auxiliary)
        super().__init__(
            objective, config, total_steps, optimizer_in_backward=config.optimizer_in_backward
        )
