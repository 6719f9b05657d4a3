"""Roles: what uses a planned weight, which decides how its factors can run."""

from enum import Enum

# The execution that multiplies the factors out and hands the dense weight to whatever reads it: fewer parameters, the
# dense weight's multiply-adds.
REBUILT = "rebuilt"

# Multiply-adds that a weight of a recurrent layer has to save in each time step before its factors run step by step: a
# step in Python takes 35 us longer than one in torch's kernel, which does about so many in that time (one core, LSTM,
# one image).
STEP_MACS = 500_000


class Role(Enum):
    """What uses a planned weight.

    ``LAYER``: a layer of its own, which is swapped for a factorized one; the weight is its ``weight``.
    ``PROJECTION``: a module that can run a factorized layer in place of the product with it, as attention does.
    ``RECURRENT``: a recurrent module, which can do so step by step or give the rebuilt weight to torch's kernel.
    ``PARAMETER``: anything else that reads it: it is rebuilt.
    """

    LAYER = "layer"
    PROJECTION = "projection"
    RECURRENT = "recurrent"
    PARAMETER = "parameter"
