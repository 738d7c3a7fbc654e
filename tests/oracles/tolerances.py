"""How far a result may be from the exact one, by precision. README.md lists these tolerances beside measured errors.

Not a test file. Measured errors: python tests/oracles/precision.py
"""

import torch

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# largest difference of values of order one; the largest seen were 7e-15, 7e-7, 2.4e-3 and 2.1e-2
ATTENTION = {F64: 1e-12, F32: 5e-6, F16: 6e-3, BF16: 5e-2}
NETWORK = {F64: 1e-10, F32: 1e-5}          # largest difference of outputs of order one
UNET_HALF = {BF16: 0.02}                   # the difference's norm, of the result's
TEXT_HALF = {F16: 0.02, BF16: 0.2}         # largest difference, with random weights
CHAIN = {F64: 1e-10, F32: 1e-4}            # largest difference of any latent of an inversion
