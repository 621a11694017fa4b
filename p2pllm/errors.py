"""Every failure that a user can meet, each a short letter: what happened, why, what to type next.

The docstring of a class is the template of its letter; the constructor fills it in. `cli.py` prints
letters at the one outermost door, so nothing else in the program prints an error.
"""

import inspect


class P2PLLMError(Exception):
    """Something went wrong: {reason}"""

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        super().__init__(inspect.cleandoc(type(self).__doc__ or "").format(**facts))

    @property
    def letter(self) -> str:
        return str(self)


# ---- configuration


class ConfigNotFound(P2PLLMError):
    """There is no configuration file {path}.

    Shipped runs lie in configs/. See what is there: ls configs
    """


class ConfigInvalid(P2PLLMError):
    """{path} is not a valid {kind} configuration:

    {problems}

    Check it again with: p2pllm config check {path}
    """


# ---- identity and network


class IdentityUnreadable(P2PLLMError):
    """The identity file {path} cannot be used: {reason}.

    Name another one with --identity FILE; a file that does not exist is created.
    """


class IdentityInUse(P2PLLMError):
    """The identity {path} is in use by another p2pllm process on this machine.

    Its peer id is {peer_id}. Two peers cannot share one. Stop the other process, or give this
    peer a name of its own: add --name NAME
    """


class AddressInvalid(P2PLLMError):
    """{address} is not a usable multiaddr: {reason}

    A full one looks like /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW... The bootstrap peer prints its
    own when it starts.
    """


class AddressInUse(P2PLLMError):
    """Another program already listens on {addresses}.

    Stop it, or listen elsewhere: --host-maddrs /ip4/0.0.0.0/tcp/PORT (port 0 takes a free one).
    """


class NoPeersReached(P2PLLMError):
    """None of the initial peers answered:
    {peers}

    Is one of them running and its port open? On its machine, see what it prints. Then try again, or
    name another peer of the swarm with --initial-peers.
    """


class NetworkDown(P2PLLMError):
    """The network part of this peer does not work: {reason}

    Start the command again. If it stays so, run it with --verbose and look at the last lines.
    """


# ---- model


class ModelNotFetched(P2PLLMError):
    """The base model {name} could not be fetched, and there is no local folder of that name:

    {reason}

    Check the name in model.name and the network, then start again. On a machine without network,
    put the model's folder there and give its path as model.name.
    """


class ModelGated(P2PLLMError):
    """The base model {name} is given only to people who accepted its terms.

    Accept them at https://huggingface.co/{name}, then log in with: hf auth login
    """


class ModelNotSupported(P2PLLMError):
    """The model {name} cannot be used: {reason}.

    Correct the run's configuration, then check it with: p2pllm config check
    """


class SafetensorsMissing(P2PLLMError):
    """{folder} holds no weights in the safetensors format.

    Other formats can run code while they are loaded, so they are never opened. Convert the model,
    or choose one whose repository lists model.safetensors.
    """


class WeightsUnreadable(P2PLLMError):
    """{path} is damaged: {reason}.

    Remove it, then start again: it will be fetched anew.
    """


class WeightsDiffer(P2PLLMError):
    """The base model {name} on this machine is not the one that the run was founded with.

    The run wants weights  {expected}
    this machine has       {found}

    Remove the local copy and start again, or give the run's exact commit as model.revision.
    """


class BaseNotLoaded(P2PLLMError):
    """The base model in {folder} could not be loaded:

    {reason}

    Models that need code of their own are not supported. With another attention or device it may
    work, for instance: --set attention=sdpa --set device=cpu
    """


class AttentionMissing(P2PLLMError):
    """This machine cannot run flash_attention_2: {reason}.

    Let p2pllm choose, which is nearly as fast: --set attention=auto
    On a recent NVIDIA GPU you can install it: pip install flash-attn --no-build-isolation
    """


class DeviceMissing(P2PLLMError):
    """The device {device} is not there: this machine has {count}.

    Let p2pllm choose one: --set device=auto
    """


class QuantizationUnavailable(P2PLLMError):
    """The run holds its base model in {quantization}, which does not work on this machine:

    {reason}

    Install the library for it with: pip install bitsandbytes
    If it is there, use a machine with an NVIDIA GPU, or join with: --set device=cpu
    """


class PackageUnknown(P2PLLMError):
    """No Python package is known to carry a model {name}.

    Known are: {known}. Give one of them as model.name.
    """


class PackageNotFetched(P2PLLMError):
    """The package {package}, which carries the base model, could not be downloaded:

    {reason}

    Check the network (and that pip is there: python -m ensurepip), then start again.
    """


class PackageDiffers(P2PLLMError):
    """{file} is not the file that p2pllm knows, so it was not used.

    expected sha256  {expected}
    found            {found}

    Try again; if it stays, your package index serves something else under this name.
    """


class ConversionFailed(P2PLLMError):
    """The model in {package} could not be converted:

    {reason}

    It needs 1.5 GB of memory, 700 MB of disk and two packages: pip install gguf accelerate
    """


class LoraTargetMissing(P2PLLMError):
    """The run's lora.target names {missing}, which the base model has not.

    {nearest}Its linear layers are: {present}. Name some of them, or say: all-linear
    """


class LoraRefused(P2PLLMError):
    """PEFT refuses the run's settings below `lora`:

    {reason}

    lora.r is 1 or more, and lora.target names some of this model's linear layers: {present}.
    See every key with its meaning: p2pllm config show RUN.yaml
    """


class NotAPeftModel(P2PLLMError):
    """GossipCallback shares LoRA adapters, but this trainer's model is a {kind} without one.

    Wrap it first: model = peft.get_peft_model(model, peft.LoraConfig(...))
    """


class AdapterUnlike(P2PLLMError):
    """The script's adapter has r={r} and lora_alpha={alpha}; the run's has {run_r} and {run_alpha}.

    Make it like the run's: peft.LoraConfig(r={run_r}, lora_alpha={run_alpha}, ...)
    """


class AdapterDiffers(P2PLLMError):
    """An adapter of {found} values came where this run's has {expected}.

    It belongs to another run, or to another lora.r or lora.target. Compare the two runs with:
    p2pllm config show
    """


# ---- configuration (loading)


class PeerConfigNotFound(P2PLLMError):
    """There is no peer configuration {path}.

    None is needed to join. Shipped examples lie in peers/. See what is there: ls peers
    """


class ConfigUnreadable(P2PLLMError):
    """The configuration file {path} cannot be read: {reason}

    Look at it with: ls -l {path}
    """


class ConfigExists(P2PLLMError):
    """There is a file {path} already. It was not touched.

    Give another name, or move it away first: mv {path} {path}.old
    """


class SettingsInvalid(P2PLLMError):
    """The --set values do not make a valid {kind} configuration:

    {problems}

    See every key with its default: p2pllm config show peers/trainer/peer.yaml
    """


# ---- training


class LossNotFinite(P2PLLMError):
    """Not one of the {steps} steps in the local epoch of round {round} had a finite loss.

    Usual causes: the learning rate is too high (training.learning_rate), or float16 is too narrow
    for this model (model.dtype: bfloat16). See how the loss went: p2pllm rounds
    """


class DeviceMemoryFull(P2PLLMError):
    """The device has too little memory for {rows} rows at once: {reason}.

    Take fewer rows at a time, which changes nothing for the run: --set micro_batch=auto
    or compute activations again instead of keeping them: --set gradient_checkpointing=true
    """


class RankLost(P2PLLMError):
    """One of this peer's processes has ended, and so must the others: {reason}

    If it said why, its words stand above. The swarm goes on; come back with the same command. With
    --launcher python one process is the whole peer.
    """


class DiskFull(P2PLLMError):
    """The disk that holds {folder} is full, so the checkpoint was not written. {last}

    Make room, then start again with the same command: the run goes on from there.
    """


class CheckpointFailed(P2PLLMError):
    """A checkpoint could not be written to {folder}: {reason}. {last}

    Check that the folder can be written to, or give another one with --output.
    """


class ForeignFolder(P2PLLMError):
    """{folder} holds checkpoints of another run.

    fingerprint there  {theirs}
    of this run        {ours}

    Give another folder with --output, or move the old one away first.
    """


# ---- data


class DatasetFileMissing(P2PLLMError):
    """There is no data file {path}.

    A relative path counts from the folder in which p2pllm was started. Correct it under `data` in
    the configuration, or see what is there: ls {path.parent}
    """


class DatasetUnreadable(P2PLLMError):
    """The data set {where} cannot be read: {why}

    A file needs one JSON object a line. A data set of the hub needs its exact id, a split and a
    configuration that it has, and, where it is gated, a login: hf auth login
    """


class DatasetEmpty(P2PLLMError):
    """The data set {where} has no rows.

    Choose another file under data.source, or another split under data.split.
    """


class ColumnsMissing(P2PLLMError):
    """The data set {where} has no column {missing}. It has: {present}

    Needed are instruction and response (context and category may be there, too), or text.
    Say which column is which under data.columns, for example:

    data:
      columns: {{NAME_IN_THE_DATA_SET: {first_missing}}}
    """


class ColumnNotText(P2PLLMError):
    """The column {column} of the data set {where} holds a {kind}, not text.

    Map a column of text under data.columns, or write the data set out as JSONL with one first.
    """


class AnswerUnknown(P2PLLMError):
    """The data set {where} has ready texts (column {column}), so where an answer begins is unknown.

    Count the loss on whole texts with data.train_on: all, or map the columns of the questions and
    answers to instruction and response under data.columns.
    """


class EvalColumnMissing(P2PLLMError):
    """data.eval_by names the column {column}, which {where} does not have. It has: {present}

    Name one of these, or leave data.eval_by out to hold out single rows.
    """


class HeldOutTooLarge(P2PLLMError):
    """{wanted} rows are to be held out, but there are only {rows} ({unit}), and some must be left.

    Give a smaller data.eval_size, for example 0.1 for a tenth of the rows.
    """


class FewerRowsThanShards(P2PLLMError):
    """The data set {where} leaves {rows} rows to train on, too few for {shards} shards.

    Give a smaller data.shards or a smaller data.eval_size.
    """


class NoRowsLeft(P2PLLMError):
    """None of the {read} rows of {where} can be used: their answers are empty or too long.

    A row, prompt included, may have {length} tokens. Give a larger data.max_length, or keep the
    beginnings of long rows with data.long_rows: truncate
    """


class LabelColumnMissing(P2PLLMError):
    """The data set {where} has no column {column}. It has: {present}

    Name one of these with --by (or --held-out-by), or leave it out.
    """


class LabelColumnUniform(P2PLLMError):
    """Every row of {where} has the same {column}: {value!r}. It cannot make the parts differ.

    Name another column with --by, or make parts of unequal sizes with --sizes-alpha 0.5
    """


class SplitTooFine(P2PLLMError):
    """The data set {where} leaves {rows} rows, too few for {peers} peers.

    Give a smaller --peers or a smaller --held-out.
    """


class SplitExists(P2PLLMError):
    """The folder {folder} is not empty, so no split was written there.

    Name another one with -o, or remove it: rm -r {folder}
    """


class ShardUnusable(P2PLLMError):
    """No row of several shards can be used: their answers are empty or too long.

    Give a larger data.max_length, keep the beginnings of long rows (data.long_rows: truncate), or
    cut the rows into fewer shards than {shards} (data.shards).
    """


class MoreTrainersThanShards(P2PLLMError):
    """All {shards} parts of the run's rows are taken by other trainers, so there is none for you.

    You stay as a spare, follow the run, and take over when a part becomes free. To train now, bring
    rows of your own: p2pllm join --data FILE ...
    A run has room for more trainers with a larger data.shards in its YAML file.
    """


class ChatTemplateMissing(P2PLLMError):
    """data.template is chat, but the tokenizer {tokenizer} has no chat template.

    Choose another one, for example: --set data.template=alpaca
    """


class EndTokenMissing(P2PLLMError):
    """The tokenizer {tokenizer} has no end-of-text token, so the model could not learn to stop.

    Choose a base model whose tokenizer has one, under model.name.
    """


# ---- entering a run


class NoRunFound(P2PLLMError):
    """The peers at these addresses know of no run:
    {peers}

    Perhaps its bootstrap peer has just been restarted: try again in a moment. To found a run:
    p2pllm bootstrap configs/RUN.yaml
    """


class SeveralRuns(P2PLLMError):
    """The swarm has several runs:
    {runs}

    Say which one: add --run ID
    """


class RunNotFound(P2PLLMError):
    """The swarm does not know a run called {wanted}. It has:
    {runs}

    Add --run ID with one of them.
    """


class BaseDiffers(P2PLLMError):
    """The base model {name} on this machine is not the one that the others train on.

    weights here:  {ours}
    weights there: {theirs}
    Averaging adapters of different bases would spoil both. Set model.revision in the run's YAML to
    one commit, or remove the model from this machine's cache and join again.
    """


class FolderForeign(P2PLLMError):
    """The folder {folder} belongs to another run than {run}.

    Nothing in it was touched. Write elsewhere: add --output FOLDER
    """


class OutputUnwritable(P2PLLMError):
    """Cannot write below {folder}: {reason}

    Choose another place: add --output FOLDER
    """


class NotDesignated(P2PLLMError):
    """The designated aggregator of this run is {aggregator}, and this peer is {me}.

    Evaluations count from one peer only. Join as a trainer instead (p2pllm join), or let the run's
    owner name this peer: p2pllm bootstrap RUN.yaml --aggregator {me}
    """


class NoInitialPeers(P2PLLMError):
    """No address of a peer was given, so there is no way into a swarm.

    Add --initial-peers ADDR, as the bootstrap peer prints it, or set P2PLLM_INITIAL_PEERS.
    """


class TrackerMissing(P2PLLMError):
    """The tracker {tracker} is asked for, but its package is not there: {reason}

    Install it with: pip install {tracker}
    or do without: --set trackers=[jsonl]
    """


class TrackerFailed(P2PLLMError):
    """The tracker {tracker} could not be started: {reason}

    For wandb, log in with: wandb login
    or keep its files on this machine: export WANDB_MODE=offline
    or do without any tracker: --set trackers=[jsonl]
    """


# ---- looking back


class LedgerMissing(P2PLLMError):
    """There is no ledger.jsonl in {place} or below it.

    A peer writes one into its folder, runs/<run>/<name>/. Name that folder: p2pllm rounds FOLDER
    """


class RoundUnknown(P2PLLMError):
    """The ledger says nothing about round {round}. It has rounds: {known}

    See them all: p2pllm rounds
    """


# ---- the demo


class DemoChildDied(P2PLLMError):
    """The demo's {name} ended too early. Its last words:

    {words}

    The whole log: {log}
    """


class DemoStalled(P2PLLMError):
    """Nothing has happened in the demo for {minutes} minutes, so it was ended.

    The peers' logs lie in {folder}. Start it again with: just demo
    """


class DemoTrainersGone(P2PLLMError):
    """All trainers of the demo ended before the run did. The last words of {name}:

    {words}

    The logs of all peers lie in {folder}
    """
