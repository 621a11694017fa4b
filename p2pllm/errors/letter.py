"""What all letters have in common."""

import inspect


class P2PLLMError(Exception):
    """Something went wrong: {reason}"""

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        super().__init__(inspect.cleandoc(type(self).__doc__ or "").format(**facts))

    @property
    def letter(self) -> str:
        return str(self)
