"""Recurrent modules with factorized weights: torch's kernel with the rebuilt ones, or the factors step by step."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hodec.layers.weight import FactorizedWeights

State = tuple[Tensor, ...]


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, dim=-1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    new = torch.tanh(xn + reset * hn)
    return (new + update * (state[0] - new),)


# Mode of the module -> (products with x, products with h, state before) -> state after; the output comes first.
CELLS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda x, h, state: (torch.tanh(x + h),),
    "RNN_RELU": lambda x, h, state: (torch.relu(x + h),),
}


class FactorizedRecurrent(FactorizedWeights):
    """Put before ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``; takes and gives what they do.

    Training and packed sequences go through torch's kernel with the rebuilt weights. In inference, weights whose
    ``execution`` is one of the format's run by their factors: those of the input for all time steps at once, those of
    the state step by step. Where all are ``rebuilt``, inference uses torch's kernel too.
    """

    mode: str
    num_layers: int
    bidirectional: bool
    batch_first: bool
    bias: bool

    def forward(self, input: Tensor | PackedSequence, hx: State | Tensor | None = None) -> object:
        """As the dense class."""
        steps = any(self.runs_factors(name) for name in cast(nn.ModuleDict, self.factorized))
        if self.training or not steps or not isinstance(input, Tensor) or input.ndim not in (2, 3):
            return super().forward(input, hx)
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x  # (steps, batch, ..)
        output, after = self._run(x, self._states(x, hx, batched=batched))
        if not batched:
            output, after = output.squeeze(1), tuple(state.squeeze(1) for state in after)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, after if self.mode == "LSTM" else after[0]

    def _states(self, x: Tensor, hx: State | Tensor | None, *, batched: bool) -> State:
        """The states before the first step, (layers * directions, batch, ..) each, checked as torch does."""
        rows, size = self.num_layers * (1 + self.bidirectional), cast(int, self.hidden_size)
        sizes = (cast(int, self.proj_size) or size, size)[: 2 if self.mode == "LSTM" else 1]
        if hx is None:
            return tuple(x.new_zeros(rows, x.shape[1], n) for n in sizes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        given = given if batched else tuple(state.unsqueeze(1) for state in given)
        like = x.transpose(0, 1) if self.batch_first else x
        cast(nn.RNNBase, self).check_forward_args(like, given if self.mode == "LSTM" else given[0], None)  # type: ignore[arg-type]
        return given

    def _run(self, x: Tensor, states: State) -> tuple[Tensor, State]:
        """All layers over (steps, batch, ..): the outputs of the last one, and the states after the last step."""
        ends: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in ("", "_reverse")[: 1 + self.bidirectional]:
                first = tuple(state[len(ends)] for state in states)
                output, last = self._direction(x, first, f"l{layer}{suffix}", backwards=bool(suffix))
                outputs.append(output)
                ends.append(last)
            x = torch.cat(outputs, dim=-1)
        return x, tuple(torch.stack(state) for state in zip(*ends, strict=True))

    def _direction(self, x: Tensor, state: State, name: str, *, backwards: bool) -> tuple[Tensor, State]:
        cell, outputs = CELLS[self.mode], []
        inputs: Sequence[Tensor] = self._with_bias("ih", name, x.transpose(0, 1)).unbind(1)
        for step in reversed(inputs) if backwards else inputs:
            state = cell(step, self._with_bias("hh", name, state[0]), state)
            if cast(int, self.proj_size):
                state = (self.product(f"weight_hr_{name}", state[0]), *state[1:])
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def _with_bias(self, side: str, name: str, x: Tensor) -> Tensor:
        y = self.product(f"weight_{side}_{name}", x)
        return y + getattr(self, f"bias_{side}_{name}") if self.bias else y

    # -- torch's own list of weights, which it reads instead of the parameters ----------------------------------------

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in cast(list[str], self._flat_weights_names)]

    @_flat_weights.setter
    def _flat_weights(self, weights: object) -> None:
        """It is made anew at each reading."""

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs: list[object] = []

    def _update_flat_weights(self) -> None:
        """There is nothing to update."""

    def flatten_parameters(self) -> None:
        """The rebuilt weights are apart from each other."""

    def __setstate__(self, state: dict[str, object]) -> None:
        nn.Module.__setstate__(self, state)
        self._init_flat_weights()
