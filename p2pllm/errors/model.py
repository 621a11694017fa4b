"""Letters about the base model, the device that runs it, and the adapter."""

from p2pllm.errors.letter import P2PLLMError


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
