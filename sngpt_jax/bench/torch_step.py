"""A recipe's training step in PyTorch: gradient accumulation, Muon and Adam.

It does the work of `sngpt_jax.training.step` and `sngpt_jax.optim`.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sngpt_jax.bench.torch_model import TorchGPT
from sngpt_jax.config import Config, OptimConfig, microbatches
from sngpt_jax.model.layers import compute_dtype
from sngpt_jax.optim.groups import group_of, groups
from sngpt_jax.optim.schedules import muon_momentum

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
A, B, C = 3.4445, -4.7750, 2.0315  # the coefficients of `sngpt_jax.optim.muon`


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """`sngpt_jax.optim.muon.newton_schulz` for a stack [n, rows, columns]."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).float()


class Muon:
    """`sngpt_jax.optim.muon` with a learning rate and decoupled weight decay.

    Matrices of equal shape form one stack.
    """

    def __init__(self, matrices: list[Tensor], config: OptimConfig):
        self.config, self.count, self.momentum = config, 0, muon_momentum(config)
        by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[tuple(matrix.shape)].append(matrix)
        self.stacks = [
            (found, torch.zeros(len(found), *shape, device=found[0].device))
            for shape, found in by_shape.items()
        ]
        self.orthogonalize: Callable[..., Tensor] = newton_schulz
        self.dtype = DTYPES[config.newton_schulz_dtype]

    @torch.no_grad()
    def step(self, multiplier: float) -> None:
        c, mu = self.config, float(self.momentum(self.count))
        lr = c.muon_lr * multiplier
        for matrices, buffer in self.stacks:
            grads = torch.stack([matrix.grad for matrix in matrices])
            buffer.mul_(mu).add_(grads)
            grads.add_(buffer, alpha=mu)
            directions = self.orthogonalize(grads, c.newton_schulz_steps, self.dtype)
            rows, columns = buffer.shape[1:]
            scale = -lr * math.sqrt(max(1.0, columns / rows))
            if c.muon_weight_decay:
                torch._foreach_mul_(matrices, 1.0 - lr * c.muon_weight_decay)
            torch._foreach_add_(matrices, list(directions.unbind()), alpha=scale)
        self.count += 1


class TorchStep:
    """The training step of a recipe without averages and late quantization: one call per batch."""

    def __init__(self, config: Config, params: dict[str, np.ndarray], compiled: bool):
        """`params` are our initial parameters by path, float32.

        `compiled` sends the model and the orthogonalization through torch.compile.
        """
        o, d = config.optim, config.data
        accumulation = microbatches(d.batch_tokens, config.train.device_batch_tokens, d.seq_len, 1)
        self.clip, self.rows = o.grad_clip, d.batch_tokens // d.seq_len // accumulation
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = DTYPES[compute_dtype(config.model).name]
        self.loss = TorchGPT(config.model, d.seq_len, dtype).to(self.device)
        self.parameters = list(self.loss.parameters())
        by_group: dict[str, list[Tensor]] = defaultdict(list)
        for name, p in self.loss.named_parameters():
            path = name.replace(".", "/")
            p.data.copy_(torch.tensor(params[path]))
            by_group[group_of(path)].append(p)
        matrices, adam = [], []
        for name, group in groups(o).items():
            found = by_group[name]
            if group.rule == "muon":
                matrices += found
            elif found:
                rates = {"lr": group.lr, "peak": group.lr, "weight_decay": group.weight_decay}
                adam.append({"params": found, **rates})
        self.muon = Muon(matrices, o)
        betas = o.adam_b1, o.adam_b2
        self.adam = torch.optim.AdamW(adam, betas=betas, eps=o.adam_eps, fused=True)
        if compiled:
            self.loss = torch.compile(self.loss)
            self.muon.orthogonalize = torch.compile(newton_schulz, dynamic=False)

    def place(self, batch: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """The "inputs" and "targets" [B, T] of a batch on the device."""
        arrays = batch["inputs"], batch["targets"]
        inputs, targets = (torch.from_numpy(a.astype(np.int64)).to(self.device) for a in arrays)
        return inputs, targets

    def __call__(
        self, batch: tuple[Tensor, Tensor], lr_multiplier: float, adam_lr_multiplier: float
    ) -> Tensor:
        """One step on a batch from `place`. Returns the mean loss, on the device."""
        inputs, targets = (rows.split(self.rows) for rows in batch)
        for p in self.parameters:
            p.grad = None
        total = torch.zeros((), device=self.device)
        for microbatch in zip(inputs, targets, strict=True):
            loss = self.loss(*microbatch) / len(inputs)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * adam_lr_multiplier
        self.adam.step()
        self.muon.step(lr_multiplier)
        return total
