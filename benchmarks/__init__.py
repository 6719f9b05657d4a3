"""What claims of speed are measured with: ratios inside one process.

``python -m benchmarks`` runs them all; most modules also run on their own. Importing this package, which happens before
any of its modules imports torch or NumPy, pins their threads to one unless the environment says otherwise.
"""

import os

# Each library reads its own; torch reads OMP's and MKL's, NumPy's BLAS its own.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

for _variable in THREAD_VARIABLES:
    os.environ.setdefault(_variable, "1")
