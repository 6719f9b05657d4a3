"""A script for `test_divided`: Lightning's ModelParallelStrategy, two processes; each writes what it holds."""

import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from admm_fits import Users, admm, fit, new_net, samples, sgd  # noqa: E402
from pytorch_lightning.callbacks import ModelCheckpoint  # noqa: E402
from pytorch_lightning.strategies import ModelParallelStrategy  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # noqa: E402


class Divided(Users):
    """Somebody's module that divides its net where Lightning says."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not any(hasattr(p, "full_tensor") for p in self.parameters()):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.backbone.conv2, mesh=mesh)
            fully_shard(self.backbone, mesh=mesh)


def data() -> DataLoader:
    """Half the images of every step in each process: together the steps of one process with batches of 8."""
    images = TensorDataset(*samples())
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # Lightning sets it for the process it starts
    return DataLoader(images, batch_size=4, sampler=DistributedSampler(images, 2, rank, shuffle=False))


def main(folder: Path, stop: int) -> None:
    def run(epochs: int, resume: Path | None = None):
        net = new_net()
        net.dropout.p = 0.0
        callback = admm(net, ranks=2, track_truncated=True, tolerance=0.0)
        saver = ModelCheckpoint(folder / f"until{epochs}", "{epoch}", save_top_k=-1)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
        trainer = fit(
            Divided(net, sgd), callback, saver, epochs=epochs, data=data(), val=data(), resume=resume, **options
        )
        return trainer, net, callback

    if stop:
        run(stop)
    trainer, net, callback = run(3, folder / f"until{stop}" / f"epoch={stop - 1}.ckpt" if stop else None)
    weights = {name: t.full_tensor().detach() for name, t in net.state_dict().items()}
    small = callback.convert(skeleton=new_net())
    held = {"weights": weights, "small": dict(small.state_dict()), "primal": callback.admm.primal}
    torch.save({**held, "truncated": callback.latest["admm/truncated_accuracy"]}, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
