"""The base of all configuration models: frozen, strict about unknown keys, documented."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen record. A key it does not know is an error, never ignored.

    The string below each field is its description, so the source, `p2pllm config show` and the
    error letters all say the same.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
