"""RunConfig: everything that the peers of one run must agree on. It travels in the signed manifest.

If two peers must agree on a value, it belongs here; what one peer may choose for itself is in
`peer.py`. The fingerprint is the hash of the whole: two peers train together only if it is equal.
"""

import hashlib
import json
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from p2pllm.config.base import Config

LoraAveraging = Literal["both", "freeze_a", "alternate"]
Template = Literal["alpaca", "dolly", "llama2", "chat"]
RunName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]


class RandomInit(Config):
    """A small untrained Llama with a byte-level tokenizer, made from the run's seed. For tests."""

    hidden_size: int = Field(64, ge=8, le=4096)
    """Width of the residual stream."""
    layers: int = Field(2, ge=1, le=64)
    """Number of transformer blocks."""
    heads: int = Field(4, ge=1, le=64)
    """Attention heads; divides `hidden_size`."""


class ModelConfig(Config):
    """The frozen base model under the adapter."""

    name: str | None = None
    """A Hugging Face id, a local directory, or `package:NAME` (one that a package carries)."""
    revision: str | None = None
    """Commit, tag or branch on the hub. Give a commit: a branch can move under the run."""
    weights_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Hash of the base weights (`p2pllm config show` on a machine that has them prints it). When it
    is not given, a joiner compares its base with those of the peers that are already there."""
    random_init: RandomInit | None = None
    """An untrained model instead of `name`. It learns nothing useful; it is for tests."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """In what precision the frozen base is held. Adapters are always float32."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Quantisation of the frozen base through bitsandbytes."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.name is None) == (self.random_init is None):
            raise ValueError("give exactly one of model.name and model.random_init")
        return self


class LoraConfig(Config):
    """The shape of the adapter, in PEFT's terms."""

    r: int = Field(8, ge=1, le=1024)
    """Rank."""
    alpha: int = Field(16, ge=1)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target: tuple[str, ...] | Literal["all-linear", "auto"] = "auto"
    """Names of the modules that get an adapter; `all-linear`: every linear layer but the head;
    `auto`: PEFT's choice for the architecture."""


class DataConfig(Config):
    """Which rows are trained on, and how a row becomes tokens. Columns follow dolly's schema."""

    source: str | tuple[str, ...]
    """A Hugging Face dataset id, one or several JSON/JSONL files, or the shipped
    `package:stdlib-qa`."""
    config_name: str | None = None
    """Configuration of a hub dataset, where it has several."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    columns: dict[str, Literal["instruction", "context", "response", "category", "text"]] = Field(
        default_factory=dict
    )
    """From the dataset's column names to ours."""
    template: Template | str = "alpaca"
    """alpaca, dolly, llama2, chat (the tokenizer's own), or a text with {instruction} in it, and
    {context} if you like."""
    train_on: Literal["answer", "all"] = "answer"
    """Count the loss on the answer only, or on the prompt too."""
    max_length: int = Field(512, ge=8, le=131072)
    """Longest row, in tokens."""
    long_rows: Literal["truncate", "drop"] = "truncate"
    """What happens to a row that is longer."""
    replace: dict[Annotated[str, Field(min_length=1)], str] = Field(default_factory=dict)
    """Words to replace in every prompt and answer, such as the name of an assistant."""
    eval_size: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = 200
    """Held-out rows: a number, or a fraction of all rows. Streaming takes the first ones."""
    eval_by: str | None = None
    """Hold out whole groups of rows that share this column, so that related rows do not leak."""
    eval_source: str | tuple[str, ...] | None = None
    """Evaluate on this data set (named as in `source`) instead of holding rows out."""
    eval_split: str | None = None
    """Evaluate on this split of a hub dataset, such as test, instead of holding rows out."""
    shards: int = Field(16, ge=1, le=4096)
    """Disjoint parts of the training rows; a trainer leases one at a time. At least as many as
    there will be trainers."""
    streaming: bool = False
    """Read rows while training, for data sets too large to hold, in the order of the data set:
    shard s has every row whose number, modulo `shards`, is s. Files must be JSONL."""

    @property
    def has_eval_set(self) -> bool:
        """Whether the rows to evaluate on come from elsewhere than those to train on."""
        return self.eval_source is not None or self.eval_split is not None

    @model_validator(mode="after")
    def _can_be_streamed(self) -> "DataConfig":
        if self.streaming and self.eval_by is not None:
            raise ValueError("streaming holds out the first rows, so it cannot go with eval_by")
        if self.streaming and isinstance(self.eval_size, float):
            raise ValueError("streaming needs eval_size as a number of rows, such as 200")
        return self

    @field_validator("template")
    @classmethod
    def _has_a_place_for_the_question(cls, template: str) -> str:
        if template not in get_args(Template) and "{instruction}" not in template:
            names = ", ".join(get_args(Template))
            raise ValueError(f"must be one of {names}, or a text with {{instruction}} in it")
        return template


class LocalEpoch(Config):
    """The work between two averages: exactly one of the three."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    epochs: float | None = Field(None, gt=0)
    """Passes, or a fraction of a pass, over the peer's shard."""
    seconds: float | None = Field(None, gt=0)
    """Wall-clock seconds: a slow peer contributes fewer samples and holds nobody up."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "LocalEpoch":
        if sum(v is not None for v in (self.steps, self.epochs, self.seconds)) != 1:
            raise ValueError("give exactly one of steps, epochs and seconds")
        return self


class TrainingConfig(Config):
    """The local steps."""

    local: LocalEpoch = LocalEpoch(steps=100)
    """How long a local epoch is."""
    batch_size: int = Field(8, ge=1)
    """Samples in one optimizer step of one peer, whatever its micro-batch is."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Its moments stay local and are kept across rounds."""
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate. A swarm makes fewer and steadier updates than one machine: where four
    peers were compared with one (`just bench-learning`), two to four times its rate suited them."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay over the whole run, indexed by the global round, so that late joiners agree."""
    warmup_rounds: float = Field(0.0, ge=0)
    """Linear warm-up at the start of the run, in (fractions of) rounds."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm in each step."""


class Deadline(Config):
    """When a round starts without the peers that are not ready: learned from past rounds."""

    mads: float = Field(4.0, ge=0)
    """The deadline is the median of the past rounds' waiting times plus this many MADs."""
    floor: float = Field(10.0, gt=0)
    """Never shorter, in seconds."""
    ceiling: float = Field(600.0, gt=0)
    """Never longer, in seconds; also the deadline while nothing has been learned."""


class AveragingConfig(Config):
    """The all-reduce after each local epoch."""

    compression: Literal["none", "fp16", "int8"] = "fp16"
    """How deltas travel; int8 keeps the rounding error for the next round (error feedback). The
    average is bit-identical on every peer in any case."""
    min_peers: int = Field(1, ge=1)
    """Quorum: fewer ready trainers than this never close a round."""
    max_group: int = Field(16, ge=1, le=256)
    """Most trainers in one round."""
    deadline: Deadline = Deadline()
    """How long the ready peers wait for the others. Who would be late ends its local epoch before
    that and offers what it has."""
    robust: Literal["none", "clip", "trimmed_mean"] = "clip"
    """Against deltas that are out of proportion: scale them down, or drop the largest and the
    smallest value of each coordinate (from four trainers on)."""
    clip: float = Field(3.0, gt=1)
    """A norm, or a weight, above this multiple of the group's median counts as that multiple."""
    outer: Literal["mean", "nesterov"] = "mean"
    """What is done with the averaged delta: add it, or take a step of DiLoCo's outer optimizer
    (Nesterov momentum; Douillard et al. 2023)."""
    outer_lr: float = Field(0.7, gt=0)
    """Learning rate of `outer: nesterov`."""
    outer_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of `outer: nesterov`. It is part of what a late joiner catches up."""
    overlap: bool = False
    """Go on training while the average is under way, and add it to the local adapter when it comes:
    no peer is ever idle, but each local epoch begins without the others' last one."""
    lora: LoraAveraging = "both"
    """What is trained and averaged of LoRA's B·A: both; only B, A keeping its first values
    (FFA-LoRA); or B in even and A in odd rounds (RoLoRA). The last two average exactly, and halve
    the bytes."""
    carry: float = Field(0.5, ge=0, le=1)
    """With which weight a peer that missed a round offers that work again in the next."""


class EvaluationConfig(Config):
    """What is measured on the held-out rows: by the aggregator, and by trainers if asked."""

    every: int = Field(1, ge=1)
    """In rounds. Round 0 (the base model) and the last round are always evaluated."""
    on_trainers: Literal["never", "before", "after", "both"] = "never"
    """Whether trainers evaluate, too: their own work before an average, the adapter after it, or
    both. The final adapter is never left out of `after`. A peer opts out with `evaluate: false`."""
    max_rows: int | None = Field(None, ge=1)
    """Evaluate on at most this many held-out rows."""
    batch_size: int = Field(8, ge=1)
    """Rows in one forward pass."""


class CheckpointConfig(Config):
    """What the aggregator keeps on disk."""

    every: int = Field(1, ge=0)
    """In rounds; 0 writes none but the final adapter, which always is."""
    at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Extra checkpoints, after these rounds. They are never removed."""
    keep: int | None = Field(3, ge=1)
    """How many checkpoints stay, besides those of `at` and the final one; null: all."""


class RunConfig(Config):
    """One run. Its YAML file in configs/ is named after it."""

    name: RunName
    """Lower case letters, digits and dashes. Taken from the file's name when not given."""
    description: str = ""
    """One sentence for those who join."""
    seed: int = Field(1234, ge=0, lt=2**31)
    """Of the adapter's first values, the shards and the order of rows."""
    rounds: int = Field(10, ge=1)
    """After this many averages the run is finished."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    averaging: AveragingConfig = AveragingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _knows_how_long_an_epoch_is(self) -> "RunConfig":
        if self.data.streaming and self.training.local.epochs is not None:
            raise ValueError(
                "training.local.epochs needs to know how many rows there are, and data.streaming "
                "does not tell: give training.local.steps or training.local.seconds"
            )
        return self

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the canonical JSON of every field but the free-text description."""
        canonical = json.dumps(
            self.model_dump(mode="json", exclude={"description"}),
            sort_keys=True,
            separators=(",", ":"),
        )
        return hashlib.sha256(canonical.encode()).hexdigest()
