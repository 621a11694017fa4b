"""PeerConfig: what one peer decides for itself. It never leaves the machine."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from p2pllm.config.base import Config
from p2pllm.config.paths import named_in

PeerName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,31}$")]


class NetworkConfig(Config):
    """How this peer reaches the others, and they it."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddrs of one or more peers of the swarm, with their /p2p/ part."""
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """Where to listen. A bootstrap peer gives a fixed port."""
    announce_maddrs: tuple[str, ...] = ()
    """Under which addresses others can dial this peer, where they differ (port forwarding, NAT)."""
    client_only: bool = False
    """Take no incoming connections: for a peer that cannot be dialled at all."""
    relay: bool = True
    """Use, and while reachable serve as, a libp2p relay for peers behind NAT."""


class TrackingConfig(Config):
    """How trackers are used."""

    roles: Literal["all", "aggregator"] = "all"
    """On which peers: all that ask for them, or none but the aggregator."""
    project: str = "p2pllm"
    """Project in Weights & Biases or Trackio."""
    entity: str | None = None
    """Team or user in Weights & Biases; your own default when not given."""
    group: str | None = None
    """Under which the peers of a run are shown together; the run's id when not given."""


class PeerConfig(Config):
    """One peer on one machine."""

    name: PeerName | None = None
    """How this peer is shown to others; the machine's host name when not given."""
    run: str | None = None
    """Which run to join, where the initial peers know several."""
    identity: Path | None = None
    """Private key file; <output>/<run>/<peer>/identity.key when not given."""
    output: Path = Path("runs")
    """Everything is written below this folder, in <run>/<peer>/. {run_id}, {run} and {peer} in it
    say where else; {shard}, {shards} and ~ do in paths, too."""
    network: NetworkConfig = NetworkConfig()
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto, cpu, mps, cuda or cuda:N."""
    threads: int | None = Field(None, ge=1)
    """CPU threads for tensor work. Give 1 when several peers share a machine."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Samples in one forward and backward pass; the whole batch when not given. `auto` begins with
    the whole batch, and halves it whenever the device runs out of memory."""
    launcher: Literal["auto", "python", "torchrun"] = "auto"
    """One process, or one for each GPU through torchrun; auto: where there are several."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, slower."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention implementation; auto: sdpa where the model has it."""
    data: tuple[Path, ...] = ()
    """This peer's own private JSON/JSONL files, instead of a shard of the run's data. Placeholders
    as in `output`: parts/shard-{shard:03}.jsonl."""
    shard: int | None = Field(None, ge=0)
    """This peer's number among the parts of a split: what {shard} in a path stands for."""
    trackers: tuple[Literal["jsonl", "tensorboard", "wandb", "trackio"], ...] = ("jsonl",)
    """Where the numbers of metrics.jsonl go, too. That file (jsonl) is written in any case; the
    others need their packages: pip install tensorboard, wandb or trackio."""
    tracking: TrackingConfig = TrackingConfig()
    evaluate: bool = True
    """Take part in what the run evaluates: a trainer where evaluation.on_trainers says so, the
    aggregator always; without it an aggregator only keeps checkpoints."""

    @field_validator("output", "data")
    @classmethod
    def _has_known_placeholders(cls, paths: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        for path in (paths,) if isinstance(paths, Path) else paths:
            named_in(path)
        return paths

    @model_validator(mode="after")
    def _has_a_shard_where_a_path_does(self) -> "PeerConfig":
        if self.shard is None and any("shard" in named_in(p) for p in (self.output, *self.data)):
            raise ValueError("a path has {shard} in it: say which one, such as --set shard=0")
        return self
