"""How a question becomes a prompt. Knows text only; `tokens.py` turns it into ids.

A layout is one text with {instruction}, {context} and {response}. What comes before {response} is
the prompt, exactly as it is given to the model later, when there is no response yet.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from p2pllm.errors import ChatTemplateMissing


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set in dolly's schema, as text."""

    instruction: str
    context: str
    response: str


# Layouts without and with context. The headings are those that Alpaca, Dolly and Llama 2 made
# common, which is what base models have met; the sentences around them are ours.
LAYOUTS = {
    "alpaca": (
        "Here is an instruction. Write a response that carries it out.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n{response}",
        "Here is an instruction, with an input it refers to. "
        "Write a response that carries it out.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n{response}",
    ),
    "dolly": (
        "Here is an instruction. Write a response that carries it out.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n{response}\n\n### End",
        "Here is an instruction. Write a response that carries it out.\n\n"
        "### Instruction:\n{instruction}\n\nInput:\n{context}\n\n"
        "### Response:\n{response}\n\n### End",
    ),
    "llama2": (
        "[INST] <<SYS>>\nYou answer correctly and to the point.\n<</SYS>>\n\n"
        "{instruction} [/INST] {response}",
        "[INST] <<SYS>>\nYou answer correctly and to the point.\n<</SYS>>\n\n"
        "{instruction}\n\n{context} [/INST] {response}",
    ),
}


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ChatTemplateMissing before any row is read."""
    if template == "chat" and not tokenizer.chat_template:
        raise ChatTemplateMissing(tokenizer=tokenizer.name_or_path or "of this model")


def render(template: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt and the answer. Their concatenation is the row's text, without BOS and EOS.

    Blanks at the end of the prompt move to the answer: tokenizers join a blank with the word after
    it, so a prompt that ends in one would be cut differently once the answer is there.
    """
    if template == "chat":
        prompt, answer = _render_chat(example, tokenizer)
    else:
        prompt, answer = _fill(template, example)
    bare = prompt.rstrip(" ")
    return bare, prompt[len(bare) :] + answer


def render_prompt(
    template: str, instruction: str, context: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The same prompt, for a question that has no answer yet."""
    return render(template, Example(instruction, context, ""), tokenizer)[0]


def _fill(template: str, example: Example) -> tuple[str, str]:
    plain, with_context = LAYOUTS.get(template, (template, template))
    layout = with_context if example.context else plain
    if "{response}" not in layout:
        layout += "{response}"
    before, _, after = layout.partition("{response}")
    values = {"instruction": example.instruction, "context": example.context}
    # Not str.format: a manifest comes from a stranger, and format reads attributes. And in one
    # pass, so that a row whose text holds "{context}" stays as it is.
    prompt = re.sub(r"\{(instruction|context)\}", lambda found: values[found[1]], before)
    return prompt, example.response + after


def _render_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    content = "\n\n".join(filter(None, (example.instruction, example.context)))
    question = [{"role": "user", "content": content}]
    prompt = str(
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    )
    answered = [*question, {"role": "assistant", "content": example.response}]
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    # A template that rewrites history (some reasoning models) does not continue its own prompt.
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :].rstrip()
    return prompt, example.response
