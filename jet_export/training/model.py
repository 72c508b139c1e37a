"""TrainingModel: the model that trains. Its parameters have the names and shapes of the inference model's, so that
checkpoints are read and written by `jet_export.model.weights`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from jet_export.model.jet_nemotron import Attention, DecoderLayer, JetNemotronForCausalLM, rope_table
from jet_export.model.rms_norm import RMSNorm
from jet_export.model.weights import WeightedModel
from jet_export.training.data.rows import Batch
from jet_export.training.layer import Context, LayerOutput, TrainingLayer
from jet_export.training.packed_attention import attend_for

Out = TypeVar("Out")
VARIANTS = 256  # that torch.compile makes of a layer before it gives up


class TrainingModel(WeightedModel):
    """A model over packed rows. `dtype` is that of the activations; parameters may be fp32 beneath them (autocast).

    Its forward runs a function of the model and a batch, e.g. `losses.logits_losses`: whatever reads parameters has to
    run inside of it, where FSDP has gathered them.
    """

    def __init__(self, model: JetNemotronForCausalLM, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = model.config, dtype
        self.compiled = False
        self.embed_tokens: nn.Embedding = model.embed_tokens
        layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
        self.layers: nn.ModuleList = nn.ModuleList(TrainingLayer(layer) for layer in layers)
        self.norm: RMSNorm = model.norm
        self.lm_head: nn.Linear = model.lm_head

    @property
    def training_layers(self) -> list[TrainingLayer]:
        return [layer for layer in self.layers if isinstance(layer, TrainingLayer)]

    def compile_layers(self, backend: str = "inductor") -> None:
        """torch.compile of each layer. Layers share a function, so its variants are many: kinds, dtypes, what trains,
        sizes of candidates, and the same of the teacher."""
        torch._dynamo.config.recompile_limit = VARIANTS
        self.compiled = True
        for layer in self.layers:
            layer.compile(backend=backend)

    def forward(self, batch: Batch, compute: Callable[[TrainingModel, Batch], Out]) -> Out:
        with torch.autocast(batch.tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return compute(self, batch)

    def context(self, batch: Batch) -> Context:
        if self.compiled:  # every batch has another number of sequences
            torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
        table = rope_table(self.config, batch.length, self.dtype, batch.tokens.device)
        mixers = [layer.self_attn for layer in self.training_layers]
        attend = {w: attend_for(batch, w) for w in sorted({m.window for m in mixers if isinstance(m, Attention)})}
        return Context(batch, table[batch.positions], attend)

    def embed(self, batch: Batch) -> Tensor:
        """[T, hidden]."""
        h: Tensor = self.embed_tokens(batch.tokens)
        return h.to(self.dtype)

    def run_layers(self, batch: Batch) -> Iterator[tuple[Tensor, LayerOutput]]:
        """Each layer's input [T, hidden] and its output."""
        context = self.context(batch)
        h = self.embed(batch)
        for layer in self.layers:
            out: LayerOutput = layer(h, context)
            yield h, out
            h = out.hidden

    def last_hidden(self, batch: Batch) -> Tensor:
        """[T, hidden], normalised: what lm_head multiplies."""
        for _, out in self.run_layers(batch):
            h = out.hidden
        x: Tensor = self.norm(h)
        return x

    def logits(self, batch: Batch) -> Tensor:
        """[T, vocab]: of evaluation and tests; losses do not form them."""
        out: Tensor = self.lm_head(self.last_hidden(batch))
        return out


def part_of(name: str, layer_types: tuple[str, ...]) -> str:
    """The part of the recipe's `train` that a parameter belongs to."""
    pieces = name.split(".")
    if pieces[0] != "layers":
        return "norms" if pieces[0] == "norm" else "embeddings"
    if pieces[2] == "self_attn":
        return "jet" if layer_types[int(pieces[1])] == "jet" else "attention"
    return "mlp" if pieces[2] == "mlp" else "norms"
