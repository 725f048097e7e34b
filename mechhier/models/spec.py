"""What to train and how: `ModelSpec` and `TrainSpec`, every field of which is used or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mechhier.specs import MOST_CONTEXT, Described, Flag, Number, Size, Whole, shown, whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Architecture = Literal["llama", "gpt2", "gpt_neox", "olmo", "olmo2"]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]

MOST_LAYERS = 1_000
"""Most layers of a model: they are built one by one, at a millisecond each."""
MOST_WIDTH = 10**7
"""Most neurons, or heads, side by side; the bytes of all weights are limited besides."""
MOST_BYTES = 2**40
"""Most bytes of a model's weights, embeddings of tokens left out: a terabyte in float32."""
MOST_STEPS = 10**9
"""Most optimizer steps: at a millisecond each they take eleven days."""
MOST_ROWS = 2**20
"""Most rows of a step, or held out: their tokens are in memory together."""
MOST_CHECKPOINTS = 100_000
"""Most checkpoints of a run, each a folder of its own."""

# GPT-NeoX-20B and Pythia rotate this share of each head.
_NEOX_ROTARY_FRACTION = 0.25

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"architecture": "llama", "n_layers": 2, "d_model": 64, "n_heads": 4},
    "paper": {"architecture": "llama", "n_layers": 16, "d_model": 256, "n_heads": 4, "d_mlp": 1024, "n_ctx": 512},
}
"""Shapes by name: `tiny` learns in minutes on a laptop, `paper` is the model of arXiv 2603.06592."""


class ModelSpec(Described):
    """The shape of a transformer, built as an ordinary Hugging Face causal language model in float32, without dropout.

    | architecture | norm | positions | MLP | blocks | embeddings | biases |
    |---|---|---|---|---|---|---|
    | `llama` | RMSNorm | rotary, all of each head | gated SiLU | sequential | untied | none |
    | `olmo` | LayerNorm without parameters | rotary, all of each head | gated SiLU | sequential | untied | none |
    | `olmo2` | RMSNorm, behind each branch (and of q, k) | rotary, all of each head | gated SiLU | sequential | untied | none |
    | `gpt_neox` | LayerNorm | rotary, a quarter of each head | GELU | attention and MLP in parallel | untied | yes |
    | `gpt2` | LayerNorm | learned | GELU (tanh) | sequential | untied | yes |

    Embeddings are untied in all of them, so that what a token reads and what it predicts can differ. GPT-2's own
    checkpoints tie them; this is the one place where a spec departs from the family's default.

    Example:
        >>> spec = ModelSpec("llama", n_layers=2, d_model=64, n_heads=4)
        >>> spec.n_parameters(vocab_size=101), spec.n_bytes(vocab_size=101)
        (144320, 577280)
        >>> ModelSpec(preset="tiny") == spec
        True
        >>> ModelSpec(preset="paper", n_layers=8).d_model
        256
    """

    architecture: Architecture
    """Family, by Hugging Face's `model_type`."""
    n_layers: Annotated[Size, Field(le=MOST_LAYERS)]
    """Number of blocks; all their weights have at most a terabyte."""
    d_model: Annotated[Size, Field(le=MOST_WIDTH)]
    """Width of the residual stream; divisible by `n_heads`."""
    n_heads: Annotated[Size, Field(le=MOST_WIDTH)]
    """Attention heads of each block."""
    d_mlp: Annotated[Size, Field(le=MOST_WIDTH)] | None = None
    """Width of the MLP's hidden layer; None: 4 x d_model."""
    n_ctx: Annotated[Size, Field(le=MOST_CONTEXT)] | None = None
    """Longest sequence; None: the corpus's context."""
    n_key_value_heads: Annotated[Size, Field(le=MOST_WIDTH)] | None = None
    """Heads with keys and values of their own, each shared by `n_heads / n_key_value_heads` query heads (grouped-query
    attention), in `llama` and `olmo2`; None: as many as `n_heads`."""

    def __init__(self, architecture: Architecture | None = None, **sizes: Any) -> None:
        # The architecture may be given by position; pydantic reports a missing one like any other missing field.
        super().__init__(**sizes if architecture is None else {"architecture": architecture, **sizes})

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # as of `Described`

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, fields: Any) -> Any:
        """`preset: paper` stands for that shape, here and in YAML; fields beside it replace the preset's."""
        if not isinstance(fields, Mapping) or "preset" not in fields:
            return fields
        name = fields["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"no preset {shown(name)}: choose from {', '.join(PRESETS)}")
        return PRESETS[name] | {field: value for field, value in fields.items() if field != "preset"}

    @property
    def n_rotary(self) -> int:
        """Dimensions of a head that carry rotary positions."""
        d_head = self.d_model // self.n_heads
        return {"gpt2": 0, "gpt_neox": int(d_head * _NEOX_ROTARY_FRACTION)}.get(self.architecture, d_head)

    @model_validator(mode="after")
    def _check_heads(self) -> ModelSpec:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} must be divisible by n_heads={self.n_heads}")
        d_head = self.d_model // self.n_heads
        if self.n_rotary % 2:
            raise ValueError(
                f"{self.architecture} rotates {self.n_rotary} of a head's d_model / n_heads = {d_head} dimensions, "
                "in pairs: choose d_model and n_heads so that this number is even"
            )
        if self.architecture == "gpt_neox" and self.n_rotary == 0:
            raise ValueError(f"gpt_neox rotates a quarter of each head: d_model / n_heads = {d_head} must be 8 or more")
        if self.n_key_value_heads is not None:
            if self.architecture not in ("llama", "olmo2"):
                raise ValueError(f"n_key_value_heads applies to llama and olmo2, not to {self.architecture}")
            if self.n_heads % self.n_key_value_heads:
                raise ValueError(f"n_key_value_heads={self.n_key_value_heads} must divide n_heads={self.n_heads}")
        return self

    @model_validator(mode="after")
    def _check_bytes(self) -> ModelSpec:
        in_and_out = 2 * self.d_model
        learned_positions = self.d_model * (self.n_ctx or 0) if self.architecture == "gpt2" else 0
        numbers = self.n_layers * in_and_out * (self.d_model + (self.d_mlp or 4 * self.d_model)) + learned_positions
        if 4 * numbers > MOST_BYTES:
            raise ValueError(
                f"the blocks of n_layers={self.n_layers}, d_model={self.d_model}, d_mlp={self.d_mlp or 4 * self.d_model} "
                f"take at least {4 * numbers / 2**30:,.0f} GiB in float32; at most {MOST_BYTES // 2**30:,} GiB are accepted"
            )
        return self

    def build(self, *, vocab_size: int, eos_token_id: int, n_ctx: int | None = None, seed: int = 0) -> PreTrainedModel:
        """Make the model with freshly drawn weights, float32 on the CPU; the caller's random state is left alone.

        Args:
            vocab_size: Number of token ids.
            eos_token_id: Id of the end-of-sequence token; there is no beginning-of-sequence and no padding token.
            n_ctx: Longest sequence where the spec leaves it open.
            seed: Seed of the weights.

        Raises:
            ValueError: Neither the spec nor the call gives `n_ctx`.
        """
        import torch

        from mechhier.models.torch_state import default_torch_state

        with default_torch_state(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._instantiate(vocab_size, self._context(n_ctx), eos_token_id)

    def n_parameters(self, vocab_size: int, *, n_ctx: int | None = None) -> int:
        """Number of trainable parameters, embeddings included; only GPT-2's depends on `n_ctx`."""
        import torch

        n_ctx = self._context(n_ctx) if self.architecture == "gpt2" else 1
        with torch.device("meta"):
            model = self._instantiate(vocab_size, n_ctx, eos_token_id=0)
        return sum(parameter.numel() for parameter in model.parameters())

    def n_bytes(self, vocab_size: int, *, n_ctx: int | None = None, dtype: torch.dtype | None = None) -> int:
        """Bytes of the weights, in memory and in a checkpoint; float32, as training keeps them, if `dtype` is None.

        Training holds four times as much: weights, gradients and AdamW's two moments; activations come on top.
        """
        import torch

        return self.n_parameters(vocab_size, n_ctx=n_ctx) * (dtype or torch.float32).itemsize

    def _context(self, n_ctx: int | None) -> int:
        chosen = self.n_ctx or n_ctx
        if chosen is None:
            raise ValueError("n_ctx is open: give it in the ModelSpec or in the call")
        return chosen

    def _instantiate(self, vocab_size: int, n_ctx: int, eos_token_id: int) -> PreTrainedModel:
        import transformers

        d_mlp = self.d_mlp or 4 * self.d_model
        # Defaults of these configs name token ids beyond a small vocabulary; a padding id would freeze that embedding.
        tokens = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": None}
        common = {**tokens, "tie_word_embeddings": False, "use_cache": False, "attn_implementation": "sdpa"}
        if self.architecture == "gpt2":
            config = transformers.GPT2Config(
                n_layer=self.n_layers,
                n_embd=self.d_model,
                n_head=self.n_heads,
                n_inner=d_mlp,
                n_positions=n_ctx,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
            return transformers.GPT2LMHeadModel(config)
        sizes = {
            "num_hidden_layers": self.n_layers,
            "hidden_size": self.d_model,
            "num_attention_heads": self.n_heads,
            "intermediate_size": d_mlp,
            "max_position_embeddings": n_ctx,
            **common,
        }
        grouped = {"num_key_value_heads": self.n_key_value_heads or self.n_heads}
        if self.architecture == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped, **sizes))
        if self.architecture == "olmo2":
            return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**grouped, **sizes))
        if self.architecture == "olmo":
            return transformers.OlmoForCausalLM(transformers.OlmoConfig(**sizes))
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": _NEOX_ROTARY_FRACTION}
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(rope_parameters=rope, **sizes))


class TrainSpec(Described):
    """How to train: AdamW, linear warm-up, then a cosine to a fraction of the learning rate.

    With a warm-up of W steps of T, step n (from 1) is taken at n / W of the learning rate up to step W, then at
    f + (1 - f) (1 + cos(pi (n - W) / (T - W))) / 2 of it, f = `final_lr_fraction`: step W has the highest rate, step T
    exactly the fraction. A warm-up of no steps is one of one step; a single step is the last.

    Batch n is rows n x batch_size to (n + 1) x batch_size of the corpus, which is read again from its start where it
    is shorter than the training. A corpus's rows are independent draws already, so they are not shuffled.
    """

    steps: Annotated[Size, Field(le=MOST_STEPS)] | None = None
    """Optimizer steps; None: one pass over the corpus."""
    batch_size: Annotated[Size, Field(le=MOST_ROWS)] = 32
    """Rows of a step, over all devices."""
    gradient_accumulation: Size = 1
    """Parts, of equal size, in which a device works through its share of a step; more parts need less memory."""
    learning_rate: Positive = 3e-3
    """Highest learning rate."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """AdamW's decay rates of the gradient's mean and of its square's."""
    warmup_steps: Annotated[Whole, Field(ge=0, le=MOST_STEPS)] | None = None
    """Steps of linear warm-up; fewer than `steps`. None: 100, or a third of a training of fewer than 300 steps."""
    final_lr_fraction: Fraction = 0.1
    """Learning rate of the last step, as a fraction of the highest."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay of the weight matrices; never of norms and biases."""
    max_grad_norm: Positive = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights; nothing else in training is random."""
    n_checkpoints: Annotated[Whole, Field(ge=2, le=MOST_CHECKPOINTS)] = 12
    """Checkpoints on the grid of `checkpoint_steps`, the untrained model and the last step included."""
    checkpoints_at: Annotated[tuple[Annotated[Whole, Field(ge=0)], ...], Field(max_length=MOST_CHECKPOINTS)] = ()
    """Steps at which a checkpoint is kept besides those of the grid."""
    eval_rows: Annotated[Whole, Field(ge=2, le=MOST_ROWS)] = 256
    """Rows of the corpus's validation split on which loss and floor are measured. The floor takes milliseconds a row, but
    where fresh lexicons meet tied words (`binding`) up to a second."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and the backward pass; weights, optimizer and evaluation are float32 always. `auto`: bfloat16
    autocast on a GPU that has it, else float32."""
    compile: Flag | None = None
    """Whether `torch.compile` makes the model's kernels; None: on a GPU."""

    @model_validator(mode="after")
    def _check_steps(self) -> TrainSpec:
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        if self.steps is not None and (beyond := [step for step in self.checkpoints_at if step > self.steps]):
            raise ValueError(f"checkpoints_at={beyond} lie beyond steps={self.steps}")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} must be divisible by gradient_accumulation={self.gradient_accumulation}"
            )
        return self


def checkpoint_steps(steps: int, n: int) -> list[int]:
    """The steps at which checkpoints are kept: 0, then spaced evenly in log, then evenly, then the last step.

    Half of them lie in the decade from 1 % to 10 % of training, where small models change fastest, the rest between
    10 % and the end.

    Args:
        steps: Number of optimizer steps, at least 1.
        n: Number of checkpoints, at least 2; fewer come back where a short training makes some coincide.

    Returns:
        Sorted distinct steps, the first 0 and the last `steps`.

    Raises:
        ValueError: `steps` below 1 or `n` below 2, or one of them absurdly large.

    Example:
        >>> checkpoint_steps(1200, 12)
        [0, 12, 21, 38, 67, 120, 300, 480, 660, 840, 1020, 1200]
    """
    steps, n = whole("steps", steps, least=1, most=MOST_STEPS), whole("n", n, least=2, most=MOST_CHECKPOINTS)
    n_log = (n - 1) // 2
    early = np.geomspace(steps / 100, steps / 10, n_log)
    late = np.linspace(steps / 10, steps, n - n_log)[1:] if n_log else [steps]
    return sorted({0, *(max(1, round(step)) for step in (*early, *late))})
