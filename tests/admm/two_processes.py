"""A script for `test_callback_ddp`: two processes train together; each writes what it holds into a folder."""

import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from admm_fits import Users, admm, cosine, fit, new_net, samples, sgd  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # noqa: E402

from hodec.admm import projection as projection_module  # noqa: E402


def share() -> DataLoader:
    """Half the images of every step in each process: together the steps of one process with batches of 8."""
    data = TensorDataset(*samples())
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # Lightning sets it for the process it starts
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank, shuffle=False))


class Undecided:
    """A learner whose ranks differ between processes."""

    def update(self, plan, weights, rho):
        if torch.distributed.get_rank():
            return plan
        return projection_module.with_ranks(plan, {name: [1] * len(layer.ranks) for name, layer in plan.items()})


def plant(callback, trainer):
    """U of one layer off by 0.1 in the second process, from the middle of epoch 1 on."""
    if (trainer.current_epoch, trainer.global_step, trainer.global_rank) == (1, 6, 1):
        callback.admm.states["conv2"].u.add_(0.1)


def main(folder: Path, how: str) -> None:
    net = new_net()
    net.dropout.p = 0.0
    callback = admm(
        net, ranks=2, track_truncated=True, tolerance=0.0, learner=Undecided() if how == "learned" else None
    )
    real = projection_module.project_layers

    def project(plan, tensors, covariances):
        """Decompositions that differ between processes, as they do between machines, only more."""
        noise = 1e-3 * (1 + torch.distributed.get_rank()) if how == "apart" else 0.0
        return {name: z + noise for name, z in real(plan, tensors, covariances).items()}

    projection_module.project_layers = project
    if how == "planted":
        callback.on_train_batch_start = lambda trainer, *_: plant(callback, trainer)
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    module = Users(net, lambda m: cosine(sgd(m), 12))
    trainer = fit(module, callback, epochs=3, data=share(), val=share(), **options)
    states = {name: {"z": s.z, "u": s.u, "rho": s.rho} for name, s in callback.admm.states.items()}
    state = {"states": states, "weights": dict(net.state_dict()), "primal": callback.admm.primal}
    state["ranks"] = {name: list(layer.ranks) for name, layer in callback.admm.projection.plan.items()}
    state["truncated"] = callback.latest["admm/truncated_accuracy"]
    torch.save(state, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
