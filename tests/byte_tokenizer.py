"""A tokenizer that tests can make without files: one token a byte, so ids can be read as text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer(
    merges: list[tuple[str, str]] | None = None, *, bos: bool = False, chat: str | None = CHAT
) -> PreTrainedTokenizerFast:
    """`merges`: pairs of bytes (as ByteLevel writes them) that become one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [a + b for a, b in merges or []]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<eos>", "pad_token": "<pad>"} | ({"bos_token": "<bos>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat, **ends)
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    return tokenizer
