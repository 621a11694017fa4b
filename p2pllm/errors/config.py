"""Letters about configuration files and --set."""

from p2pllm.errors.letter import P2PLLMError


class ConfigNotFound(P2PLLMError):
    """There is no configuration file {path}.

    Shipped runs lie in configs/. See what is there: ls configs
    """


class ConfigInvalid(P2PLLMError):
    """{path} is not a valid {kind} configuration:

    {problems}

    Check it again with: p2pllm config check {path}
    """


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
